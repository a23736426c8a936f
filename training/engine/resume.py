"""From which checkpoint a run goes on, and what differs between the run that wrote it and this one."""

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator

from sfumato.files import lines
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import PictureSet
from sfumato.training.engine.checkpoints import damage, folders

# Settings that a resumed run may change and still end bit for bit as one run.
FREE = ("output_dir", "title", "checkpoint", "validation", "hub")


FREE_KEYS = {"data": ("cache_dir", "max_bad_share"), "train": ("num_workers", "trackers")}


def find(resume: str | None, output_dir: Path, every_steps: int | None = None) -> Path | None:
    """The checkpoint to go on from; None for a fresh run.

    `auto` takes the newest whole checkpoint and names damaged ones that it passes over. A run that ended before its
    first checkpoint was due (at step `every_steps`) begins again.

    Raises:
        ValueError: a resume was asked for and is impossible, or a fresh run would write over an old one.
    """
    found = folders(output_dir)
    if resume is None:
        if found:
            raise ValueError(
                f"{output_dir} already holds a run up to {found[-1].name}; go on with checkpoint.resume=auto, "
                "or choose another output_dir"
            )
        return None
    if resume == "auto":
        faults = []
        for folder in reversed(found):
            fault = damage(folder)
            if fault is None:
                for text in faults:
                    warnings.warn(f"passed over {text}; goes on from {folder.name}", stacklevel=2)
                return folder
            faults.append(f"{folder}: {fault}")
        if faults:
            raise ValueError(f"no checkpoint of {output_dir} is whole: {'; '.join(faults)}")
        if every_steps is not None and (steps := last_step(output_dir / "metrics.jsonl")) > every_steps:
            raise ValueError(
                f"{output_dir} holds a run of {steps} steps but no checkpoint; remove it or choose another output_dir"
            )
        return None
    if fault := damage(Path(resume)):
        raise ValueError(f"checkpoint.resume={resume!r} is no complete checkpoint: {fault}")
    if found and found[-1].name > Path(resume).name:
        raise ValueError(
            f"{output_dir} holds checkpoints newer than {resume}, up to {found[-1].name}, and going back would lose them; "
            "choose another output_dir, or remove them first"
        )
    return Path(resume)


def last_step(metrics: Path) -> int:
    """The last step that `metrics.jsonl` tells of; 0 for none."""
    whole = lines(metrics)
    return json.loads(whole[-1])["step"] if whole else 0


def origin(config: Config, accelerator: Accelerator, pictures: PictureSet, parts: tuple[torch.nn.Module, ...]) -> dict:
    """What the numbers of a run depend on beside its checkpoint; kept there to be compared on resume."""
    settings = {key: value for key, value in asdict(config).items() if key not in FREE}
    for section, keys in FREE_KEYS.items():
        settings[section] = {key: value for key, value in settings[section].items() if key not in keys}
    frozen = hashlib.sha256()
    for module in parts:
        for parameter in module.parameters():
            if not parameter.requires_grad:
                frozen.update(parameter.detach().cpu().float().numpy())
    return {
        "config": settings,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "data": pictures.fingerprint,
        "frozen weights": frozen.hexdigest()[:16],
    }


def differences(stored: dict, now: dict) -> list[str]:
    """What differs between the run that wrote a checkpoint and the one that goes on from it; a line each."""

    def flat(values: dict, prefix: str = "") -> dict:
        rows = {}
        for key, value in values.items():
            rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return rows

    # Through JSON, as the stored one went, so that a tuple equals its list.
    before, after = flat({k: stored.get(k) for k in now}), flat(json.loads(json.dumps(now)))
    # A setting that came with a later version was then what its default says.
    default = flat(json.loads(json.dumps({"config": asdict(Config())})))
    before = {**{key: default[key] for key in after.keys() & default.keys()}, **before}
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    found = [f"{k.removeprefix('config.')}: {before.get(k)!r} before, {after.get(k)!r} now" for k in sorted(changed)]
    order = {"config.seed", "config.data.buckets"}
    if now["config"].get("objective", {}).get("importance"):  # noise levels depend on the losses seen before
        order |= {"num_processes", "config.train.batch_size"}
    if now["config"]["data"]["buckets"]:  # a block of one size is as long as all processes read at once
        order |= {"num_processes", "config.train.batch_size"}
    if "config.optim.name" in changed:
        found.append("so the optimizer's moments begin anew")
    if "data" in changed:
        found.append("so the result is not that of one run: the pictures are others, in another order")
    elif changed & order:
        found.append("so the result is not that of one run: the pictures come in another order")
    elif changed:
        found.append(
            "so the result is not bit for bit that of one run. Still exact: weights, averages, the moments of a same "
            "optimizer, and that each picture, its noise and noise level come once and in the same order"
        )
    return found
