"""Metadata of a run: for readers in the card, for programs in the scheduler's config, and settings to repeat it."""

import hashlib
import re
import subprocess
from dataclasses import asdict, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sfumato import __version__
from sfumato.registries import SOURCES
from sfumato.training.config.load import dump_config
from sfumato.training.config.rules import named_source
from sfumato.training.config.schema import CheckpointConfig, Config, DataConfig, HubConfig
from sfumato.training.data.array_set import ArraySet


def public_name(source: str) -> str:
    """A Hub id or a word unchanged; of a path on this machine, only the last part."""
    named, colon, place = source.partition(":")
    if named in SOURCES and SOURCES[named].named:
        return f"{named}:{Path(place).name}" if colon else source
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not Path(source).exists():
        return source
    name = Path(source).name
    return f"./{name}" if name in SOURCES and SOURCES[name].named else name


def without_secrets(config: Config) -> Config:
    """A config that others may see, without the webhook: whoever knows its address can write there."""
    return replace(config, train=replace(config.train, webhook=None))


def public_settings(config: Config) -> str:
    """The config as YAML, enough to repeat the run wherever the data are, without paths on this machine."""

    def name(source):
        return None if source is None else public_name(source)

    clean = replace(
        config,
        output_dir=f"runs/{Path(config.output_dir).name}",
        init_from=name(config.init_from),
        data=replace(
            config.data,
            name=public_name(config.data.name),
            keywords=name(config.data.keywords),
            cache_dir=DataConfig().cache_dir,
            links_into=None,
        ),
        vae=replace(config.vae, pretrained=name(config.vae.pretrained)),
        text_encoder=replace(config.text_encoder, pretrained=name(config.text_encoder.pretrained)),
        checkpoint=replace(config.checkpoint, resume=CheckpointConfig().resume),
        hub=HubConfig(),
        train=without_secrets(config).train,
    )
    own = {field.name for field in fields(Config)}
    mounted = {field.name: getattr(clean, field.name) for field in fields(clean) if field.name not in own}
    return dump_config(replace(clean, **{key: _without_paths(section) for key, section in mounted.items()}))


def _without_paths(section: Any) -> Any:
    """A section that a task adds, with names in place of the paths in it."""
    texts = {field.name: getattr(section, field.name) for field in fields(section)}
    paths = {
        key: public_name(text)
        for key, text in texts.items()
        if isinstance(text, str) and (Path(text).is_absolute() or Path(text).expanduser().exists())
    }
    return replace(section, **paths)


def facts(config: Config, accelerator: Accelerator, images: ArraySet, state: dict) -> dict:
    """The rows of the card about a run."""
    c, o = config, config.objective
    batch = c.train.batch_size * c.train.gradient_accumulation_steps * accelerator.num_processes
    weight = {
        "min_snr": f"min-SNR, gamma {o.min_snr_gamma}, floor {o.min_snr_floor}",
        "soft_min_snr": f"soft min-SNR, gamma {o.min_snr_gamma}",
        "p2": f"P2, gamma {o.p2_gamma}",
        "edm": f"EDM, sigma_data {o.edm_sigma_data}",
    }.get(o.weight, o.weight)
    levels = o.timesteps if o.timesteps == "uniform" else f"log-SNR {o.timesteps}({o.log_snr_mean}, {o.log_snr_std})"
    levels += ", importance sampled" if o.importance else ""
    captions = int(images.table["num_captions"][images.select("train")].sum())
    rows = {
        "title": c.title,
        "data": f"{public_name(c.data.name)}, {len(images.select('train')):,} training images, "
        f"{len(images) - len(images.select('train')):,} held out",
        "captions": f"{captions:,} to train on; dropped with probability {o.caption_dropout}, for guidance"
        + (" away from noise, which is what the empty caption draws" if o.empty_caption == "noise" else ""),
        "skipped records": sum(map(len, images.skipped.values())),
        "steps": f"{state['step']:,}",
        "images seen": f"{state['images_seen']:,}",
        "training time": f"{state['seconds'] / 60:.1f} minutes",
        "hardware": f"{accelerator.num_processes} x {_device(accelerator)}",
        "batch size": batch,
        "optimizer": f"{c.optim.name}, learning rate {c.optim.lr}, {c.optim.lr_decay} after {c.optim.lr_warmup_steps} steps",
        "noise levels trained": levels,
        "loss weight": weight,
        "precision": accelerator.mixed_precision,
        "weights": f"EMA, decay {c.ema.decay}",
        "seed": c.seed,
        "versions": ", ".join(f"{name} {number}" for name, number in _versions().items() if number),
        "guidance_scale": c.validation.guidance_scale,
        "num_inference_steps": c.validation.num_inference_steps,
    }
    for key, source in (("text encoder", c.text_encoder.pretrained), ("VAE", c.vae.pretrained)):
        if source is not None:
            rows[f"pretrained {key}"] = public_name(source)
    if c.data.buckets:
        rows["image sizes"] = ", ".join(f"{height} x {width}" for height, width in c.data.buckets)
    if c.init_from is not None:
        rows["base_model"] = public_name(c.init_from)
    if state.get("changes"):
        rows["changed on the way"] = "; ".join(state["changes"])
    if c.lora.rank:
        rows["LoRA rank"] = c.lora.rank
    source = SOURCES.get(named_source(c) or "")
    attribution, license = (None, None) if source is None else (source.attribution, source.license)
    if images.credits is not None:
        attribution, license = images.credits
    if source is not None and attribution is not None:
        rows["data licence"] = attribution
        if "languages" in source.only:
            rows["language"] = c.data.languages
        if not any(name.startswith(("base_model", "pretrained")) for name in rows):  # otherwise theirs counts too
            rows["license"] = license
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", c.data.name) and not Path(c.data.name).exists():
        rows["datasets"] = [c.data.name]
    return rows


def metadata(config: Config, images: ArraySet, state: dict, settings: str) -> dict:
    """What programs may want to know about a run; stored in the scheduler's config under `_sfumato`, key `run`.

    `settings` are its `public_settings`.
    """
    objective = asdict(config.objective)
    return {
        "step": state["step"],
        "images_seen": state["images_seen"],
        "objective": objective,
        "guidance_scale": config.validation.guidance_scale,
        "data": {"name": public_name(config.data.name), "fingerprint": images.fingerprint.rsplit("-", 1)[-1]},
        "versions": _versions(),
        "commit": _commit(),
        "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
    }


@cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"sfumato": __version__}
    for name in ("diffusers", "transformers", "accelerate", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def _commit() -> str | None:
    """The git commit of this code, if it is a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _device(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(accelerator.device)
    return accelerator.device.type
