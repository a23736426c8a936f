"""The recipe of `configs/demo.yaml`, one change at a time, several seeds, in one table.

    python -m benchmarks.quality.recipe [--steps 1300] [--seeds 2] [--only NAME ...] [--out benchmarks/results/recipe.json]

Each round changed `demo.yaml` as it was at the time: the first one `BEFORE`; the second one the winner of the first
("normal(-1, 2), dropout 0.05", with `ADAMW`); the third one the optimizer; the fourth one, whose rows begin with "Muon,", the
winner of the third, "demo, Muon, kernels too, rate 2e-3". "Muon, rate trapezoid" is `demo.yaml` now.
Each variant trains on the same number of images, `--steps` of batch 16, in one thread; those that change the batch size take
correspondingly more or fewer steps. FD, KID, retrieval and distance are those of `measure.py`; the seconds of training show
what costs time. Rows go to runs/recipe.jsonl, which starts as a copy of the committed ones; rows in it are not repeated.
(The rows "demo, optimizer Muon", torch's for matrices only, "demo, Muon, kernels only", "demo, Muon, four steps" of
Newton-Schulz and "demo, SOAP", pytorch_optimizer's with eigenbases up to 256 every 10 steps, come from code that is gone.)
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common.measure import Yardstick, begin, judged, rows, train
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.models.text import build_text_encoder
from sfumato.training.quality.judge import look

COSINE = ["optim.lr_decay=cosine"]
ADAMW = ["optim.name=adamw", "optim.lr=1e-3", *COSINE]
BEFORE = [*ADAMW, "objective.log_snr_std=3", "objective.caption_dropout=0.1"]
FIRST = {
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
SECOND = {
    "demo, captions with colours": ["data.colours=true"],
    "demo, contrastive warm-up": ["text_encoder.pretrained=runs/recipe/warm-{seed}", "text_encoder.train=true"],
    "demo, levels normal(-2, 2)": ["objective.log_snr_mean=-2"],
    "demo, levels normal(-1, 1.5)": ["objective.log_snr_std=1.5"],
    "demo, weight floor 1": ["objective.min_snr_floor=1"],
    "demo, immiscible, 8": ["objective.noise_candidates=8"],
    "demo, flips": ["data.random_flip=true"],
    "demo, rate 2e-3": ["optim.lr=2e-3"],
    "demo, text layers 2": ["text_encoder.num_hidden_layers=2"],
    "demo, width 24 to 96": ["unet.block_out_channels=[24, 48, 64, 96]"],
    "demo, two layers a block": ["unet.layers_per_block=2"],
    "demo, batch 8": ["train.batch_size=8"],
    "demo, batch 4": ["train.batch_size=4"],
    "demo, dropout 0.02": ["objective.caption_dropout=0.02"],
}
THIRD = {
    "demo, Muon, kernels too": ["optim.lr=1e-3"],
    "demo, Muon, kernels too, rate 2e-3": [],
    "demo, Muon, kernels too, rate 4e-3": ["optim.lr=4e-3"],
    "demo, Muon, kernels too, rate 2e-3, batch 32": ["train.batch_size=32"],
    "demo, Muon, kernels too, rate 2e-3, batch 8": ["train.batch_size=8"],
    "demo, Muon, kernels too, rate 2e-3, width 24 to 96": ["unet.block_out_channels=[24, 48, 64, 96]"],
    "demo, Muon, kernels too, rate 2e-3, two layers a block": ["unet.layers_per_block=2"],
}
FOURTH = {
    "Muon, target v": ["scheduler.prediction_type=v_prediction"],
    "Muon, target eps": ["scheduler.prediction_type=epsilon"],
    "Muon, levels uniform": ["objective.timesteps=uniform", "objective.log_snr_mean=0", "objective.log_snr_std=2"],
    "Muon, levels laplace": ["objective.timesteps=laplace"],
    "Muon, weight soft min-SNR": ["objective.weight=soft_min_snr", "objective.min_snr_floor=0"],
    "Muon, weight P2": ["objective.weight=p2", "objective.min_snr_floor=0"],
    "Muon, weight EDM": ["objective.weight=edm", "objective.min_snr_floor=0"],
    "Muon, schedule linear": ["scheduler.beta_schedule=linear"],
    "Muon, rate falls linearly": ["optim.lr_decay=linear"],
    "Muon, rate constant": ["optim.lr_decay=constant"],
    "Muon, rate trapezoid": ["optim.lr_decay=trapezoid"],
    "Muon, EMA 0.9995": ["ema.decay=0.9995"],
    "Muon, immiscible, 8": ["objective.noise_candidates=8"],
    "Muon, offset noise 0.1": ["objective.offset_noise=0.1"],
    "Muon, text embeddings 0.02": ["text_encoder.embedding_std=0.02"],
}
VARIANTS = {name: [*BEFORE, *settings] for name, settings in FIRST.items()}
VARIANTS |= {name: [*ADAMW, *settings] for name, settings in SECOND.items()}
VARIANTS |= {name: [*COSINE, *settings] for name, settings in (THIRD | FOURTH).items()}
ROWS = Path("runs/recipe.jsonl")


def warm_up(folder: Path, seed: int, steps: int = 300, batch_size: int = 64) -> None:
    """Train the demo's text encoder to tell which training image a caption describes (Radford et al. 2021), and save it."""
    config = load_config("configs/demo.yaml")
    images = prepare(config.data)
    torch.manual_seed(seed)
    rng, train = np.random.default_rng(seed), images.select("train")
    tokenizer, encoder = build_text_encoder(config.text_encoder, images.training_captions())
    seen = look(np.stack([images.image(int(i)) for i in train]))
    seen = (seen - seen.mean(0)) / (seen.std(0) + 1e-3)
    image = torch.nn.Linear(seen.shape[1], config.text_encoder.hidden_size)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *image.parameters()], lr=1e-3)
    for _ in range(steps):
        chosen = rng.choice(len(train), batch_size, replace=False)
        captions = [rng.choice(images[int(i)]["captions"]) for i in train[chosen]]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noisy = seen[chosen] + 0.5 * torch.randn(batch_size, seen.shape[1])
        told, shown = (F.normalize(x, dim=-1) for x in (encoder(ids).pooler_output, image(noisy)))
        scores, own = 10 * told @ shown.T, torch.arange(batch_size)
        ((F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    print("warm-up: correct", (scores.argmax(1) == own).float().mean().item())
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(name: str, seed: int, steps: int) -> None:
    """Train and judge one variant, unless its row exists."""
    batch = next((int(s.split("=")[1]) for s in VARIANTS[name] if s.startswith("train.batch_size=")), 16)
    steps = steps * 16 // batch
    if any((row["name"], row["seed"], row["steps"]) == (name, seed, steps) for row in rows(ROWS)):
        return
    folder = f"runs/recipe/{name.replace(' ', '_').replace(',', '')}-{seed}"
    settings = [setting.format(seed=seed) for setting in VARIANTS[name]]
    train(folder, *settings, "train.max_minutes=null", f"train.max_steps={steps}", f"seed={seed}")
    row = {"name": name, "seed": seed, "steps": steps, "settings": settings, **judged(folder)}
    print(row, flush=True)
    with open(ROWS, "a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="benchmarks/results/recipe.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin(ROWS, json.loads(Path("benchmarks/results/recipe.json").read_text()))
    config = load_config("configs/demo.yaml")
    Yardstick(prepare(config.data), config.data.cache_dir)  # once, before several threads need it
    for seed in range(options.seeds):
        warm = Path(f"runs/recipe/warm-{seed}")
        if "demo, contrastive warm-up" in options.only and not warm.exists():
            warm_up(warm, seed)  # before there are threads, which share torch's random state
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(run, name, seed, options.steps) for seed in range(options.seeds) for name in options.only]
        for job in jobs:
            job.result()
    Path(options.out).write_text(json.dumps(rows(ROWS), indent=1) + "\n")
    table = {}
    for row in rows(ROWS):
        if row["pictures"] == options.steps * 16:
            table.setdefault(row["name"], []).append(row)
    for name, found in sorted(table.items(), key=lambda item: sum(row["FD"] for row in item[1]) / len(item[1])):
        cells = [f"{row['FD']:.1f} / {row['distance']:.2f} / {row['retrieval']:.1%}" for row in found]
        print(f"| {name} | {' | '.join(cells)} | {sum(row['seconds'] for row in found) // len(found)} s |")


if __name__ == "__main__":
    main()
