"""Speed and memory of the training settings, each in a process of its own, one after another in every round.

python -m benchmarks.speed.settings [--config configs/demo.yaml] [--rounds 3] [--steps 12]
        [--out benchmarks/results/settings.json]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Run the benchmark; see above."""
    SETTINGS = {
        "fp32": ["optim.name=adamw"],
        "bf16": ["optim.name=adamw", "train.mixed_precision=bf16"],
        "gradient checkpointing": ["optim.name=adamw", "train.gradient_checkpointing=true"],
        "Muon": ["optim.name=muon"],
        "8-bit AdamW": ["optim.name=adamw_8bit"],
        "batch 64": ["optim.name=adamw", "train.batch_size=64"],
        "batch 64, gradient checkpointing": ["optim.name=adamw", "train.batch_size=64", "train.gradient_checkpointing=true"],
        "compile, block by block": ["optim.name=adamw", "train.compile=regional"],
    }
    CHILD = """
import json, resource, statistics, sys, time
import torch
from sfumato.training import loop
from sfumato.training.config.load import load_config
config = load_config(sys.argv[1], sys.argv[3:])
times, write = [], loop.Log.write
def note(log, entry):
    times.append(time.perf_counter())
    write(log, entry)
loop.Log.write, loop.save, loop.finish = note, lambda run, last: None, lambda run, log: log.close("")
run = loop.prepare(config)
if torch.cuda.is_available():
    torch.cuda.reset_peak_memory_stats()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = time.perf_counter()
loop.train(run)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
if torch.cuda.is_available():
    before, peak = 0, torch.cuda.max_memory_allocated() / 2**20
steps = [b - a for a, b in zip(times[2:], times[3:])]
with open(sys.argv[2], "w") as out:
    json.dump({"step_ms": 1000 * statistics.median(steps), "first_step_s": times[0] - start,
               "mb_of_training": peak - before, "images": config.train.batch_size}, out)
"""

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="benchmarks/results/settings.json")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())

    rounds = {name: [] for name in SETTINGS}
    for number in range(options.rounds):
        for name, overrides in SETTINGS.items():
            if name.startswith("compile") and number:
                continue  # compiling takes minutes: once is enough
            out = root / "out.json"
            fixed = [
                "train.max_minutes=null",
                f"train.max_steps={options.steps}",
                "train.trackers=[]",
                "validation.every_steps=null",
            ]
            fixed += [
                f"output_dir={root / f'{number}-{name}'.replace(' ', '-').replace(',', '')}",
                "checkpoint.every_steps=null",
            ]
            command = [sys.executable, "-c", CHILD, options.config, str(out), *fixed, *overrides]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            if done.returncode:
                print(name, "failed:", done.stderr[-300:])
                continue
            rounds[name].append(json.loads(out.read_text()))
            print(number, name, rounds[name][-1], flush=True)
    table = {
        name: {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        for name, entries in rounds.items()
        if entries
    }
    for entry in table.values():
        entry["images_per_second"] = 1000 * entry["images"] / entry["step_ms"]
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    Path(options.out).write_text(
        json.dumps({"machine": machine, "config": options.config, "table": table, "rounds": rounds}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
