"""Samplers against network evaluations: obedience on held-out captions of `shapes`, and distance to where many steps lead.

    python benchmarks/samplers.py [--model runs/shapes/pipeline] [--captions 64] [--out benchmarks/results/samplers.json]

Obedience: share of captions of which a program reads all five attributes off the picture, at guidance 1.5. Distance: root mean
square difference, pixels in [0, 1], to DDIM with 1,000 steps from the same noise; only for samplers that add no noise.
Writes a chart beside the figures.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import SAMPLERS, with_sampler
from sfumato.training import shapes
from sfumato.training.metrics import shapes_obedience

STEPS = (4, 8, 15, 30, 50)
COLOURS = ("#3050a0", "#c04030", "#30904a", "#906010", "#8040a0", "#108090", "#404040", "#d07090", "#60a010")


def draw(pipe, prompts, steps, batch=64):
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images.append(pipe(part, num_inference_steps=steps, guidance_scale=1.5, generator=generators, output_type="np").images)
    return np.concatenate(images)


def chart(table: dict, path: Path, width: int = 720, height: int = 360) -> None:
    """Obedience over network evaluations (logarithmic), a line a sampler."""
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    left, right, top, bottom = 50, width - 130, 15, height - 40
    pen.line([(left, top), (left, bottom), (right, bottom)], "black")
    evaluations = sorted({row["evaluations"] for rows in table.values() for row in rows})
    low, high = np.log(evaluations[0]), np.log(evaluations[-1])
    for value in (4, 8, 15, 30, 50, 100):
        if np.log(value) <= high:
            x = left + (np.log(value) - low) / (high - low) * (right - left)
            pen.text((x, bottom + 6), str(value), "black", font, anchor="ma")
    for share in (0, 0.25, 0.5, 0.75, 1):
        pen.text((left - 6, bottom - share * (bottom - top)), f"{share:.0%}", "black", font, anchor="rm")
    pen.text(((left + right) / 2, height - 16), "network evaluations of the conditional pass", "black", font, anchor="ma")
    for colour, (name, rows) in zip(COLOURS, table.items()):
        points = [
            (left + (np.log(r["evaluations"]) - low) / (high - low) * (right - left), bottom - r["all"] * (bottom - top))
            for r in rows
        ]
        pen.line(points, colour, 2)
        for x, y in points:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        pen.text((right + 12, top + 18 * list(table).index(name)), name, colour, font)
    sheet.save(path)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="runs/shapes/pipeline")
parser.add_argument("--captions", type=int, default=64)
parser.add_argument("--out", default="benchmarks/results/samplers.json")
options = parser.parse_args()
pipe = SfumatoPipeline.from_pretrained(options.model)
scenes = shapes.scenes(held_out=True, count=options.captions)
prompts = [scene.caption for scene in scenes]
far = with_sampler(pipe, "ddim")
far.set_progress_bar_config(disable=True)
truth = draw(far, prompts[:16], 1000)

table = {}
for name in [name for name in SAMPLERS if name != "euler-a" or pipe.scheduler.config.prediction_type != "sample"]:
    chosen, table[name] = with_sampler(pipe, name), []
    chosen.set_progress_bar_config(disable=True)
    calls = []
    hook = chosen.unet.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
    for steps in STEPS:
        calls.clear()
        start = time.perf_counter()
        images = draw(chosen, prompts, steps)
        scores = shapes_obedience([np.uint8(np.round(image * 255)) for image in images], scenes)
        row = {
            "steps": steps,
            "evaluations": len(calls) // -(-len(prompts) // 64),
            "seconds": time.perf_counter() - start,
            **scores,
        }
        if name not in ("ddpm", "dpm++-sde", "euler-a"):
            row["distance"] = float(np.sqrt(np.square(images[:16] - truth).mean()))
        table[name].append(row)
        print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    hook.remove()
out = Path(options.out)
out.write_text(
    json.dumps({"model": Path(options.model).parent.name, "captions": len(prompts), "table": table}, indent=1) + "\n"
)
chart(table, out.with_suffix(".png"))
