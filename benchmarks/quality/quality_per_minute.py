"""Quality against minutes of training and against images seen: ours and rival recipes, same network, data and cores.

    python -m benchmarks.quality.quality_per_minute [--ours 2 4 6 10] [--rivals diffusers=60 edm=20 ...] [--seeds 3]
        [--out FILE.json]

Ours is `configs/demo.yaml`, trained from scratch for each number of minutes, since its rate falls to zero at its end; the
rivals are those of `baseline_diffusers_recipe.py`, one run each, measured on the way. Each trains in one thread; as many run
at once as there are cores, ours alternating with the rivals. All draw the training captions in 12 steps (DPM-Solver++; EDM
with Heun's method) at scales 1 and 1.5, of which the better one by FD is kept. Rivals' minutes are CPU minutes of training,
ours are wall-clock minutes.
Rows go one by one to runs/quality_per_minute.jsonl, which starts as a copy of the committed ones; runs in it are not repeated.
("ours, by AdamW" is the earlier demo; "edm, our embeddings" is the baseline's script with `--embedding-std 0.5`.)
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.common.chart import lines
from benchmarks.common.measure import Yardstick, begin, judged, rows, train
from benchmarks.quality.baseline_diffusers_recipe import RECIPES
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare

ROWS = Path("runs/quality_per_minute.jsonl")


def have(**wanted) -> bool:
    return any(all(row[key] == value for key, value in wanted.items()) for row in rows(ROWS))


def call(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def ours(minutes: float, seed: int) -> None:
    """Train for this many minutes and judge the result, in separate processes."""
    if not have(recipe="ours", minutes=minutes, seed=seed):
        folder = f"runs/quality/ours-{minutes:g}-{seed}"
        train(folder, f"train.max_minutes={minutes}", f"seed={seed}")
        call("benchmarks.quality.quality_per_minute", "--judge", folder, "--seed", str(seed), "--ours", str(minutes))


def judge(folder: str, minutes: float, seed: int) -> None:
    """Write the figures of one of our runs as a row."""
    torch.set_num_threads(1)
    row = {"recipe": "ours", "seed": seed, "minutes": minutes} | judged(folder)
    print(row, flush=True)
    with open(ROWS, "a") as file:
        file.write(json.dumps(row) + "\n")


def rival(recipe: str, minutes: float, seed: int) -> None:
    if not have(recipe=recipe, minutes=minutes, seed=seed):
        of_run = ("--recipe", recipe, "--minutes", str(minutes), "--seed", str(seed), "--out", str(ROWS))
        call("benchmarks.quality.baseline_diffusers_recipe", *of_run)


def summary() -> dict:
    """For each figure, where ours first is as good as a rival at its end, and as at its best mark."""
    table, told = rows(ROWS), {}
    for recipe in dict.fromkeys(row["recipe"] for row in table if row["recipe"] != "ours"):
        own = [row for row in table if row["recipe"] == recipe]
        marks = {time: [row for row in own if row["minutes"] == time] for time in sorted({row["minutes"] for row in own})}
        minutes, ends = list(marks.items())[-1]
        told[recipe] = {"minutes": minutes, "pictures": sum(row["pictures"] for row in ends) // len(ends), "seeds": len(ends)}
        for name, sign in (("FD", 1), ("KID", 1), ("distance", 1), ("retrieval", -1)):
            if name == "retrieval" and len({row.get("judge") for row in table if row["recipe"] in ("ours", recipe)}) > 1:
                continue  # judges trained by different code differ
            means = [sum(row[name] for row in mark) / len(mark) for mark in marks.values()]
            best = min(means, key=lambda value: sign * value)
            told[recipe][name] = {"at its end": means[-1], "ours is there after": reached(name, sign, means[-1])}
            told[recipe][name] |= {"at its best": best, "ours is as good after": reached(name, sign, best)}
    return told


def reached(name: str, sign: int, bar: float) -> dict | None:
    """Minutes and images after which the mean of our runs is as good as a bar; None if never."""
    mine = [row for row in rows(ROWS) if row["recipe"] == "ours"]
    for time in sorted({row["minutes"] for row in mine}):
        runs = [row for row in mine if row["minutes"] == time]
        if sign * sum(row[name] for row in runs) / len(runs) <= sign * bar:
            return {"minutes": time, "pictures": sum(row["pictures"] for row in runs) // len(runs)}
    return None


def rival_minutes(text: str) -> tuple[str, float]:
    """`edm=20` as a recipe and its minutes."""
    name, _, minutes = text.partition("=")
    if name not in RECIPES:
        raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(RECIPES)}")
    return name, float(minutes)


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=float, nargs="*", default=[2, 4, 6, 10])
    usual = [("diffusers", 60.0), *((name, 20.0) for name in RECIPES[1:])]
    parser.add_argument("--rivals", nargs="*", type=rival_minutes, default=usual, metavar="RECIPE=MINUTES")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="benchmarks/results/quality_per_minute.json")
    parser.add_argument("--judge", help="only measure this run of ours")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin(ROWS, json.loads(Path("benchmarks/results/quality_per_minute.json").read_text())["rows"])
    if options.judge:
        judge(options.judge, options.ours[0], options.seed)
        sys.exit()
    config = load_config("configs/demo.yaml")
    Yardstick(prepare(config.data), config.data.cache_dir)  # once, before several threads need it
    # Drop the rows of rivals that were cut short.
    whole = {"ours": None, **dict(options.rivals)}
    kept = [
        row
        for row in rows(ROWS)
        if whole.get(row["recipe"]) is None or have(recipe=row["recipe"], minutes=whole[row["recipe"]], seed=row["seed"])
    ]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in kept))
    jobs = []
    for seed in range(options.seeds):
        jobs += [(rival, name, minutes, seed) for name, minutes in options.rivals]
        jobs += [(ours, minutes, seed) for minutes in options.ours]
    jobs = [job for pair in zip(jobs[::2], reversed(jobs[1::2])) for job in pair] + jobs[2 * (len(jobs) // 2) :]
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(function, *arguments) for function, *arguments in jobs]:
            done.result()
    told = {"reached": summary(), "threads": 1, "rows": rows(ROWS)}
    Path(options.out).write_text(json.dumps(told, indent=1) + "\n")
    for name, axis in (("minutes", "minutes of training, one thread"), ("pictures", "images seen")):
        curves = {}
        for row in sorted(rows(ROWS), key=lambda row: row[name]):
            curves.setdefault(f"{row['recipe']}, seed {row['seed']}", []).append((row[name], row["FD"]))
        lines(curves, axis, "FD", Path(options.out).with_name(f"quality_per_{name.rstrip('s')}.png"), log=True)
    print(json.dumps(told["reached"], indent=1))


if __name__ == "__main__":
    main()
