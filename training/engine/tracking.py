"""What a run shows and keeps: progress bar, `metrics.jsonl`, sample grids."""

import json
import math
import os
import statistics
from collections import deque
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import is_tensorboard_available
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from sfumato.figures import grid
from sfumato.files import read_lines
from sfumato.training.config.load import dump_config
from sfumato.training.config.schema import Config
from sfumato.training.publish.facts import without_secrets


def find_trackers(config: Config) -> list[str]:
    """The trackers of `train.trackers`; if not set, TensorBoard if it is installed.

    Raises:
        ValueError: a tracker that Accelerate does not know, or whose package is not installed.
    """
    if config.train.trackers is None:
        return ["tensorboard"] if is_tensorboard_available() else []
    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in config.train.trackers:
        if name not in installed:
            raise ValueError(f"train.trackers: {name!r} is not installed; installed are {', '.join(installed) or 'none'}")
    return list(config.train.trackers)


def finite(entry: dict) -> dict:
    """The same entry with None for values that are not finite, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}


class SlowWatch:
    """Tells once when steps have become far slower than the first ones, from which all estimates were made."""

    FIRST, RECENT, FACTOR, LEAST_SECONDS = 10, 20, 3, 60

    def __init__(self):
        self.last, self.first, self.recent, self.told = None, [], deque(maxlen=self.RECENT), False

    def look(self, seconds: float) -> str | None:
        """What to say, if anything, at the end of a step, after `seconds` of training."""
        took, self.last = seconds - (self.last if self.last is not None else seconds), seconds
        if len(self.first) < self.FIRST:
            if took > 0:  # not the very first, which also warms up
                self.first.append(took)
            return None
        self.recent.append(took)
        now, before = statistics.median(self.recent), statistics.median(self.first)
        if self.told or now < self.FACTOR * before or sum(self.recent) < self.LEAST_SECONDS:
            return None
        self.told = True
        return f"a step takes {now:.1f} s, {now / before:.0f} times as long as at first ({before:.2g} s): is the machine busy?"


def seconds_waited() -> float:
    """Total time that this process's current threads have waited for a core, as Linux counts it; elsewhere 0."""
    waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(path.read_text().split()[1])
        except (OSError, ValueError, IndexError):  # a thread that has just ended
            continue
    return waited / 1e9


class Outlook:
    """Says once, half a minute into a run, what its speed means: that other programs use the cores, or that a run limited by
    minutes will make few steps.
    """

    AFTER, SHARE, ENOUGH = 30.0, 0.2, 1000

    def __init__(self, config: Config, on_cpu: bool):
        alone = on_cpu and not config.train.num_workers  # its own workers would be taken for other programs
        self.config, self.threads = config, torch.get_num_threads() if alone else 0
        self.start: tuple[float, float, int] | None = None
        self.done = False

    def look(self, seconds: float, step: int) -> list[str]:
        """What to say, if anything, after a step, at `seconds` of training."""
        if self.done:
            return []
        if self.start is None:
            self.start = (seconds_waited(), seconds, step)
        before, seconds_then, step_then = self.start
        trained, steps = seconds - seconds_then, step - step_then
        if trained < self.AFTER or steps < 5:
            return []
        self.done = True
        lines = []
        waited = seconds_waited() - before
        if self.threads > 1 and waited > self.SHARE * trained * self.threads:
            lines.append(
                f"other programs use these cores: of {trained:.0f} s the {self.threads} threads waited"
                f" {waited / self.threads:.0f} s for one. One thread is often several times as fast then:"
                " Ctrl-C, and go on with train.num_threads=1 checkpoint.resume=auto"
            )
        minutes = self.config.train.max_minutes
        total = step + (60 * minutes - seconds) * steps / trained if minutes else math.inf
        if total < min(self.ENOUGH, self.config.train.max_steps or self.ENOUGH):
            lines.append(
                f"at this speed the run makes about {total:.0f} steps in its {minutes:g} minutes; images need some"
                f" {self.ENOUGH:,}: raise train.max_minutes"
            )
        return lines


