"""Time of the pipeline against the bare sum of its UNet calls, interleaved: batch 8, 30 steps, guidance 3.

python -m benchmarks.speed.sampling_overhead FOLDER [--rounds 9] [--out benchmarks/results/sampling_overhead.json]
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from sfumato.pipelines import SfumatoPipeline


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default="benchmarks/results/sampling_overhead.json")
    options = parser.parse_args()

    pipe = SfumatoPipeline.from_pretrained(options.folder)
    pipe.set_progress_bar_config(disable=True)
    size, batch, steps = pipe.unet.config.sample_size, 8, 30
    x = torch.randn(2 * batch, pipe.unet.config.in_channels, size, size)
    cond, uncond = pipe.encode_prompt([""] * batch)
    context = torch.cat([cond, uncond]).detach()

    @torch.no_grad()
    def bare():
        start = time.perf_counter()
        for t in pipe.scheduler.timesteps:
            pipe.unet(x, t, context, return_dict=False)
        return time.perf_counter() - start

    def whole():
        start = time.perf_counter()
        pipe([""] * batch, num_inference_steps=steps, guidance_scale=3.0)
        return time.perf_counter() - start

    whole(), bare()
    rounds = {"pipeline": [], "unet_calls": []}
    for _ in range(options.rounds):
        rounds["pipeline"].append(whole())
        rounds["unet_calls"].append(bare())
    ratios = [a / b - 1 for a, b in zip(rounds["pipeline"], rounds["unet_calls"])]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        "batch": batch,
        "steps": steps,
        "overhead_median_of_pairs": statistics.median(ratios),
        "seconds": rounds,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    median = {side: statistics.median(seconds) for side, seconds in rounds.items()}
    print(
        f"pipeline {median['pipeline']:.3f} s, UNet calls {median['unet_calls']:.3f} s, "
        f"overhead {statistics.median(ratios):+.1%}"
    )


if __name__ == "__main__":
    main()
