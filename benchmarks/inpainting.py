"""Blending against RePaint: redraw the figure of a true picture of `shapes` as another one.

    python benchmarks/inpainting.py [--model runs/shapes/pipeline] [--pictures 64] [--out benchmarks/results/inpainting.json]

A disc around the figure is the mask; the caption asks for the same place, size and ground, and another colour and shape.
Obedience: share of results of which a program reads all five attributes. Seam: mean jump of a colour value (0 to 255) across
the mask's edge, where the true picture has none. 30 steps of the model's own sampler, guidance 1.5.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.training import shapes
from sfumato.training.metrics import shapes_obedience

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="runs/shapes/pipeline")
parser.add_argument("--pictures", type=int, default=64)
parser.add_argument("--out", default="benchmarks/results/inpainting.json")
options = parser.parse_args()
pipe = SfumatoPipeline.from_pretrained(options.model)
pipe.set_progress_bar_config(disable=True)
size, rng = pipe.unet.config.sample_size, np.random.default_rng(0)
scenes = shapes.scenes(held_out=True, count=options.pictures)
colours, kinds = list(shapes.COLOURS), list(shapes.SHAPES)
wanted = [
    shapes.Scene(
        colours[(colours.index(s.colour) + 1 + i % 5) % 6],
        kinds[(kinds.index(s.shape) + 1 + i % 3) % 4],
        s.size,
        s.place,
        s.ground,
    )
    for i, s in enumerate(scenes)
]
truth = [shapes.draw(scene, size, rng) for scene in scenes]
axis = (np.arange(size) + 0.5) / size
masks = [
    ((axis[None] - shapes.PLACES[s.place][0]) ** 2 + (axis[:, None] - shapes.PLACES[s.place][1]) ** 2 < 0.38**2)
    for s in scenes
]


def seam(image: np.ndarray, mask: np.ndarray) -> float:
    values, jumps = image.astype(float), []
    for axis in (0, 1):
        edge = np.diff(mask, axis=axis)
        jumps.append(np.abs(np.diff(values, axis=axis))[edge].mean())
    return float(np.mean(jumps))


table = {}
for name, resamples in {"blending": 1, "RePaint, 5 times each step": 5, "RePaint, 10 times each step": 10}.items():
    start = time.perf_counter()
    images = pipe(
        [s.caption for s in wanted], image=truth, mask_image=masks, num_inference_steps=30, guidance_scale=1.5,
        num_resamples=resamples, generator=[torch.Generator().manual_seed(i) for i in range(len(wanted))], output_type="np",
    ).images  # fmt: skip
    images = [np.uint8(np.round(image * 255)) for image in images]
    kept = all((image == true)[~mask].all() for image, true, mask in zip(images, truth, masks))
    table[name] = {
        **shapes_obedience(images, wanted),
        "seam": float(np.mean([seam(i, m) for i, m in zip(images, masks)])),
        "kept_exactly": kept,
        "seconds": time.perf_counter() - start,
    }
    print(name, table[name], flush=True)
table["the true pictures"] = {"seam": float(np.mean([seam(i, m) for i, m in zip(truth, masks)]))}
Path(options.out).write_text(json.dumps({"pictures": len(wanted), "table": table}, indent=1) + "\n")