class Log:
    """`metrics.jsonl`, the progress bar and the sample grids; silent on all processes but the first."""

    def __init__(self, config: Config, accelerator: Accelerator, step: int):
        self.config, self.accelerator = config, accelerator
        self.main, self.folder = accelerator.is_main_process, Path(config.output_dir)
        self.bar = tqdm(
            total=1.0,
            disable=not self.main,
            miniters=1e-9,  # otherwise the bar of a resumed run, which jumps at first, would not be seen to move
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        # Trackers take flat scalars and texts.
        settings = {"config": dump_config(without_secrets(config))} if accelerator.log_with else None
        # A resumed run continues on the same page of the tracker.
        name = "-".join(self.folder.resolve().parts[-2:])
        named = {"trackio": {"name": name, "resume": "allow" if step else "never"}}
        accelerator.init_trackers("sfumato", settings, named)
        if not self.main:
            return
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        for path in (self.folder / "validation.jsonl", self.folder / "metrics.jsonl"):
            # Lines after the checkpoint belong to steps that are about to be repeated; a torn last line is removed too.
            kept = path.with_name(f"{path.name}.new")
            kept.write_text("".join(line + "\n" for line in read_lines(path) if json.loads(line)["step"] <= step))
            kept.replace(path)
        self.file = open(self.folder / "metrics.jsonl", "a", buffering=1)
        self.smooth = None
        self.slow = SlowWatch()
        self.outlook = Outlook(config, accelerator.device.type == "cpu")

    def write(self, entry: dict) -> None:
        """One step's figures: a line of JSON (null for what is not finite) and the progress bar."""
        if not self.main:
            return
        entry = finite(entry)
        self.file.write(json.dumps(entry) + "\n")
        if self.accelerator.trackers:
            values = ("loss", "lr", "grad_norm", "images_seen", "skipped_steps")
            self.accelerator.log({key: entry[key] for key in values if entry[key] is not None}, step=entry["step"])
        if entry["loss"] is not None:
            self.smooth = entry["loss"] if self.smooth is None else 0.98 * self.smooth + 0.02 * entry["loss"]
        self.bar.update(min(entry["done"], 1.0) - self.bar.n)
        told = self.slow.look(entry["seconds"])
        for line in [*([told] if told else []), *self.outlook.look(entry["seconds"], entry["step"])]:
            self.say(line)
        rate = entry["images_seen"] / max(entry["seconds"], 1e-9)
        self.bar.set_postfix_str(f"step {entry['step']} loss {self.smooth or math.nan:.4f} {rate:.0f} images/s", refresh=False)

    def write_validation(self, entry: dict) -> None:
        """Record what was measured on held-out data: in `validation.jsonl`, in the trackers, and as a line to read."""
        if not self.main:
            return
        path, entry = self.folder / "validation.jsonl", finite(entry)
        rows = [
            line for line in read_lines(path) if json.loads(line)["step"] < entry["step"]
        ]  # not those of an earlier end of the run
        new = path.with_name("validation.jsonl.new")
        new.write_text("".join(line + "\n" for line in [*rows, json.dumps(entry)]))
        new.replace(path)
        if self.accelerator.trackers:
            progress_keys = ("step", "images_seen", "seconds", "skipped_steps")
            values = {key: value for key, value in entry.items() if key not in progress_keys and value is not None}
            self.accelerator.log(values, step=entry["step"])
        name = "held_out_loss" if "held_out_loss" in entry else "training_loss"
        if entry[name] is not None:
            images = "held-out" if name == "held_out_loss" else "training"
            self.say(f"step {entry['step']}: error on {images} images {entry[name]:.4f}")

    def was_validated(self, step: int) -> bool:
        """Whether `validation.jsonl` has a line for this step; for the first process."""
        return any(json.loads(line)["step"] == step for line in read_lines(self.folder / "validation.jsonl"))

    def sync(self) -> None:
        """Force the figures so far to the disk, so that no checkpoint is ahead of them."""
        if self.main:
            os.fsync(self.file.fileno())

    def show(self, step: int, captions: list[str], images: list[Image.Image]) -> None:
        """Save a grid of images with their captions, and pass it to the trackers."""
        if not self.main:
            return
        sheet = grid(images, captions)
        place = self.folder / "samples" / f"step-{step:08d}.png"
        new = place.with_name(f".{place.name}")  # whoever looks while it is written sees the previous one
        about = PngInfo()
        about.add_text("captions", json.dumps(captions))
        sheet.save(new, format="png", pnginfo=about)
        new.replace(place)
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":
                from trackio import Image as Picture

                tracker.log({"samples": Picture(sheet)}, step=step)
            elif hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, **layout)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.main:
            self.bar.write(text)

    def close(self, text: str) -> None:
        """Close the progress bar and print a last line."""
        self.bar.close()
        if self.main:
            self.file.close()
            print(text)
