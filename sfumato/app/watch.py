"""The runs of a folder, read only from their files, and the requests that can be made to them."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image

from sfumato.figures import cell, open_image
from sfumato.files import read_lines
from sfumato.training.engine import requests

POINTS = 400  # of a curve, at most
CHECKS = 60  # validations of a curve, each with one error per band
SAMPLES = 60  # grids that are read


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run.

    Attributes:
        trains: whether a trainer holds its lock.
        step, seconds, done: from the last line of its metrics; `done` is a fraction.
        images_per_second: over the last lines of its metrics.
        losses, rates: `(step, loss)` and `(step, learning rate)`, thinned out evenly.
        held_out: `(step, error on held-out images)`.
        bands: the same by noise level, `(step, error, log-SNR)`, the last such as `-2 to 0`.
    """

    name: str
    trains: bool
    finished: bool
    step: int
    seconds: float
    done: float
    images_per_second: float
    losses: list[tuple[int, float]]
    rates: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    bands: list[tuple[int, float, str]]

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the fraction done; None before anything is, and for a run that is not training."""
        return self.seconds * (1 - self.done) / self.done if self.trains and self.done > 0 else None


def list_runs(folder: Path) -> list[str]:
    """The names of the run folders, the most recently changed first."""
    found = [path.parent for path in folder.glob("*/config.yaml")]
    return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def place_of(folder: Path, name: str) -> Path:
    """The folder of a run.

    Raises:
        ValueError: no run of this name is in `folder` itself.
    """
    if name not in list_runs(folder):
        raise ValueError(f"there is no run {name!r} in {folder}")
    return folder / name


def read_run(folder: Path, name: str) -> RunState:
    """See `RunState`."""
    run = place_of(folder, name)
    written = read_lines(run / "metrics.jsonl")
    checks = [json.loads(line) for line in read_lines(run / "validation.jsonl")]
    recent = [json.loads(line) for line in written[-20:]]
    last = recent[-1] if recent else {}
    images = recent[-1]["images_seen"] - recent[0]["images_seen"] if len(recent) > 1 else 0
    took = recent[-1]["seconds"] - recent[0]["seconds"] if len(recent) > 1 else 0.0
    thin = [json.loads(line) for line in written[:: -(-len(written) // POINTS) or 1]]
    checks = checks[:: -(-len(checks) // CHECKS) or 1]
    return RunState(
        name=name,
        trains=is_training(run),
        finished=(run / "finished.json").exists(),
        step=last.get("step", 0),
        seconds=last.get("seconds", 0.0),
        done=min(last.get("done", 0.0), 1.0),
        images_per_second=images / took if took else 0.0,
        losses=[(line["step"], line["loss"]) for line in thin if line["loss"] is not None],
        rates=[(line["step"], line["lr"]) for line in thin if "lr" in line],
        held_out=[(line["step"], line["held_out_loss"]) for line in checks if line.get("held_out_loss") is not None],
        bands=[
            (line["step"], error, name.removeprefix("held_out_loss "))
            for line in checks
            for name, error in line.items()
            if name.startswith("held_out_loss ") and error is not None
        ],
    )


def is_training(run: Path) -> bool:
    """Whether a trainer holds the run's lock, which the system releases when the trainer dies."""
    if not (run / ".lock").exists():
        return False
    try:
        with FileLock(run / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def samples(folder: Path, name: str, number: int | None = None) -> list[tuple[Image.Image, str]]:
    """The images at one position in a run's grids, or the whole grids, with their steps; newest first, at most `SAMPLES`."""
    found = []
    for path in _sheets(folder, name)[:SAMPLES]:
        with open_image(path) as file:
            captions, sheet = _captions(file), file.convert("RGB")
        if number is None:
            found.append((sheet, path.stem))
        elif number < len(captions):
            found.append((cell(sheet, number, len(captions)), path.stem))
    return found


def sampled_prompts(folder: Path, name: str) -> list[str]:
    """The captions of a run's newest grid of samples, in their order."""
    for path in _sheets(folder, name)[:1]:
        with open_image(path) as file:
            return _captions(file)
    return []


def newest_sheet(folder: Path, name: str) -> str | None:
    """The name of the newest grid of samples; None before the first."""
    return next((path.name for path in _sheets(folder, name)), None)


def _sheets(folder: Path, name: str) -> list[Path]:
    return sorted((place_of(folder, name) / "samples").glob("step-*.png"), reverse=True)


def _captions(file: Image.Image) -> list[str]:
    """The captions of a grid that the trainer wrote; none if it was written before they were stored."""
    try:
        captions = json.loads(file.info.get("captions", "[]"))
    except (ValueError, TypeError):
        return []
    return [str(caption) for caption in captions] if isinstance(captions, list) else []


def ask(folder: Path, name: str, kind: str) -> None:
    """Ask a run that is training to `stop`, `save` or `sample`.

    Raises:
        ValueError: no such run, it is not training, or `kind` is none of these.
    """
    run = place_of(folder, name)
    if not is_training(run):
        raise ValueError(f"{name} is not training")
    requests.ask(run, kind)


def resume(folder: Path, name: str) -> subprocess.Popen:
    """Restart the trainer of a run in a separate process, which writes to the run's `app.log`.

    Raises:
        ValueError: no such run, it is already training, or it was trained by several processes.
    """
    run = place_of(folder, name)
    if is_training(run):
        raise ValueError(f"{name} is already training")
    states = sorted(run.glob("checkpoints/step-*/state.json"))
    if states and json.loads(states[-1].read_text()).get("num_processes", 1) > 1:
        raise ValueError(f"{name} was trained by several processes: go on with accelerate launch and checkpoint.resume=auto")
    settings = [f"output_dir={run}", "checkpoint.resume=auto"]
    command = [sys.executable, "-m", "sfumato", "train", str(run / "config.yaml"), *settings]
    return start_apart(command, run)


def start_apart(command: list[str], run: Path) -> subprocess.Popen:
    """Start a program that outlives this one; its output is appended to the run's `app.log`."""
    with open(run / "app.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
