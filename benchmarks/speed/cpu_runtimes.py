"""Runtimes on a CPU, interleaved: torch in float32, torch in bfloat16, ONNX Runtime, OpenVINO.

    python -m benchmarks.speed.cpu_runtimes [--model runs/demo/pipeline] [--rounds 7]
        [--out benchmarks/results/cpu_runtimes.json]

For 1 and for 12 images at 30 steps with guidance 1.5: seconds per call (median of the rounds, in each of which every
runtime draws once), and the greatest and root mean square difference from torch in float32, pixels in [0, 1]. Building an
engine, at the first call, is timed separately.
Besides the model, a larger network with random weights is measured, at 64 pixels and 4 steps.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import RUNTIMES, replace_components
from sfumato.pipelines.runtimes import with_runtime


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/pipeline")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="benchmarks/results/cpu_runtimes.json")
    options = parser.parse_args()

    PROMPTS = ["red heart", "blue heart", "green circle", "full moon", "soccer ball", "blue book"] * 2
    trained = SfumatoPipeline.from_pretrained(options.model)
    torch.manual_seed(0)
    large = UNet2DConditionModel.from_config(
        trained.unet.config, sample_size=64, block_out_channels=[64, 128, 256, 256], norm_num_groups=32
    )
    models = {"demo": (trained, 30), "random, 64 pixels": (replace_components(trained, unet=large.eval()), 4)}

    def draw(pipe, count, steps):
        start = time.perf_counter()
        images = pipe(
            PROMPTS[:count], num_inference_steps=steps, guidance_scale=1.5, output_type="np",
            generator=[torch.Generator().manual_seed(i) for i in range(count)],
        ).images  # fmt: skip
        return time.perf_counter() - start, images

    rows = []
    for model, (pipe, steps) in models.items():
        pipe.set_progress_bar_config(disable=True)
        for count in (1, 12):
            pipes = {name: with_runtime(pipe, name) for name in RUNTIMES}
            first, seconds = {name: draw(p, count, steps)[0] for name, p in pipes.items()}, {name: [] for name in pipes}
            images = {}
            for _ in range(options.rounds):
                for name, p in pipes.items():
                    spent, images[name] = draw(p, count, steps)
                    seconds[name].append(spent)
            for name in pipes:
                apart, median = np.abs(images[name] - images["torch"]), statistics.median(seconds[name])
                row = {
                    "model": model,
                    "parameters": sum(p.numel() for p in pipe.unet.parameters()),
                    "pictures": count,
                    "steps": steps,
                    "runtime": name,
                    "seconds": median,
                    "times as fast": statistics.median(seconds["torch"]) / median,
                    "building": first[name] - median,
                    "greatest difference": float(apart.max()),
                    "rms difference": float(np.sqrt(np.square(apart).mean())),
                    "all seconds": seconds[name],
                }
                rows.append(row)
                print(
                    {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items() if k != "all seconds"}, flush=True
                )
    about = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    Path(options.out).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
