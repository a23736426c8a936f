"""Checkpoints: `step-00001000/` with the training state (safetensors and JSON, no pickle) and a loadable `pipeline/`.

A checkpoint is written beside its place, synced to the disk and renamed into it. `state.json` is written last and holds
the SHA-256 of every other file, so a torn or damaged folder is recognised. Old ones go only after a newer one is whole.
"""

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import CLIPTextModel

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import replaced
from sfumato.pipelines.export import sync, sync_entry
from sfumato.training.config.schema import Config
from sfumato.training.data.prepare import PictureSet
from sfumato.training.engine.ema import EMA, TRACKS

# Settings that a resumed run may change and still end bit for bit as one run.
FREE = ("output_dir", "title", "checkpoint", "validation", "hub")
FREE_KEYS = {"data": ("cache_dir", "max_bad_share"), "train": ("num_workers", "trackers")}


class CannotSave(Exception):
    """A checkpoint could not be written; those before it are untouched."""


@contextmanager
def averaged(ema: EMA, module: torch.nn.Module) -> Iterator[None]:
    """Inside, the trained parameters of `module` are the averaged ones, and it is in evaluation mode."""
    parameters, training = trained(module), [part for part in module.modules() if part.training]
    module.eval()  # no dropout in what is drawn
    raw = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():  # one by one, since sharded tensors know no fused copy
        for parameter, shadow in zip(parameters, ema.shadow_params):
            parameter.copy_(shadow)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, raw):
                parameter.copy_(value)
        for part in training:
            part.training = True


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training changes, in a fixed order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _names(module: torch.nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, gathered where it is sharded (all processes must call)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def _fill(target: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def collect(denoiser: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> dict[str, torch.Tensor]:
    """Raw weights, averaged weights and optimizer state by name, on the CPU; all processes must call."""
    names, parameters = _names(denoiser), trained(denoiser)
    tensors = {f"raw.{name}": _whole(parameter) for name, parameter in zip(names, parameters)}
    tensors |= {f"ema.{name}": _whole(shadow) for name, shadow in zip(names, ema.shadow_params)}
    for length, track in zip(TRACKS, ema.tracks.values()):
        tensors |= {f"track.{length}|{name}": _whole(value) for name, value in zip(names, track)}
    for name, parameter in zip(names, parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}|{key}"] = _whole(torch.as_tensor(value))
    return tensors


def snapshot(output_dir: Path, step: int, module: torch.nn.Module, ema: EMA, main: bool) -> None:
    """Keep the tracks of `ema` as they are at a step, in half precision; all processes must call, the first one writes."""
    half = {
        f"{length}|{name}": _whole(value).half()
        for length, track in zip(TRACKS, ema.tracks.values())
        for name, value in zip(_names(module), track)
    }
    if not main:
        return
    folder = output_dir / "ema"
    try:
        folder.mkdir(exist_ok=True)
        save_file(half, folder / ".new")
        (folder / ".new").replace(folder / f"step-{step:08d}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CannotSave(f"could not save a snapshot in {folder}: {error}; make room and go on") from error


def forget_snapshots(output_dir: Path, step: int) -> None:
    """Remove snapshots of steps past `step`, which are about to be done again, or of an older run."""
    for file in (output_dir / "ema").glob("step-*.safetensors"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether the module's weights are spread over the processes (FSDP2), so that all must take part in reading them."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def shareable(pipe: SfumatoPipeline, denoiser: torch.nn.Module) -> SfumatoPipeline:
    """The pipeline with plain, whole modules, as export and drawing need them; itself where they are so already.

    A copy where the weights are sharded (all processes must call) or where the UNet has a LoRA adapter, whose additions
    are then in the copy's weights.
    """
    if is_sharded(denoiser):
        state = {name: _whole(tensor) for name, tensor in denoiser.state_dict().items()}
        unet = UNet2DConditionModel.from_config(pipe.unet.config)
        text_encoder = CLIPTextModel(pipe.text_encoder.config)
        for name, module in (("unet.", unet), ("text_encoder.", text_encoder)):
            module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
        parts = {"unet": unet, "text_encoder": text_encoder}
        parts = {name: module.to(pipe.vae.device).eval() for name, module in parts.items()}
    elif getattr(pipe.unet, "peft_config", None):
        unet = copy.deepcopy(pipe.unet)
        unet.fuse_lora()
        unet.unload_lora()
        parts = {"unet": unet}
    else:
        return pipe
    return replaced(pipe, **parts)


def save_lora(pipe: SfumatoPipeline, folder: Path) -> None:
    """Write the UNet's LoRA adapter as `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` reads."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(folder, unet_lora_layers=layers)


def save(
    output_dir: Path, tensors: dict[str, torch.Tensor], write: Callable[[Path, Path], object], state: dict, keep: int
) -> Path:
    """Write one checkpoint, then remove all but the `keep` newest.

    Args:
        output_dir: the run folder.
        tensors: from `collect`.
        write: writes the model, its averaged weights, into a folder; is given that, and the name it will have.
        state: what the loop needs to go on, as JSON; `step` names the folder.
        keep: how many checkpoints to keep.

    Raises:
        CannotSave: the disk is full or not writable; nothing half-written stays, older checkpoints are as they were.
    """
    folder = output_dir / "checkpoints" / f"step-{state['step']:08d}"
    new = folder.with_name(f".{folder.name}.new")
    try:
        _clear(folder.parent)
        new.mkdir(parents=True)
        save_file(tensors, new / "state.safetensors")
        write(new, folder)
        files = {str(path.relative_to(new)): _sha256(path) for path in sorted(new.rglob("*")) if path.is_file()}
        body = json.dumps({**state, "files": files})
        (new / "state.json").write_text(json.dumps({**json.loads(body), "sha256": _sha256_of(body)}))
        sync(new)
        if folder.exists():  # damaged, or it would have been resumed from
            _remove(folder)
        new.rename(folder)
        sync_entry(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise CannotSave(
            f"could not save {folder}: {error}. The checkpoints before it are untouched; "
            "make room and go on with checkpoint.resume=auto"
        ) from error
    newer = [path for path in folders(output_dir) if path.name > folder.name]  # passed over on resume, so damaged
    for old in newer + [path for path in folders(output_dir) if path.name <= folder.name][:-keep]:
        _remove(old)
    return folder


def folders(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones too."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step-*") if path.is_dir())


def _remove(folder: Path) -> None:
    """Take a checkpoint out of sight at once, then remove it, so that it is never seen in part."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _clear(folder: Path) -> None:
    """Remove what a crash left half written or half removed."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its hashes; None where it is whole."""
    try:
        state = json.loads((folder / "state.json").read_text())
        expected, files = state.pop("sha256"), dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "state.json is missing, damaged or of an older version"
    if _sha256_of(json.dumps(state)) != expected:
        return "state.json has changed"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            if _sha256(folder / name) != expected:
                return f"{name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


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


def lines(path: Path) -> list[str]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    return path.read_text().split("\n")[:-1] if path.is_file() else []


def last_step(metrics: Path) -> int:
    """The last step that `metrics.jsonl` tells of; 0 for none."""
    whole = lines(metrics)
    return json.loads(whole[-1])["step"] if whole else 0


def raw_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights before averaging, by name, of a checkpoint."""
    tensors = load_file(folder / "state.safetensors")
    return {name.removeprefix("raw."): value for name, value in tensors.items() if name.startswith("raw.")}


def read_state(folder: Path) -> dict:
    """The JSON state of a checkpoint, without the hashes."""
    state = json.loads((folder / "state.json").read_text())
    return {key: value for key, value in state.items() if key not in ("files", "sha256")}


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


def restore(
    folder: Path, denoiser: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, with_moments: bool = True
) -> None:
    """Put a checkpoint's tensors back; the optimizer's not where another optimizer goes on.

    Raises:
        ValueError: the checkpoint is of a model with other parameters.
    """
    tensors = load_file(folder / "state.safetensors")
    names, parameters = _names(denoiser), trained(denoiser)
    if ema.tracks and not any(key.startswith("track.") for key in tensors):
        raise ValueError(f"{folder} has no tracks for ema.snapshot_steps, which must be set from the first step on")
    expected = {f"raw.{name}": parameter.shape for name, parameter in zip(names, parameters)}
    stored = {key: value.shape for key, value in tensors.items() if key.startswith("raw.")}
    if expected != stored:
        odd = sorted(k for k in expected.keys() | stored.keys() if expected.get(k) != stored.get(k))
        raise ValueError(f"{folder} is of another model: {len(odd)} parameters differ, such as {', '.join(odd[:3])}")
    moments = {}
    for key, value in tensors.items():
        if key.startswith("optimizer.") and with_moments:
            name, entry = key.removeprefix("optimizer.").split("|")
            moments.setdefault(name, {})[entry] = value
    with torch.no_grad():
        for name, parameter, shadow in zip(names, parameters, ema.shadow_params):
            _fill(parameter, tensors[f"raw.{name}"])
            _fill(shadow, tensors[f"ema.{name}"])
            for length, track in zip(TRACKS, ema.tracks.values()):
                _fill(track[names.index(name)], tensors[f"track.{length}|{name}"])
            for entry, value in moments.get(name, {}).items():
                if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                    value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
                optimizer.state[parameter][entry] = value.to(parameter.device)
