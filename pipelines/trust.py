"""Checks on a stranger's folder before it is opened: no pickles, no absurd sizes.

Self-contained on purpose (torch, safetensors, diffusers and transformers only): this file travels inside shared model folders.
"""

import importlib
import json
from collections.abc import Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
UNREAD = [f"*{suffix}" for suffix in PICKLES]  # files of a Hub repository that are not downloaded
MAX_TIMESTEPS, MAX_SAMPLE_SIZE = 100_000, 1024
PARTS = (
    "vae", "text_encoder", "unet", "scheduler", "safety_checker", "image_encoder", "controlnet",
    "low_res_scheduler", "guider", "tokenizer", "feature_extractor", "motion_adapter",
)  # fmt: skip
MODELS = {  # (library and class as model_index.json names them) -> module
    ("diffusers", "UNet2DConditionModel"): "diffusers",
    ("diffusers", "ControlNetModel"): "diffusers",
    ("diffusers", "UNetMotionModel"): "diffusers",
    ("diffusers", "MotionAdapter"): "diffusers",
    ("diffusers", "AutoencoderKL"): "diffusers",
    ("diffusers", "AutoencoderTiny"): "diffusers",
    ("diffusers", "AsymmetricAutoencoderKL"): "diffusers",
    ("transformers", "CLIPTextModel"): "transformers",
    ("transformers", "CLIPTextModelWithProjection"): "transformers",
    ("transformers", "CLIPVisionModelWithProjection"): "transformers",
    ("stable_diffusion", "StableDiffusionSafetyChecker"): "diffusers.pipelines.stable_diffusion.safety_checker",
}


def check_folder(folder: str | Path, skip: Set[str] = frozenset()) -> None:
    """Reject a pipeline folder that would unpickle objects or fill the memory when it is opened.

    Remote code needs no check here: diffusers runs none without `trust_remote_code=True`.

    Args:
        folder: a folder in Stable Diffusion's format.
        skip: parts that are not opened, since the caller provides others.

    Raises:
        ValueError: weights that exist only as a pickle, are damaged, or do not match the size that a config asks for.
    """
    folder = Path(folder)
    index = _read(folder / "model_index.json")
    for name in PARTS:
        part, entry = folder / name, index.get(name)
        if name in skip or not part.is_dir() or not isinstance(entry, list) or not all(isinstance(w, str) for w in entry):
            continue
        check_part(part, (entry[0], entry[-1]))


def check_part(part: Path, entry: tuple[str, str]) -> None:
    """Like `check_folder`, for the folder of one model; `entry` is its library and class.

    Raises:
        ValueError: as for `check_folder`; or something in it is not a regular file and could block forever when it is read.
    """
    odd = [path.name for path in part.iterdir() if not path.is_file() and not path.is_dir()]
    if odd:
        raise ValueError(f"{part / odd[0]} is not a plain file")
    safe = list(part.glob("*.safetensors"))
    pickles = [path.name for path in part.iterdir() if path.suffix.lower() in PICKLES]
    if pickles and not safe:
        raise ValueError(
            f"{part} holds its weights only as {pickles[0]}, a pickle, which can run code when opened; only safetensors "
            "files are opened. Convert it where its code can do no harm, or ask its author to"
        )
    for listing in part.glob("*.safetensors.index*.json"):
        shards = _read(listing).get("weight_map", {})
        odd = [str(f) for f in (shards.values() if isinstance(shards, dict) else ["?"]) if not _is_shard(f)]
        if odd:
            raise ValueError(f"{listing} names {odd[0]!r}, which is not a safetensors file beside it")
    if (part / "scheduler_config.json").is_file():
        steps = _read(part / "scheduler_config.json").get("num_train_timesteps", 1000)
        if not isinstance(steps, int) or not 0 < steps <= MAX_TIMESTEPS:
            raise ValueError(f"{part}: num_train_timesteps={steps!r}; at most {MAX_TIMESTEPS} are allowed")
    if safe and (part / "config.json").is_file():
        _check_size(part, entry, safe)


def _is_shard(name) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _read(path: Path) -> dict:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a plain file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged")
    return content


def _check_size(part: Path, entry: tuple[str, str], files: list[Path]) -> None:
    """Compare what the config would build, on torch's meta device, with the stored weights."""
    if entry not in MODELS:
        raise ValueError(f"{part} is a {'.'.join(entry)}, which is not a part of a model in this format")
    shapes = {}
    for path in files:  # variants repeat names
        try:
            with safe_open(path, "pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    config = _read(part / "config.json")
    if depth := find_depth(config, max(len(shapes), 100)):  # first, since a model that is too deep cannot even be sketched
        raise ValueError(f"{part}: its config asks for {depth}, its weights hold {len(shapes):,} tensors")
    if max(_numbers(config.get("sample_size"))) > MAX_SAMPLE_SIZE:
        raise ValueError(f"{part}: sample_size={config['sample_size']!r}; at most {MAX_SAMPLE_SIZE} is opened")
    cls = getattr(importlib.import_module(MODELS[entry]), entry[1])
    try:
        with torch.device("meta"):
            diffusers_model = hasattr(cls, "load_config")
            sketch = cls.from_config(config) if diffusers_model else cls(cls.config_class.from_dict(config))
    except Exception as error:
        raise ValueError(f"{part}: its config does not describe a {entry[1]}: {error}") from error
    wanted = sum(parameter.numel() for parameter in sketch.parameters())
    if wanted > 1.5 * stored + 10_000:
        raise ValueError(f"{part}: its config asks for {wanted:,} parameters, its weights hold {stored:,}; it is not opened")


def find_depth(config: dict, limit: int) -> str | None:
    """The setting that asks for more than `limit` layers, alone or multiplied with the others; None if there is none."""
    product, queue = 1, [config]
    while queue:
        for key, value in queue.pop().items():
            if isinstance(value, dict):
                queue.append(value)
            elif isinstance(value, list) and len(value) > limit:
                return f"{len(value):,} {key}"
            elif "layers" in key:
                product *= max(1, *_numbers(value))
                if product > limit:
                    return f"{product:,} layers ({key})"
    return None


def _numbers(value) -> list[int]:
    """The integers in nested lists, and 0."""
    if isinstance(value, list):
        return [0] + [number for item in value for number in _numbers(item)]
    return [0, value] if isinstance(value, int) else [0]
