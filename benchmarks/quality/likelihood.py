"""Bits per dimension on images whose entropy is known: independent Gaussian pixels, rounded to 256 levels.

    python -m benchmarks.quality.likelihood [--minutes 6] [--out benchmarks/results/likelihood.json]

Trains a UNet on them with the hybrid loss and a learned variance (Nichol and Dhariwal 2021), and bounds the bits of unseen
images over all of its 1,000 steps; for comparison also with each fixed variance, and with the parts of the bound.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import stats

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import replace_components
from sfumato.schedulers import SfumatoDDPMScheduler
from sfumato.training.quality.likelihood import bits_per_dim
from sfumato.training.train import main

STD, SIDE, FOLDER = 0.25, 8, Path("runs/gaussian")


def toy(count: int, seed: int) -> tuple[np.ndarray, float, float]:
    """Images `(N, 8, 8, 3)` uint8, the entropy of such images in bits per dimension, and the bits of these particular ones."""
    levels = np.linspace(-1, 1, 256)
    p = np.diff(np.concatenate([[0], stats.norm(0, STD).cdf((levels[1:] + levels[:-1]) / 2), [1]]))
    drawn = np.random.default_rng(seed).choice(256, (count, SIDE, SIDE, 3), p=p)
    return drawn.astype(np.uint8), float(-(p * np.log2(np.maximum(p, 1e-300))).sum()), float(-np.log2(p[drawn]).mean())


def without_learned_variance(pipe, kind: str):
    """The same model with one of the fixed variances."""
    config = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    return replace_components(pipe, scheduler=SfumatoDDPMScheduler(**{**config, "variance_type": kind}))


def run_benchmark() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--out", default="benchmarks/results/likelihood.json")
    options = parser.parse_args()
    data = FOLDER / "pictures"
    if not data.exists():
        data.mkdir(parents=True)
        for i, image in enumerate(toy(20_000, seed=1)[0]):
            Image.fromarray(image).save(data / f"{i:05d}.png")
        lines = [json.dumps({"file_name": f"{i:05d}.png", "text": "noise"}) for i in range(20_000)]
        (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    config = FOLDER / "config.yaml"
    blocks = "[DownBlock2D, CrossAttnDownBlock2D]"
    config.write_text(
        f"output_dir: {FOLDER / 'run'}\n"
        f"data: {{name: {data}, resolution: {SIDE}}}\n"
        "text_encoder: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_length: 8, vocab_size: 520}\n"
        "unet: {block_out_channels: [32, 32], layers_per_block: 1, norm_num_groups: 8, attention_head_dim: 4,\n"
        f"  down_block_types: {blocks}, up_block_types: [CrossAttnUpBlock2D, UpBlock2D]}}\n"
        "scheduler: {beta_schedule: cosine, prediction_type: v_prediction, variance_type: learned_range}\n"
        "objective: {importance: false}\n"
        "optim: {lr: 1.0e-3}\n"
        f"train: {{max_minutes: {options.minutes}, batch_size: 64, num_threads: 1, trackers: []}}\n"
        "validation: {every_steps: null}\n"
        "checkpoint: {every_steps: 2000, resume: auto}\n"
    )
    if main([str(config)]):
        raise SystemExit("training failed")
    pipe = SfumatoPipeline.from_pretrained(FOLDER / "run" / "pipeline")
    images, entropy, truth = toy(48, seed=2)
    told = {"entropy": entropy, "truth": truth}
    told["learned"] = bits_per_dim(pipe, images, ["noise"] * len(images))
    told["learned"]["excess"] = told["learned"]["bits/dim"] / truth - 1
    for kind in ("fixed_small", "fixed_large"):
        told[kind] = bits_per_dim(without_learned_variance(pipe, kind), images, ["noise"] * len(images))
        told[kind]["excess"] = told[kind]["bits/dim"] / truth - 1
    for name, row in told.items():
        if isinstance(row, dict):
            row["levels"] = [round(sum(row["levels"][k : k + 111]), 5) for k in range(0, 999, 111)]  # nine sums
            print(name, {key: row[key] for key in ("bits/dim", "excess", "prior", "decoder")})
    print("entropy", entropy, "of these images", truth)
    Path(options.out).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    run_benchmark()
