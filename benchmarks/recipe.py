"""The recipe of `configs/demo.yaml`, one change at a time, several seeds, in one table.

    python benchmarks/recipe.py [--steps 1300] [--seeds 2] [--only NAME ...] [--out benchmarks/results/recipe.json]

Each variant trains for the same number of pictures, `--steps` of batch 16, in one thread; those that change the batch take as
many more or fewer steps. FD, KID, retrieval and distance as in `measure.py`; seconds of training beside, for what costs time.
Rows go to runs/recipe.jsonl; what is there already is not repeated.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measure import Yardstick, judged, rows, train

from sfumato.training import config as configs
from sfumato.training.pictures import prepare

VARIANTS = {
    "base": [],
    "target v": ["scheduler.prediction_type=v_prediction"],
    "levels uniform": ["objective.timesteps=uniform", "objective.log_snr_mean=0", "objective.log_snr_std=2"],
    "levels laplace": ["objective.timesteps=laplace"],
    "levels normal(-1, 2)": ["objective.log_snr_std=2"],
    "levels normal(-2, 3)": ["objective.log_snr_mean=-2"],
    "levels importance": ["objective.importance=true"],
    "levels at random": ["objective.low_discrepancy=false"],
    "weight unit": ["objective.weight=unit", "objective.min_snr_floor=0"],
    "weight soft min-SNR": ["objective.weight=soft_min_snr", "objective.min_snr_floor=0"],
    "weight P2": ["objective.weight=p2", "objective.min_snr_floor=0"],
    "weight EDM": ["objective.weight=edm", "objective.min_snr_floor=0"],
    "weight debiased": ["objective.weight=debiased", "objective.min_snr_floor=0"],
    "weight floor 1": ["objective.min_snr_floor=1"],
    "weight floor 0.2": ["objective.min_snr_floor=0.2"],
    "schedule linear": ["scheduler.beta_schedule=linear"],
    "noise immiscible, 8": ["objective.noise_candidates=8"],
    "noise offset 0.1": ["objective.offset_noise=0.1"],
    "self-conditioning": ["objective.self_conditioning=true"],
    "rate 5e-4": ["optim.lr=5e-4"],
    "rate 2e-3": ["optim.lr=2e-3"],
    "rate 3e-3": ["optim.lr=3e-3"],
    "rate falls linearly": ["optim.lr_decay=linear"],
    "rate constant": ["optim.lr_decay=constant"],
    "optimizer Muon": ["optim.name=muon"],
    "betas 0.9, 0.999": ["optim.betas=[0.9, 0.999]"],
    "EMA 0.99": ["ema.decay=0.99"],
    "EMA 0.9995": ["ema.decay=0.9995"],
    "batch 8": ["train.batch_size=8"],
    "batch 32": ["train.batch_size=32"],
    "batch 32, rate 2e-3": ["train.batch_size=32", "optim.lr=2e-3"],
    "dropout 0.05": ["objective.caption_dropout=0.05"],
    "dropout 0.2": ["objective.caption_dropout=0.2"],
    "normal(-1, 2), dropout 0.05": ["objective.log_snr_std=2", "objective.caption_dropout=0.05"],
    "normal(-1, 2), dropout 0.05, batch 8": [
        "objective.log_snr_std=2",
        "objective.caption_dropout=0.05",
        "train.batch_size=8",
    ],
    "width 24 to 96": ["unet.block_out_channels=[24, 48, 64, 96]"],
    "width 16 to 192": ["unet.block_out_channels=[16, 32, 96, 192]"],
    "two layers a block": ["unet.layers_per_block=2"],
    "text width 256": ["text_encoder.hidden_size=256"],
    "text layers 2": ["text_encoder.num_hidden_layers=2"],
    "text embeddings 0.02": ["text_encoder.embedding_std=0.02"],
    "text embeddings 1": ["text_encoder.embedding_std=1.0"],
    "time embedding 512": ["unet.time_embedding_dim=512"],
    "captions also in Chinese": ["data.languages=[en, zh]"],
    "flips": ["data.random_flip=true"],
}
ROWS = Path("runs/recipe.jsonl")


def run(name: str, seed: int, steps: int) -> None:
    """Train and judge one variant, unless its row is there."""
    batch = next((int(s.split("=")[1]) for s in VARIANTS[name] if s.startswith("train.batch_size=")), 16)
    steps = steps * 16 // batch
    if any((row["name"], row["seed"], row["steps"]) == (name, seed, steps) for row in rows(ROWS)):
        return
    folder = f"runs/recipe/{name.replace(' ', '_').replace(',', '')}-{seed}"
    train(folder, *VARIANTS[name], "train.max_minutes=null", f"train.max_steps={steps}", f"seed={seed}")
    row = {"name": name, "seed": seed, "steps": steps, "settings": VARIANTS[name], **judged(folder)}
    print(row, flush=True)
    with open(ROWS, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="benchmarks/results/recipe.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ROWS.parent.mkdir(exist_ok=True)
    config = configs.load("configs/demo.yaml")
    Yardstick(prepare(config.data), config.data.cache_dir)  # once, before several want it
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(run, name, seed, options.steps) for seed in range(options.seeds) for name in options.only]
        for job in jobs:
            job.result()
    Path(options.out).write_text(json.dumps(rows(ROWS), indent=1) + "\n")
    table = {}
    for row in rows(ROWS):
        table.setdefault(row["name"], []).append(row)
    for name, found in sorted(table.items(), key=lambda item: sum(row["FD"] for row in item[1]) / len(item[1])):
        cells = [f"{row['FD']:.1f} / {row['distance']:.2f} / {row['retrieval']:.1%}" for row in found]
        print(f"| {name} | {' | '.join(cells)} | {sum(row['seconds'] for row in found) // len(found)} s |")
