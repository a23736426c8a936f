"""The figures by which recipes are compared, from images drawn for the training captions of a set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.choices import with_sampler
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.quality.distances import frechet_distance, gaussian, kernel_distance
from sfumato.training.quality.features import compute_features, reference_features
from sfumato.training.quality.judge import FORMAT_VERSION, train_judges


class Yardstick:
    """FD, KID, retrieval and the mean distance to the caption's own image, over the training captions of `images`."""

    def __init__(self, image_set, cache_dir: str):
        self.numbers = image_set.select("train")
        self.captions = [image_set[int(i)]["captions"][0] for i in self.numbers]
        self.true = reference_features(image_set, "efficientnet-lite0", cache_dir)[self.numbers]
        self.whole, self.judge = gaussian(self.true), train_judges(image_set, cache_dir, 1)[0]

    def figures(self, made: list) -> dict[str, float | str]:
        """`made`: an image for each of `captions`, in their order."""
        made = np.stack([np.asarray(image) for image in made])
        seen = compute_features(made)
        scores = self.judge.scores(made, self.captions, seen)
        own = scores.diagonal()
        return {
            "FD": round(frechet_distance(self.whole, seen), 3),
            "KID": round(kernel_distance(self.true, seen), 5),
            "retrieval": round(float(np.mean((scores > own[:, None]).sum(1) < 1)), 4),
            "distance": round(float(np.linalg.norm(seen - self.true, axis=1).mean()), 4),
            "judge": FORMAT_VERSION,  # judges trained by different code differ: compare retrieval within one
        }


def rows(path: Path) -> list[dict]:
    """The rows of figures in a file, one JSON object per line; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def begin(path: Path, committed: list[dict]) -> None:
    """If there is no file of rows yet, as in a fresh clone, start from the committed ones."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in committed))


def train(folder: str, *settings: str) -> None:
    """Train `configs/demo.yaml` with some settings in one thread of its own process; it draws and saves only at the end."""
    quiet = [
        "validation.every_steps=null",
        "checkpoint.every_steps=null",
        "train.trackers=[]",
        "train.num_threads=1",
        "checkpoint.resume=auto",
    ]
    command = [sys.executable, "training/train.py", "configs/demo.yaml", *quiet, *settings, f"output_dir={folder}"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def judged(folder: str) -> dict:
    """Figures of one of our runs and what it saw: 12 steps of DPM-Solver++, the better by FD of the scales 1 and 1.5."""
    config = load_config(f"{folder}/config.yaml")
    image_set = prepare(config.data)
    yardstick, last = (
        Yardstick(image_set, config.data.cache_dir),
        json.loads(Path(folder, "metrics.jsonl").open().readlines()[-1]),
    )
    pipe, found = with_sampler(SfumatoPipeline.from_pretrained(f"{folder}/pipeline"), "dpm++"), []
    for scale in (1.0, 1.5):
        images = draw_in_batches(pipe, yardstick.captions, num_inference_steps=12, guidance_scale=scale)
        found.append({**yardstick.figures(images), "weights": "ema", "scale": scale})
    seen = {"pictures": last["images_seen"], "seconds": round(last["seconds"])}
    return seen | min(found, key=lambda figures: figures["FD"])
