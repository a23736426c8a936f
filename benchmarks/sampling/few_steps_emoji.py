"""The packaged emoji model and its student: how close their images come to true ones, and how long one takes.

    python -m benchmarks.sampling.few_steps_emoji --students runs/openmoji_few [...] [--teacher openmoji] [--data openmoji_32]
        [--images 256] [--out FILE.json]

FD, KID, recall, coverage and retrieval in the features of EfficientNet-Lite0, of training captions against the whole set, as
in `sfumato evaluate`; seconds of `pipelines.drawer.Drawer` on one thread, text and VAE included, median of 50.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps

from sfumato.figures import grid
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.drawer import Drawer
from sfumato.pipelines.locate import locate_pipeline
from sfumato.registries import METRICS
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.quality.evaluation import Evaluation, Plan

PROMPTS = ("red heart", "grinning face", "rocket", "soccer ball", "blue book", "woman firefighter dark skin tone")
SCALE = 1.5


def measure(pipe: SfumatoPipeline, steps: int, data: str, count: int, scale: float = SCALE) -> dict[str, float]:
    """Figures of what a model draws in `steps` steps for the captions of a config's data."""
    config = load_config(data, [f"validation.num_inference_steps={steps}", f"validation.guidance_scale={scale}"])
    if pipe.trained_size != config.data.size:
        raise SystemExit(f"--data {data} has images of {config.data.size}, the model draws {pipe.trained_size}")
    images = prepare(config.data)
    plan = Plan(count=count, parts=("train",), intervals=False)
    evaluation = Evaluation(pipe, config, images, Accelerator(cpu=True), plan)
    scores = {}
    for metric in ("distances", "manifold", "retrieval"):
        scores |= METRICS[metric].compute(evaluation)
    return {"steps": steps, "passes": pipe.num_passes, **{name: round(score.value, 4) for name, score in scores.items()}}


def seconds(drawer: Drawer, count: int = 50) -> dict[str, float]:
    """The median and the minimum of seconds for one image."""
    times = []
    for i in range(count):
        start = time.perf_counter()
        drawer.draw(PROMPTS[i % len(PROMPTS)], seed=i)
        times.append(time.perf_counter() - start)
    return {"median": round(float(np.median(times)), 4), "least": round(min(times), 4)}


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", nargs="+", default=["runs/openmoji_few"], help="of several seeds; the first is timed")
    parser.add_argument("--teacher", default="openmoji")
    parser.add_argument("--data", default="openmoji_32", help="the config whose captions are drawn (default: %(default)s)")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--time-only", action="store_true", help="leave the figures of an earlier run as they are")
    parser.add_argument("--figures-only", action="store_true", help="leave the seconds of an earlier run as they are")
    parser.add_argument("--student-scale", type=float, default=SCALE, help="guidance of the students (default: %(default)s)")
    parser.add_argument("--out", default="benchmarks/results/few_steps_emoji.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(options.out)
    partly = out.exists() and (options.time_only or options.figures_only)
    kept = json.loads(out.read_text()) if partly else {}
    result = {**kept, "images": options.images, "guidance_scale": SCALE}
    start = time.perf_counter()
    drawers = {"teacher, 60 passes": Drawer(options.teacher, num_inference_steps=30, guidance_scale=SCALE)}
    of_students = {"guidance_scale": options.student_scale}
    for steps in (1, 2, 4):
        drawers[f"student, {steps} passes"] = Drawer(options.students[0], num_inference_steps=steps, **of_students)
    if not options.figures_only:
        result["seconds to open four models"] = round(time.perf_counter() - start, 2)
        result["seconds an image, one thread, onnx"] = {name: seconds(drawer) for name, drawer in drawers.items()}
    print(json.dumps(result, indent=1), flush=True)
    if not options.time_only:
        rows = result["figures"] = {}
        for seed, folder in enumerate(options.students):
            student = SfumatoPipeline.from_pretrained(locate_pipeline(folder))
            for steps in (1, 2, 4, 8):
                rows[f"student {seed}, {steps} passes"] = measure(
                    student, steps, options.data, options.images, options.student_scale
                )
        teacher = SfumatoPipeline.from_pretrained(locate_pipeline(options.teacher))
        rows["teacher, 60 passes"] = measure(teacher, 30, options.data, options.images)
        titles, cells = [], []
        for name, drawer in drawers.items():
            titles += [f"{name}: {prompt}" for prompt in PROMPTS]
            cells += [
                ImageOps.contain(drawer.draw(prompt, seed=i), (96, 96), Image.Resampling.BOX)
                for i, prompt in enumerate(PROMPTS)
            ]
        grid(cells, titles).save(out.with_suffix(".png"))
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
