"""One process against two: the same global batch, the same loss curve; and how soon a launch ends when a process is killed.

python -m benchmarks.speed.processes [--steps 60] [--out benchmarks/results/processes.json]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/shapes.yaml")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="benchmarks/results/processes.json")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    ENV = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    def launch(processes: int, folder: Path, *overrides: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
        command += ["--num_processes", str(processes), "training/train.py", options.config, f"output_dir={folder}"]
        command += ["train.max_minutes=null", "validation.num_judged=2", "train.trackers=[]", *overrides]
        return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    curves = {}
    for processes in (1, 2):
        folder = root / str(processes)
        child = launch(processes, folder, f"train.batch_size={16 // processes}", f"train.max_steps={options.steps}")
        out, _ = child.communicate()
        assert child.returncode == 0, out
        curves[processes] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    apart = [abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(curves[1], curves[2])]

    child = launch(2, root / "killed", "train.max_steps=100000")
    metrics = root / "killed" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < 5:
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.1)
    workers = [p for p in psutil.Process(child.pid).children(recursive=True) if "training/train.py" in " ".join(p.cmdline())]
    victim = next(p for p in workers if p.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    start = time.monotonic()
    child.communicate()
    ended = time.monotonic() - start

    result = {
        "config": options.config,
        "largest_relative_difference": max(apart),
        "mean_relative_difference": sum(apart) / len(apart),
        "seconds_until_the_launch_ends_after_a_process_is_killed": ended,
        "its_exit_code": child.returncode,
        "losses": {processes: [line["loss"] for line in lines] for processes, lines in curves.items()},
    }
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "losses"})


if __name__ == "__main__":
    main()
