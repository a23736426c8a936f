"""`sfumato evaluate`: measure a model on an image set, and put the figures into its card."""

import json
import math
import os
import re
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import add_evaluation, recommended_settings
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.registries import SOURCES
from sfumato.training.config.load import default_config, load_config
from sfumato.training.config.schema import Config, DataConfig, ValidationConfig
from sfumato.training.data.prepare import prepare
from sfumato.training.publish.facts import public_name
from sfumato.training.quality.evaluation import Plan
from sfumato.training.quality.features import DEFAULT
from sfumato.training.quality.report import report
from sfumato.training.quality.statistics import Score


def training_config(model: str) -> Config | None:
    """The config of the run that made a model, or else the one stored with the model."""
    folder = Path(model)
    for above in folder.resolve().parents[:3]:
        if (above / "metrics.jsonl").is_file() and (above / "config.yaml").is_file():
            config = load_config(above / "config.yaml")
            if Path(config.output_dir).resolve() == above:  # the user's own run, where it was trained
                return config
    path = folder / "training_args.yaml"
    if not folder.is_dir():
        try:
            path = Path(hf_hub_download(model, "training_args.yaml"))
        except (OSError, HfHubHTTPError):
            return None
    return _of_a_stranger(load_config(path)) if path.is_file() else None


def _of_a_stranger(config: Config) -> Config:
    """A config that came with a model: it gets the user's own cache, no links, and no local path is read or written for it."""
    own = DataConfig()
    config.data.cache_dir, config.data.links_into = own.cache_dir, own.links_into
    named = config.data.name in SOURCES and SOURCES[config.data.name].named
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", config.data.name) and not Path(config.data.name).exists()
    config.data.name = config.data.name if named or on_hub else ""
    return config


def config_of(model: str, data: str | None, pipe: SfumatoPipeline) -> Config:
    """The config to evaluate on: the file `data`, else the model's own with the data named `data`. Guidance is the model's.

    Raises:
        ValueError: the model does not say what it was trained on, and no data were named.
    """
    own = training_config(model)
    if data is not None and Path(data).suffix in (".yaml", ".yml"):
        config = load_config(data)
        config.validation = own.validation if own else ValidationConfig()
        return config
    if own:
        config = own
    elif data is not None:
        channels, (height, _) = pipe.vae.config.in_channels, pipe.trained_size
        config = default_config(data=DataConfig(resolution=height, channels=channels))
    else:
        raise ValueError(f"{model} does not say what it was trained on; name it with --data")
    if data is not None:
        config.data.name = data
    if not config.data.name:
        raise ValueError(f"{model} was trained on files that did not come with it; name data with --data")
    return config


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is measured of a model, and how it draws for that.

    Attributes:
        data: a config, or a value of `data.name`; None: what the model was trained on.
        images: number of captions that are drawn.
        sampler, steps, guidance_scale: None: as the model's card recommends.
        seed: image i has seed `seed` + i.
        extractor: the network whose features are used; see `features.compute_features`.
        bits: number of images whose bits per dimension are bounded too.
        out: a folder for `evaluation.json` and the sheets, instead of the model's own.
    """

    data: str | None = None
    images: int = 512
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    extractor: str = DEFAULT
    bits: int = 0
    out: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found.

    Attributes:
        scores: figures with their intervals, by name.
        protocol: how they were measured.
        sheets: images to look at, by file name.
        folder: where all this was written; None if it was not.
    """

    scores: dict[str, Score]
    protocol: str
    sheets: dict[str, Image.Image]
    folder: Path | None


