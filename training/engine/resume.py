"""Which checkpoint a run resumes from, and what differs between the run that wrote it and this one."""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sfumato.files import read_lines
from sfumato.training.config.load import default_config, settings_of
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import ArraySet, hash_content
from sfumato.training.engine.checkpoints import find_damage, list_checkpoints

# Settings that a resumed run may change and still end bit for bit like a single run.
FREE_SECTIONS = ("output_dir", "title", "checkpoint", "validation", "hub")
FREE_KEYS = {"data": ("cache_dir", "max_bad_share"), "train": ("num_workers", "trackers", "patience", "webhook")}


@dataclass(frozen=True)
class Change:
    """One difference between the run that wrote a checkpoint and the one that resumes from it.

    Attributes:
        key: of the config, dotted; or `data`, `num_processes`, `device`, `precision`, `frozen weights`.
        before, after: its values.
    """

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} before, {self.after!r} now"

    def is_in(self, *places: str) -> bool:
        """Whether its key is one of `places`, or in a section that one of them names with a dot at its end."""
        return any(self.key.startswith(place) if place.endswith(".") else self.key == place for place in places)

    @property
    def is_for_the_card(self) -> bool:
        """Whether readers of a model card should know about it; nothing with paths of this machine."""
        return self.is_in("objective.", "optim.", "train.", "ema.", "scheduler.", "seed", "precision")

    @property
    def undoes_a_result(self) -> bool:
        """Whether a run that is already done can no longer take it."""
        return self.is_in("data", "data.random_flip", "objective.", "optim.", "scheduler.", "unet.", "seed")


def find_checkpoint(resume: str | None, output_dir: Path, every_steps: int | None = None) -> Path | None:
    """The checkpoint to resume from; None for a fresh run.

    `auto` takes the newest intact checkpoint and names the damaged ones that it skips. A run that ended before its
    first checkpoint was due (at step `every_steps`) starts again.

    Raises:
        ValueError: a resume was asked for and is impossible, or a fresh run would overwrite an old one.
    """
    existing = list_checkpoints(output_dir)
    if resume is None:
        if existing:
            raise ValueError(
                f"{output_dir} already holds a run up to {existing[-1].name}; go on with checkpoint.resume=auto, "
                "or choose another output_dir"
            )
        return None
    if resume == "auto":
        faults = []
        for folder in reversed(existing):
            fault = find_damage(folder)
            if fault is None:
                for text in faults:
                    warnings.warn(f"skipped {text}; resuming from {folder.name}", stacklevel=2)
                return folder
            faults.append(f"{folder}: {fault}")
        if faults:
            raise ValueError(f"no checkpoint of {output_dir} is intact: {'; '.join(faults)}")
        if every_steps is not None and (steps := last_step(output_dir / "metrics.jsonl")) > every_steps:
            raise ValueError(
                f"{output_dir} holds a run of {steps} steps but no checkpoint; remove it or choose another output_dir"
            )
        return None
    if fault := find_damage(Path(resume)):
        raise ValueError(f"checkpoint.resume={resume!r} is not a complete checkpoint: {fault}")
    if existing and existing[-1].name > Path(resume).name:
        raise ValueError(
            f"{output_dir} holds checkpoints newer than {resume}, up to {existing[-1].name}, and going back would lose them; "
            "choose another output_dir, or remove them first"
        )
    return Path(resume)


def last_step(metrics: Path) -> int:
    """The last step in `metrics.jsonl`; 0 for none."""
    whole = read_lines(metrics)
    return json.loads(whole[-1])["step"] if whole else 0


def origin_of(config: Config, accelerator: Accelerator, images: ArraySet, parts: tuple[torch.nn.Module, ...]) -> dict:
    """What the results of a run depend on besides its checkpoint; stored in it for comparison on resume."""
    settings = {key: value for key, value in settings_of(config).items() if key not in FREE_SECTIONS}
    for section, keys in FREE_KEYS.items():
        settings[section] = {key: value for key, value in settings[section].items() if key not in keys}
    frozen = hashlib.sha256()
    for module in parts:
        for parameter in module.parameters():
            if not parameter.requires_grad:
                frozen.update(parameter.detach().cpu().float().numpy().tobytes())
    return {
        "config": settings,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "data": images.fingerprint,
        "frozen weights": frozen.hexdigest()[:16],
    }


def find_changes(stored: dict, now: dict) -> list[Change]:
    """What differs between two results of `origin_of`, sorted by key."""
    # Through JSON, as the stored one went, so that a tuple equals its list.
    before, after = flat({k: stored.get(k) for k in now}), flat(json.loads(json.dumps(now)))
    # A setting that a later version added had its default value then, and so has one that is left out.
    default = flat(json.loads(json.dumps({"config": asdict(default_config())})))
    default = {key: default[key] for key in (before.keys() | after.keys()) & default.keys()}
    before, after = {**default, **before}, {**default, **after}
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [Change(key.removeprefix("config."), before.get(key), after.get(key)) for key in changed]


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dicts as one dict with dotted keys."""
    rows = {}
    for key, value in values.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def consequences(changes: list[Change], config: Config) -> list[str]:
    """What the changes mean for the result, in sentences."""
    places = ["seed", "data.buckets"]
    # Noise levels depend on the losses seen before; a block of one size is as long as all processes read at once.
    if config.objective.importance or config.data.buckets:
        places += ["num_processes", "train.batch_size"]
    lines = []
    if any(change.is_in("optim.name") for change in changes):
        lines.append("so the optimizer's moments begin again")
    if any(change.is_in("data") for change in changes):
        lines.append("so the result is not that of one run: the images are different, and in another order")
    elif any(change.is_in(*places) for change in changes):
        lines.append("so the result is not that of one run: the images come in another order")
    elif changes:
        lines.append(
            "so the result is not bit for bit that of one run. Still exact: weights, averages, the moments of the same "
            "optimizer, and that each image, its noise and noise level come once and in the same order"
        )
    return lines


def adopt_older_data(stored: dict, images: ArraySet, cache_dir: str) -> None:
    """Accept a checkpoint from before 0.2 if the data that it names, still in the cache, are byte for byte the same.

    Such checkpoints name their data by a hash of settings and source code, which says nothing about the bytes. Changes
    `stored`.
    """
    name = str(stored.get("data"))
    folder = Path(cache_dir).expanduser() / name
    if "-" not in name or not (folder / "report.json").is_file():
        return
    if hash_content(folder) == images.fingerprint:
        warnings.warn(
            f"the data of this run were prepared by an earlier version, as {name}; the bytes are the same, so it continues",
            stacklevel=2,
        )
        stored["data"] = images.fingerprint
