"""What is looked at before a stranger's folder is opened: no pickle, no absurd size.

Self-contained on purpose (torch, safetensors, diffusers and transformers only): this file travels inside shared model folders.
"""

import importlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
MAX_TIMESTEPS = 100_000


def check_folder(folder: str | Path) -> None:
    """Refuse a pipeline folder that would run code or fill the memory when it is opened.

    Remote code needs no check here: diffusers runs none without `trust_remote_code=True`.

    Raises:
        ValueError: weights that are there as a pickle only, that are damaged, or that a config contradicts in size.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} is no pipeline: its model_index.json is missing or damaged") from error
    for name, entry in parts.items():
        part = folder / name
        if not part.is_dir() or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            continue
        safe = [path for path in part.glob("*.safetensors")]
        if pickles := [path.name for path in part.iterdir() if path.suffix in PICKLES]:
            if not safe:
                raise ValueError(
                    f"{part} holds its weights only as {pickles[0]}, a pickle, which can run code when opened; only "
                    "safetensors are. Convert it where its code may do no harm, or ask its author to"
                )
        if (part / "scheduler_config.json").is_file():
            steps = _read(part / "scheduler_config.json").get("num_train_timesteps", 1000)
            if not isinstance(steps, int) or not 0 < steps <= MAX_TIMESTEPS:
                raise ValueError(f"{part}: num_train_timesteps={steps!r}; at most {MAX_TIMESTEPS} are allowed")
        elif safe and (part / "config.json").is_file():
            _check_size(part, entry, safe)


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged")
    return content


def _check_size(part: Path, entry: list[str], files: list[Path]) -> None:
    """Compare what the config would build, on torch's meta device, with what the weights hold."""
    shapes = {}
    for path in files:  # variants repeat names
        try:
            with safe_open(path, "pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    config = _read(part / "config.json")
    cls = getattr(importlib.import_module(entry[0]), entry[1], None) if entry[0] in ("diffusers", "transformers") else None
    if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
        return  # diffusers says what it thinks of that
    for key, value in config.items():  # depth first: what is too deep cannot even be sketched
        depth = len(value) if isinstance(value, list) else 0
        if "layers" in key:
            depth = max([depth, *(number for number in _numbers(value))])
        if depth > max(len(shapes), 100):
            raise ValueError(f"{part}: {key} asks for {depth:,} parts, the weights hold {len(shapes):,} tensors")
    try:
        with torch.device("meta"):
            sketch = cls.from_config(config) if entry[0] == "diffusers" else cls(cls.config_class.from_dict(config))
    except Exception as error:
        raise ValueError(f"{part}: its config does not describe a {entry[1]}: {error}") from error
    wanted = sum(parameter.numel() for parameter in sketch.parameters())
    if wanted > 1.5 * stored + 10_000:
        raise ValueError(f"{part}: its config asks for {wanted:,} numbers, its weights hold {stored:,}; it will not be opened")


def _numbers(value) -> list[int]:
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int) else []