def open_for_evaluation(model: str, options: EvaluateOptions) -> tuple[SfumatoPipeline, Config]:
    """The model, ready to draw, and the config of data and drawing.

    Raises:
        ValueError: something cannot be used; raised before anything is drawn.
    """
    _check_options(model, options)
    pipe = SfumatoPipeline.from_pretrained(model)
    if pipe.reads in ("masks", "low_res") or pipe.controlnet is not None:
        raise ValueError(f"{model} draws from images; evaluate is for models that draw from text alone")
    config, advice = config_of(model, options.data, pipe), recommended_settings(model)
    size, channels = config.data.size, config.data.channels
    if (size, channels) != (pipe.trained_size, pipe.vae.config.in_channels):
        raise ValueError(f"the data have {size} pixels and {channels} channels, but the model draws {pipe.trained_size}")
    validation = config.validation
    start, stop = validation.guidance_interval
    pipe = with_guider(pipe, validation.guider, start=start, stop=stop)
    if options.sampler is not None:
        pipe = with_sampler(pipe, options.sampler)
    validation.num_inference_steps = advice["num_inference_steps"] if options.steps is None else options.steps
    validation.guidance_scale = advice["guidance_scale"] if options.guidance_scale is None else options.guidance_scale
    validation.seed = options.seed
    if not 1 <= validation.num_inference_steps <= pipe.scheduler.config.num_train_timesteps:
        raise ValueError(f"--steps must be from 1 to {pipe.scheduler.config.num_train_timesteps}")
    if not math.isfinite(validation.guidance_scale):
        raise ValueError("--guidance-scale must be a finite number")
    return pipe, config


def _check_options(model: str, options: EvaluateOptions) -> None:
    folder = Path(model)
    if options.out is None and folder.is_dir():
        if (folder.parent / "state.json").is_file():
            raise ValueError(f"{model} is part of a checkpoint, which must stay as it is; name another folder with --out")
        if not (folder / "README.md").is_file():
            raise ValueError(f"{model} has no README.md to put the figures into; name a folder with --out")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{model} is not writable; name another folder for the figures with --out")
    if options.images < 2 or options.bits < 0 or not 0 <= options.seed < 2**62:
        raise ValueError("--images must be at least 2, --bits at least 0, and --seed at least 0 and below 2**62")
    if options.out is not None and Path(options.out).exists() and not Path(options.out).is_dir():
        raise ValueError(f"--out={options.out} is not a folder")


def evaluate(model: str, options: EvaluateOptions) -> Report | None:
    """Measure a model, write `evaluation.json`, and put the figures into its card.

    Args:
        model: a pipeline folder or Hub id.

    Returns:
        The report, on the first process; None on the others.

    Raises:
        ValueError: the model, the data or an option cannot be used.
    """
    pipe, config = open_for_evaluation(model, options)
    try:
        dataset = prepare(config.data)
    except ValueError as error:
        raise ValueError(f"{error}. The training data may be elsewhere; name them with --data") from error
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipe.to(accelerator.device)
    num_diverse = max(2, options.images // 32)
    plan = Plan(count=options.images, num_diverse=num_diverse, extractor=options.extractor, bits=options.bits)
    started = time.monotonic()
    scores, protocol, sheets = report(pipe, config, dataset, accelerator, plan)
    accelerator.print(f"evaluated in {(time.monotonic() - started) / 60:.1f} minutes")
    if not accelerator.is_main_process:
        return None
    folder = Path(options.out or model)
    if options.out is None and not folder.is_dir():
        return Report(scores=scores, protocol=protocol, sheets=sheets, folder=None)
    found = Report(scores=scores, protocol=protocol, sheets=sheets, folder=folder)
    try:
        _write(found, folder, plan)
        if options.out is None:
            rows = {name: (score.value, score.half_width) for name, score in scores.items()}
            add_evaluation(folder, rows, protocol, public_name(config.data.name), next(iter(sheets), None))
    except OSError as error:  # a full disk must not cost the figures
        warnings.warn(f"could not write the figures: {error}", stacklevel=2)
        return replace(found, folder=None)
    return found


def _write(found: Report, folder: Path, plan: Plan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scores = {name: asdict(score) for name, score in found.scores.items()}
    record = {"scores": scores, "protocol": found.protocol, "plan": asdict(plan)}
    (folder / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, sheet in found.sheets.items():
        sheet.save(folder / name)
