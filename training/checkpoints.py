"""Checkpoints: `step-00001000/` with the training state (safetensors and JSON, no pickle) and a loadable `pipeline/`."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from sfumato.pipelines import SfumatoPipeline, export_pipeline


@contextmanager
def averaged(ema: EMAModel, module: torch.nn.Module) -> Iterator[None]:
    """Inside, the trained parameters of `module` are the averaged ones."""
    parameters = trained(module)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training changes, in a fixed order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _pack(denoiser, optimizer, ema: EMAModel) -> dict[str, torch.Tensor]:
    names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    tensors = {f"raw.{name}": parameter.detach() for name, parameter in zip(names, trained(denoiser))}
    tensors |= {f"ema.{name}": shadow for name, shadow in zip(names, ema.shadow_params)}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    return {key: value.cpu().clone() for key, value in tensors.items()}


def save(
    output_dir: Path, denoiser, optimizer, ema: EMAModel, pipe: SfumatoPipeline, state: dict, facts: dict, keep: int
) -> Path:
    """Write one checkpoint beside and rename it into place, then remove all but the `keep` newest.

    Args:
        output_dir: the run folder.
        denoiser, optimizer, ema: whose tensors are kept.
        pipe: exported with the averaged weights.
        state: what the loop needs to go on, as JSON; `step` names the folder.
        facts: for the model card.
        keep: how many checkpoints to keep.
    """
    folder = output_dir / "checkpoints" / f"step-{state['step']:08d}"
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(_pack(denoiser, optimizer, ema), new / "state.safetensors")
    with averaged(ema, denoiser):
        export_pipeline(pipe, new / "pipeline", facts, where=str(folder / "pipeline"))
    (new / "state.json").write_text(json.dumps({**state, "ema_step": ema.optimization_step}))
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    for old in complete(output_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def complete(output_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first; `state.json` is written last and marks a whole one."""
    return sorted(path.parent for path in (output_dir / "checkpoints").glob("step-*/state.json"))


def find(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to go on from; None for a fresh run.

    Raises:
        ValueError: a resume was asked for and is impossible, or a fresh run would write over an old one.
    """
    found = complete(output_dir)
    if resume is None:
        if found:
            raise ValueError(
                f"{output_dir} already holds a run up to {found[-1].name}; go on with checkpoint.resume=auto, "
                "or choose another output_dir"
            )
        return None
    if resume == "auto":
        if not found and (output_dir / "metrics.jsonl").is_file():
            raise ValueError(
                f"{output_dir} holds a run without any complete checkpoint; remove it or choose another output_dir"
            )
        return found[-1] if found else None
    if not (Path(resume) / "state.json").is_file():
        raise ValueError(f"checkpoint.resume={resume!r} is no complete checkpoint (no state.json in it)")
    if found and found[-1].name > Path(resume).name:
        raise ValueError(
            f"{output_dir} holds checkpoints newer than {resume}, up to {found[-1].name}, and going back would lose them; "
            "choose another output_dir, or remove them first"
        )
    return Path(resume)


def restore(folder: Path, denoiser, optimizer, ema: EMAModel) -> dict:
    """Put a checkpoint's tensors back and return its JSON state.

    Raises:
        ValueError: the checkpoint is of a model with other parameters.
    """
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "state.safetensors")
    names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    expected = {f"raw.{name}": parameter.shape for name, parameter in zip(names, trained(denoiser))}
    stored = {key: value.shape for key, value in tensors.items() if key.startswith("raw.")}
    if expected != stored:
        odd = sorted(k for k in expected.keys() | stored.keys() if expected.get(k) != stored.get(k))
        raise ValueError(f"{folder} is of another model: {len(odd)} parameters differ, such as {', '.join(odd[:3])}")
    with torch.no_grad():
        for name, parameter, shadow in zip(names, trained(denoiser), ema.shadow_params):
            parameter.copy_(tensors[f"raw.{name}"])
            shadow.copy_(tensors[f"ema.{name}"])
    ema.optimization_step = state.pop("ema_step")
    moments = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state
