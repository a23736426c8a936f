"""Samplers against network evaluations: obedience on held-out captions of `shapes`, and distance to the result of many steps.

    python -m benchmarks.sampling.samplers [--model runs/two_shapes/pipeline --figures 2] [--captions 64] [--out FILE.json]

Obedience: share of captions for which a program reads everything off the image, at guidance 1.5. Distance: root mean
square difference, pixels in [0, 1], to DDIM with 1,000 steps from the same noise; only for samplers that add no noise.
Writes charts beside the figures.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from benchmarks.common.chart import lines
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.choices import with_sampler
from sfumato.registries import SAMPLERS
from sfumato.training.data.sources import shapes
from sfumato.training.quality.obedience import shapes_obedience


def main() -> None:
    """Run the benchmark; see above."""
    STEPS = (4, 8, 15, 30, 50)

    def draw(pipe, prompts, steps):
        call = {"num_inference_steps": steps, "guidance_scale": 1.5, "output_type": "np"}
        return np.stack(draw_in_batches(pipe, prompts, batch_size=64, **call))

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/two_shapes/pipeline")
    parser.add_argument("--figures", type=int, default=2, help="figures per image in the model's data set, 1 or 2")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--out", default="benchmarks/results/samplers.json")
    options = parser.parse_args()
    pipe = SfumatoPipeline.from_pretrained(options.model)
    scenes = shapes.scenes(held_out=True, count=options.captions, num_figures=options.figures)
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
    for name, label in (("all", "captions drawn right"), ("distance", "distance to DDIM with 1,000 steps")):
        curves = {n: [(r["evaluations"], r[name]) for r in rows] for n, rows in table.items() if name in rows[0]}
        file = out.with_name(out.stem + ("" if name == "all" else f"_{name}") + ".png")
        lines(curves, "network evaluations of the conditional pass", label, file, log=True)


if __name__ == "__main__":
    main()
