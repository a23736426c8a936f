"""`sfumato evaluate`: measure a model on a picture set, print the figures, and put them into its card."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import add_evaluation, recommended
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.training.config import schema
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.publish.facts import public_name
from sfumato.training.quality.report import Plan, report


def trained_by(model: str) -> schema.Config | None:
    """The config of the run that made a model, else the one that travels along with it."""
    folder = Path(model)
    kept = [above / "config.yaml" for above in folder.resolve().parents[:3] if (above / "metrics.jsonl").is_file()]
    kept.append(folder / "training_args.yaml")
    if not folder.is_dir():
        try:
            kept = [Path(hf_hub_download(model, "training_args.yaml"))]
        except (OSError, HfHubHTTPError):
            kept = []
    found = [path for path in kept if path.is_file()]
    return load_config(found[0]) if found else None


def config_of(model: str, data: str | None, pipe: SfumatoPipeline) -> schema.Config:
    """The config whose data are drawn: `data` itself or with that name, else the model's own. Guidance is always the model's.

    Raises:
        ValueError: the model does not say what it was trained on, and nothing else was named.
    """
    own = trained_by(model)
    if data is not None and Path(data).suffix in (".yaml", ".yml"):
        config = load_config(data)
        config.validation = own.validation if own else schema.ValidationConfig()
        return config
    if own:
        config = own
    elif data is not None:
        channels, (height, _) = pipe.vae.config.in_channels, pipe.trained_size
        config = schema.Config(data=schema.DataConfig(resolution=height, channels=channels))
    else:
        raise ValueError(f"{model} does not say what it was trained on; name it with --data")
    if data is not None:
        config.data.name = data
    return config


def prepared(model: str, options) -> tuple[SfumatoPipeline, schema.Config]:
    """The model as it is to draw, and the config of data and drawing.

    Raises:
        ValueError: something that cannot be used; found before anything is drawn.
    """
    folder = Path(model)
    if options.out is None and folder.is_dir():
        if (folder.parent / "state.json").is_file():
            raise ValueError(f"{model} is part of a checkpoint, which must stay as it is; name another folder with --out")
        if not (folder / "README.md").is_file():
            raise ValueError(f"{model} has no README.md to put the figures into; name a folder with --out")
    if options.pictures < 2 or options.bits < 0 or not 0 <= options.seed < 2**62:
        raise ValueError("--pictures must be at least 2, --bits at least 0, and --seed a number from 0 on, below 2**62")
    if options.out is not None and Path(options.out).exists() and not Path(options.out).is_dir():
        raise ValueError(f"--out={options.out} is not a folder")
    pipe = SfumatoPipeline.from_pretrained(model)
    if pipe.reads in ("masks", "low_res") or pipe.controlnet is not None:
        raise ValueError(f"{model} draws from pictures; evaluate is for models that draw from text alone")
    config, advice = config_of(model, options.data, pipe), recommended(model)
    size, channels = config.data.size, config.data.channels
    if (size, channels) != (pipe.trained_size, pipe.vae.config.in_channels):
        raise ValueError(f"the data are of {size} pixels and {channels} channels, the model draws {pipe.trained_size}")
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


def evaluate(model: str, options) -> int:
    """Run the report and write it down; `options` are those of the command line.

    Raises:
        ValueError: model, data or a choice that cannot be used.
    """
    pipe, config = prepared(model, options)
    try:
        pictures = prepare(config.data)
    except ValueError as error:
        raise ValueError(f"{error}. What the model was trained on may be elsewhere; name it with --data") from error
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipe.to(accelerator.device)
    if options.out is None and not Path(model).is_dir():
        accelerator.print(
            "The model is on the Hub, so the figures are printed and not kept; name a folder for them with --out"
        )
    count, few = options.pictures, max(2, options.pictures // 32)
    plan = Plan(count=count, diverse=few, extractor=options.extractor, bits=options.bits)
    scores, protocol, sheet = report(pipe, config, pictures, accelerator, plan)
    if not accelerator.is_main_process:
        return 0
    for name, score in scores.items():
        print(f"{name:70} {score.value:.4g}" + ("" if score.half_width is None else f" ± {score.half_width:.2g}"))
    print(protocol)
    folder = Path(options.out or model)
    if not folder.is_dir() and options.out is None:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    told = {"scores": {name: asdict(score) for name, score in scores.items()}, "protocol": protocol, "plan": asdict(plan)}
    (folder / "evaluation.json").write_text(json.dumps(told, indent=1) + "\n")
    if sheet is not None:
        sheet.save(folder / "memorisation.png")
    if options.out is None:
        rows = {name: (score.value, score.half_width) for name, score in scores.items()}
        add_evaluation(folder, rows, protocol, public_name(config.data.name), "memorisation.png" if sheet else None)
        print(f"wrote evaluation.json and the card of {folder}")
    return 0
