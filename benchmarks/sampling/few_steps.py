"""How few passes of the network suffice: a teacher with its own sampler, the best of diffusers' and LCM, and its students.

    python -m benchmarks.sampling.few_steps --teacher runs/two_shapes [--students runs/two_shapes_few ...] [--captions 256]

Obedience: share of held-out captions of `shapes` with two figures for which a program reads everything off the image, with
half the width of a 95% interval. A guided step of the teacher is two passes. `tune` chooses the sampler on other captions.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.chart import lines
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.choices import replace_components, with_sampler
from sfumato.pipelines.locate import locate_pipeline
from sfumato.pipelines.tune import tune
from sfumato.training.data.sources import shapes
from sfumato.training.quality.obedience import shapes_obedience

SCALE = 1.5


def measure(pipe, scenes, steps: int, seed: int = 0, batch: int = 64) -> dict:
    """Share of captions drawn right, passes and seconds for each image."""
    captions, seeds = [scene.caption for scene in scenes], range(seed, seed + len(scenes))
    call = {"num_inference_steps": steps, "guidance_scale": SCALE, "output_type": "np"}
    start = time.perf_counter()
    images = draw_in_batches(pipe, captions, seeds=seeds, batch_size=batch, **call)
    seconds = (time.perf_counter() - start) / len(scenes)
    right = shapes_obedience([np.uint8(np.round(image * 255)) for image in images], scenes)["all"]
    half = 1.96 * (right * (1 - right) / len(scenes)) ** 0.5
    row = {"steps": steps, "passes": pipe.num_passes, "right": right, "half_interval": half, "seconds_an_image": seconds}
    return {key: round(value, 4) for key, value in row.items()}


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="runs/two_shapes")
    parser.add_argument("--students", nargs="*", default=["runs/two_shapes_few"])
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--add", action="store_true", help="keep the rows of an earlier run and add those of the students")
    parser.add_argument("--plain", action="store_true", help="measure the teacher with its own sampler only, also with --add")
    parser.add_argument("--label", default="", help="prefix for the names of the rows")
    parser.add_argument("--out", default="benchmarks/results/few_steps.json")
    options = parser.parse_args()
    scenes = shapes.scenes(held_out=True, count=options.captions, num_figures=2)
    out = Path(options.out)
    trained = [scene.caption for scene in shapes.scenes(held_out=False, count=16, num_figures=2)]
    teacher = SfumatoPipeline.from_pretrained(locate_pipeline(options.teacher))
    table: dict[str, list[dict]] = json.loads(out.read_text())["table"] if options.add and out.exists() else {}

    def note(name: str, row: dict) -> None:
        name = f"{options.label} {name}".strip()
        table.setdefault(name, []).append(row)
        print(name, row, flush=True)

    if options.plain or not options.add:
        note("teacher, its own sampler", measure(teacher, scenes, 30))
    if not (options.plain or options.add):
        for steps in (1, 2, 4, 8):
            best = tune(teacher, trained, steps, SCALE)[0]
            row = measure(replace_components(teacher, scheduler=best.scheduler), scenes, steps)
            note("teacher, tuned", {**row, "sampler": best.sampler, "settings": best.settings})
        for steps in (1, 2, 4, 8):
            note("teacher, lcm", measure(with_sampler(teacher, "lcm"), scenes, steps))
    for student in options.students:
        pipe = SfumatoPipeline.from_pretrained(locate_pipeline(student))
        for steps in (1, 2, 3, 4, 8):
            note(f"student {Path(student).name}", measure(pipe, scenes, steps))
    content = {"captions": len(scenes), "guidance_scale": SCALE, "threads": torch.get_num_threads(), "table": table}
    out.write_text(json.dumps(content, indent=1) + "\n")
    curves = {name: [(row["passes"], row["right"]) for row in rows] for name, rows in table.items()}
    lines(curves, "passes of the network for an image", "captions drawn right", out.with_suffix(".png"), log=True)


if __name__ == "__main__":
    main()
