"""Which colours an emoji model knows: pairs of colour and thing that were never trained, judged by pixels; also FD.

    python -m benchmarks.quality.colours --models openmoji runs/openmoji_colours [--pairs 180] [--out FILE.json]

The pairs are chosen evenly from those that `configs/openmoji_colours.yaml` holds out, plus seven colours of five everyday
things, some of which it trains. A colour is correct if most of the coloured area has it. FD is over 256 captions of OpenMoji
itself, in the features of EfficientNet-Lite0.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from sfumato.figures import grid, to_pil
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.locate import locate_pipeline
from sfumato.registries import METRICS
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.data.sources.openmoji import main_colour, split_colour
from sfumato.training.quality.evaluation import Evaluation, Plan
from sfumato.training.quality.statistics import mean_score

THINGS = ("book", "heart", "apple", "square", "circle")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")


def draw(pipe: SfumatoPipeline, captions: list[str]) -> list[np.ndarray]:
    """One image per caption, `(H, W, C)` uint8; image i with seed i."""
    call = {"num_inference_steps": 30, "guidance_scale": 1.5, "output_type": "np"}
    return [(image * 255).round().astype(np.uint8) for image in draw_in_batches(pipe, captions, batch_size=64, **call)]


def right(images: list[np.ndarray], captions: list[str]) -> list[bool]:
    """Which images have the colour that their caption begins with."""
    return [main_colour(image, reach=60.0) == split_colour(caption)[0] for image, caption in zip(images, captions)]


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["openmoji", "runs/openmoji_colours"])
    parser.add_argument("--pairs", type=int, default=180)
    parser.add_argument("--out", default="benchmarks/results/colours.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = prepare(load_config("openmoji_colours").data)
    plain = prepare(load_config("openmoji_32").data)
    numbers = images.select("held_out_pair")
    numbers = numbers[:: -(-len(numbers) // options.pairs)]
    pairs = [images[int(i)]["captions"][0] for i in numbers]
    everyday = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]
    true = [images.image(int(i)) for i in numbers]
    share = mean_score(right(true, pairs))
    result: dict = {"pairs": len(pairs), "colour right by true images": share.value, "models": {}}
    for name in options.models:
        pipe = SfumatoPipeline.from_pretrained(locate_pipeline(name))
        pipe.set_progress_bar_config(disable=True)
        config = load_config("openmoji_32", ["validation.num_inference_steps=30", "validation.guidance_scale=1.5"])
        plan = Plan(count=256, parts=("train",), intervals=False)
        evaluation = Evaluation(pipe, config, plain, Accelerator(cpu=True), plan)
        drawn = {"held-out pairs": (pairs, draw(pipe, pairs)), "everyday pairs": (everyday, draw(pipe, everyday))}
        row = result["models"][Path(name).name] = {}
        for kind, (captions, made) in drawn.items():
            score = mean_score(right(made, captions))
            row[f"colour right, {kind}"] = [round(score.value, 4), round(score.half_width or 0.0, 4)]
        wrong = [c for c, good in zip(everyday, right(drawn["everyday pairs"][1], everyday)) if not good]
        row |= {"everyday pairs that are wrong": wrong}
        row |= {figure: round(score.value, 4) for figure, score in METRICS["distances"].compute(evaluation).items()}
        print(name, json.dumps(row), flush=True)
        sheet = grid([to_pil(image) for image in drawn["everyday pairs"][1]], everyday, columns=len(COLOURS))
        sheet.save(Path(options.out).with_name(f"colours_{Path(name).name}.png"))
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
