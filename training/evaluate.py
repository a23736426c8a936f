"""`sfumato evaluate`: measure a model on a picture set, print the figures, and put them into its card."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import add_evaluation, recommended
from sfumato.pipelines.choices import SAMPLERS
from sfumato.training import config as configs
from sfumato.training.facts import public_name
from sfumato.training.pictures import prepare
from sfumato.training.quality import Plan, report


def config_of(model: str, data: str | None, pipe: SfumatoPipeline) -> configs.Config:
    """The config whose data are drawn: `data` itself or with that name, else the one that travels with the model.

    Raises:
        ValueError: the model does not say what it was trained on, and nothing else was named.
    """
    kept = Path(model) / "training_args.yaml"
    if not Path(model).is_dir():
        try:
            kept = Path(DiffusionPipeline.download(model, allow_patterns=["training_args.yaml"])) / "training_args.yaml"
        except (OSError, ValueError):
            kept = Path("nowhere")
    if data is not None and Path(data).suffix in (".yaml", ".yml"):
        return configs.load(data)
    if kept.is_file():
        config = configs.load(kept)
    elif data is not None:
        channels, (height, _) = pipe.vae.config.in_channels, pipe.trained_size
        config = configs.Config(data=configs.DataConfig(resolution=height, channels=channels))
    else:
        raise ValueError(f"{model} does not say what it was trained on; name it with --data")
    if data is not None:
        config.data.name = data
    return config


def evaluate(model: str, options) -> int:
    """Run the report and write it down; `options` are those of the command line.

    Raises:
        ValueError: model, data or a choice that cannot be used.
    """
    pipe = SfumatoPipeline.from_pretrained(model)
    if pipe.reads in ("masks", "low_res") or pipe.controlnet is not None:
        raise ValueError(f"{model} draws from pictures; evaluate is for models that draw from text alone")
    config, advice = config_of(model, options.data, pipe), recommended(model)
    validation = config.validation
    if options.sampler is not None and options.sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {options.sampler!r}; use one of {', '.join(SAMPLERS)}")
    validation.sampler = options.sampler or validation.sampler
    validation.num_inference_steps = options.steps or advice["num_inference_steps"]
    validation.guidance_scale = advice["guidance_scale"] if options.guidance_scale is None else options.guidance_scale
    validation.seed = options.seed
    if options.pictures < 2:
        raise ValueError("--pictures must be at least 2")
    pictures = prepare(config.data)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipe.to(accelerator.device)
    plan = Plan(count=options.pictures, extractor=options.extractor, bits=options.bits)
    scores, protocol, sheet = report(pipe, config, pictures, accelerator, plan)
    if not accelerator.is_main_process:
        return 0
    for name, score in scores.items():
        print(f"{name:70} {score.value:.4g}" + ("" if score.half_width is None else f" ± {score.half_width:.2g}"))
    print(protocol)
    folder = Path(options.out or model)
    if not folder.is_dir() and options.out is None:
        print("The figures are not kept: the model is on the Hub; name a folder with --out")
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
