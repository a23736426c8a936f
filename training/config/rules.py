"""The rules for settings, and which settings have no effect given the others.

Every rule goes through `need(ok, key, rule)`, so that all wrong settings are reported at once. The rules of a source or task
are in its own file; its entry in `registries` points to them.
"""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfumato.registries import (
    GUIDERS,
    SAMPLERS,
    SOURCES,
    TASKS,
    Source,
    Task,
    figures_of,
    load_object,
    metric_of,
    metrics_for,
)
from sfumato.training.config.schema import Config

Need = Callable[[bool, str, str], None]

# Smallest and largest allowed values. Values beyond them make no sense or would fill any machine, and are taken for typos.
LIMITS = {
    "data.resolution": (8, 8192),
    "data.max_records": (1, 10**10),
    "data.num_pictures": (1, 10**8),
    "text_encoder.vocab_size": (514, 10**6),
    "text_encoder.max_length": (3, 4096),
    "text_encoder.extra_vocab": (0, 10**6),
    "text_encoder.hidden_size": (1, 16384),
    "text_encoder.num_hidden_layers": (0, 100),
    "text_encoder.num_attention_heads": (1, 1024),
    "text_encoder.embedding_std": (1e-6, 100),
    "lora.rank": (0, 4096),
    "lora.alpha": (1e-6, 10**6),
    "objective.log_snr_mean": (-30, 30),
    "objective.log_snr_std": (1e-3, 30),
    "objective.min_snr_gamma": (1e-6, 10**6),
    "objective.p2_gamma": (1e-6, 10),
    "objective.edm_sigma_data": (1e-4, 1000),
    "objective.vlb_weight": (0, 1000),
    "objective.offset_noise": (0, 10),
    "objective.noise_candidates": (1, 1024),
    "optim.lr": (1e-12, 10),
    "optim.eps": (0, 1),
    "optim.weight_decay": (0, 10),
    "optim.lr_warmup_steps": (0, 10**9),
    "optim.max_grad_norm": (1e-9, 10**9),
    "train.max_steps": (1, 10**10),
    "train.max_minutes": (1e-6, 10**7),
    "train.batch_size": (1, 2**16),
    "train.gradient_accumulation_steps": (1, 2**16),
    "train.num_workers": (0, 256),
    "train.num_threads": (1, 1024),
    "train.max_bad_steps": (1, 10**9),
    "train.patience": (1, 10**6),
    "validation.num_inference_steps": (1, 10**5),
    "validation.num_held_out": (1, 10**6),
    "validation.num_judged": (1, 10**6),
    "checkpoint.keep": (1, 10**5),
}


def check(config: Config) -> None:
    """Reject settings that cannot work, all at once, before anything is loaded.

    Raises:
        ValueError: names each wrong setting, its value and what is allowed.
    """
    wrong: list[str] = []

    def need(ok: bool, key: str, rule: str) -> None:
        if not ok:
            wrong.append(f"{key}={read_key(config, key)!r}: {rule}")

    if config.task not in TASKS:
        need(False, "task", f"choose one of {', '.join(TASKS)}")
    else:
        for key, (low, high) in LIMITS.items():
            value = read_key(config, key)
            need(value is None or low <= value <= high, key, f"must be from {low:,} to {high:,}")
        _check_data(config, need)
        _check_text_encoder(config, need)
        _check_objective(config, need)
        _check_task(config, need)
        _check_init_from(config, need)
        _check_training(config, need)
        _check_best_by(config, need)
        _check_hub(config, need)
        _check_validation(config, need)
    if wrong:
        raise ValueError("these settings cannot work:\n  " + "\n  ".join(wrong))


def read_key(config: Config, key: str) -> Any:
    """The value of a setting, given its dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def named_source(config: Config) -> str | None:
    """The name in `SOURCES` if `data.name` is a named source rather than a place, else None."""
    name = config.data.name.partition(":")[0]
    return name if name in SOURCES and SOURCES[name].named else None


def _check_data(config: Config, need: Need) -> None:
    data, name = config.data, named_source(config)
    generated = name is not None and SOURCES[name].generated
    need(0 <= data.max_bad_share < 1, "data.max_bad_share", "must be in [0, 1)")
    if data.stream:
        need(name is None, "data.stream", f"is for records in files; {data.name} draws its own")
        need(not data.buckets, "data.buckets", "a stream has images of one size; set data.resolution")
        need(data.max_records is None, "data.max_records", "cannot be combined with data.stream, which has no end")
        for cache in ("cache_latents", "cache_embeddings"):
            need(not getattr(data, cache), f"data.{cache}", "a stream keeps nothing on disk")
        for size in ("stream_buffer", "stream_sample"):
            need(getattr(data, size) > 0, f"data.{size}", "must be positive")
    codec = name is not None and SOURCES[name].codec
    shape = SOURCES[name].shape if name is not None else None
    if shape is not None:
        height, width, channels = shape
        fits = (*data.size, data.channels) == (height, width, channels)
        need(fits, "data.resolution", f"{name} has arrays of {height} x {width} and data.channels={channels}; set both")
        need(not data.random_flip, "data.random_flip", f"mirrors images; {name} has none")
    arrays = Path(data.name).exists()  # whose arrays may have any number of channels
    need(bool(codec) or arrays or data.channels in (1, 3, 4), "data.channels", "must be 1, 3 or 4")
    need(data.channels > 0, "data.channels", "must be positive")
    task = TASKS[config.task] if config.task in TASKS else None
    of_pictures = task is not None and not (task.plain or task.arrays)
    need(
        not (of_pictures and (codec or data.channels not in (1, 3, 4))),
        "task",
        f"{config.task} is for images with 1, 3 or 4 channels",
    )
    repeat = SOURCES[name].repeat if name is not None else 1
    of_pixels = config.task != "autoencoder" and config.vae.pretrained is None and config.init_from is None
    need(config.vae.repeat == (repeat if of_pixels else 1), "vae.repeat", f"must be {repeat if of_pixels else 1} here")
    need(data.resolution % 8 == 0, "data.resolution", "must be a multiple of 8, which stock pipelines require")
    need(
        all(len(size) == 2 and min(size) >= 8 for size in data.buckets) and not (generated and not codec and data.buckets),
        "data.buckets",
        "must be pairs [height, width] of at least 8 pixels, and is not for openmoji and shapes, which are square",
    )
    need(not any(side % 8 for size in data.buckets for side in size), "data.buckets", "sides must be multiples of 8")
    need(data.channels == 3 or not generated or bool(codec), "data.channels", f"{data.name} is drawn in 3 channels")
    need(
        not (data.cache_latents and (data.buckets or data.random_flip)),
        "data.cache_latents",
        "cannot be combined with data.buckets or data.random_flip",
    )
    try:
        Path(data.name).expanduser()
    except RuntimeError as error:
        need(False, "data.name", str(error))
    for source, entry in SOURCES.items():
        _check_entry(config, need, entry, name == source, own_keys(config, source, entry))


def _check_text_encoder(config: Config, need: Need) -> None:
    encoder = config.text_encoder
    heads = encoder.num_attention_heads
    need(heads < 1 or encoder.hidden_size % heads == 0, "text_encoder.hidden_size", f"must be divisible by {heads} heads")


def _check_objective(config: Config, need: Need) -> None:
    o, flow = config.objective, config.objective.target == "flow"
    need(0 <= o.caption_dropout <= 1, "objective.caption_dropout", "must be in [0, 1]")
    of_noise = o.empty_caption == "noise"
    fits = config.task == "text_to_image" and not flow and not o.self_conditioning and config.validation.guider == "cfg"
    fits = fits and config.scheduler.get("variance_type") != "learned_range"
    need(
        not of_noise or fits,
        "objective.empty_caption",
        "noise is for text_to_image with plain guidance, without flow, self_conditioning or a learned variance",
    )
    dropout = "must be above 0 and below 1 with empty_caption=noise"
    need(not of_noise or 0 < o.caption_dropout < 1, "objective.caption_dropout", dropout)
    floor_fits = 0 <= o.min_snr_floor <= o.min_snr_gamma
    need(floor_fits, "objective.min_snr_floor", f"must be in [0, min_snr_gamma={o.min_snr_gamma}]")
    plain = TASKS[config.task].plain and not flow and not config.lora.rank
    need(plain or not o.self_conditioning, "objective.self_conditioning", "is for text_to_image, without flow and lora")
    learned = config.scheduler.get("variance_type") == "learned"
    need(not learned, "scheduler", "variance_type: choose learned_range or a fixed one")
    epsilon = config.scheduler.get("prediction_type", "epsilon") == "epsilon" and config.init_from is None and not flow
    need(
        not (epsilon and o.min_snr_floor),
        "objective.min_snr_floor",
        "a floor on x_0 is unbounded for epsilon; use prediction_type sample or v_prediction",
    )
    need(not (epsilon and o.weight == "edm"), "objective.weight", "is unbounded for epsilon; use sample or v_prediction")
    need(
        not (epsilon and o.weight != "unit" and config.scheduler.get("rescale_betas_zero_snr")),
        "objective.weight",
        "divides by an SNR of zero with epsilon prediction and zero terminal SNR",
    )


def _check_task(config: Config, need: Need) -> None:
    task, name = TASKS[config.task], config.task
    need(task.plain or not config.data.buckets, "data.buckets", f"task={name} takes images of one size")
    need(task.plain or not config.data.cache_latents, "data.cache_latents", f"task={name} needs the images")
    need(task.plain or config.lora.rank == 0, "lora.rank", "is for task=text_to_image")
    need(config.lora.rank == 0 or config.init_from is not None, "lora.rank", "adapts a trained model: set init_from")
    for other, entry in TASKS.items():
        _check_entry(config, need, entry, name == other, own_keys(config, other, entry))


def own_keys(config: Config, name: str, entry: Source | Task) -> tuple[str, ...]:
    """The keys of the config that have an effect only with this source or task."""
    keys = tuple(f"data.{key}" for key in entry.only) if isinstance(entry, Source) else ()
    if entry.settings is None:
        return keys
    section = entry.section or name
    return (*keys, *(f"{section}.{key}" for key in vars(getattr(config, section))))


def _check_entry(config: Config, need: Need, entry: Source | Task, in_use: bool, own: tuple[str, ...]) -> None:
    """Call the check of an entry that is in use; if it is not, check only its own settings, and only if they were changed.

    A wrong value is an error even if unused, but an installed package must not affect users who do not use it.
    """
    default = type(config)()
    if entry.check is None or not (in_use or any(read_key(config, key) != read_key(default, key) for key in own)):
        return
    load_object(entry.check)(config, need if in_use else lambda holds, key, rule: need(holds or key not in own, key, rule))


def _check_init_from(config: Config, need: Need) -> None:
    if config.init_from is None:
        return
    rule = "comes from init_from; leave it out"
    need(config.objective.target != "flow", "objective.target", rule)
    need(not config.unet, "unet", f"{rule} (on the command line: unet={{}})")
    need(not config.scheduler, "scheduler", f"{rule} (on the command line: scheduler={{}})")
    moves = config.task == "text_to_image" and not config.lora.rank
    wish = f"{rule} (to move a pixel model into latents, use task=text_to_image without lora.rank)"
    need(config.vae.pretrained is None or moves, "vae.pretrained", wish)
    need(config.text_encoder.pretrained is None, "text_encoder.pretrained", rule)


def _check_training(config: Config, need: Need) -> None:
    hook = config.train.webhook
    need(
        hook is None or re.match(r"https?://[^/\s]", hook) is not None, "train.webhook", "must begin with https:// or http://"
    )
    need(0 <= config.ema.decay < 1, "ema.decay", "must be in [0, 1)")
    need(all(0 <= beta < 1 for beta in config.optim.betas), "optim.betas", "must be in [0, 1)")
    every = (
        "checkpoint.every_steps",
        "checkpoint.every_minutes",
        "validation.every_steps",
        "hub.every_steps",
        "ema.snapshot_steps",
    )
    for key in every:
        value = read_key(config, key)
        need(value is None or value > 0, key, "must be positive, or null")
    need(not (config.ema.snapshot_steps and config.lora.rank), "ema.snapshot_steps", "cannot be used with lora")
    for key in ("seed", "validation.seed"):
        need(0 <= read_key(config, key) < 2**63, key, "must be at least 0 and below 2**63")
    need(
        config.train.max_steps is not None or config.train.max_minutes is not None,
        "train.max_minutes",
        "set it or train.max_steps, so that the run ends",
    )


def score_names(config: Config) -> tuple[str, ...]:
    """The scores by which a run can choose its best model: those of its task, or of the metrics for its task and source."""
    task = TASKS[config.task]
    if task.scores:
        return ("held_out_loss", *task.scores)
    figures = [
        figure
        for name, metric in metrics_for(named_source(config), config.task).items()
        for figure in figures_of(name)
        if metric.option is None
    ]
    return ("held_out_loss", *figures)


def _check_best_by(config: Config, need: Need) -> None:
    by, names = config.checkpoint.best_by, score_names(config)
    need(config.train.patience is None or by is not None, "train.patience", "waits for a score: set checkpoint.best_by")
    if by is None:
        return
    need(by in names, "checkpoint.best_by", f"choose one of {', '.join(names)}")
    need(config.validation.every_steps is not None, "checkpoint.best_by", "needs validation.every_steps")
    if by in names:
        metric = metric_of(by)
        needs = metric.needs if metric else ()
        missing = [package for package in needs if importlib.util.find_spec(package) is None]
        need(not missing, "checkpoint.best_by", "needs packages: pip install 'sfumato[metrics]'")
        of_sets = bool(needs) and metric is not None and metric.of == "drawings"
        several = not of_sets or config.validation.num_judged >= 2
        need(several, "validation.num_judged", f"must be at least 2 for {by}")


def _check_hub(config: Config, need: Need) -> None:
    hub, saved = config.hub, config.checkpoint.every_steps
    need(hub.repo_id is not None or not (hub.push or hub.every_steps), "hub.repo_id", "must name the repository to push to")
    need(
        hub.every_steps is None or (saved is not None and hub.every_steps % saved == 0),
        "hub.every_steps",
        f"pushes checkpoints, so it must be a multiple of checkpoint.every_steps={saved}",
    )
    need(not (hub.pull_request and hub.every_steps), "hub.every_steps", "checkpoints go to branches, not to a pull request")
    need(not (hub.pull_request and hub.tag), "hub.tag", "a pull request cannot be tagged")
    need(set(hub.variants) <= {"fp16", "raw"}, "hub.variants", "choose fp16, raw or both")
    need("raw" not in hub.variants or not config.lora.rank, "hub.variants", "raw cannot be used with lora")
    need(bool(re.fullmatch(r"\d+(KB|MB|GB)", hub.max_shard_size)), "hub.max_shard_size", "must be a size like 500MB or 10GB")


def _check_validation(config: Config, need: Need) -> None:
    v = config.validation
    need(0 <= v.guidance_scale < 1000, "validation.guidance_scale", "must be in [0, 1000)")
    trained = config.scheduler.get("num_train_timesteps", 1000)
    if isinstance(trained, int) and trained > 0 and v.num_inference_steps > 0 and config.init_from is None:
        need(v.num_inference_steps <= trained, "validation.num_inference_steps", f"the model is trained on {trained} steps")
        last = (v.num_inference_steps - 1) * (trained // v.num_inference_steps) + config.scheduler.get("steps_offset", 1)
        leads = config.scheduler.get("timestep_spacing") == "leading" and isinstance(last, int)
        rule = f"scheduler.timestep_spacing=leading would begin at step {last} of {trained}; choose trailing, or fewer steps"
        need(not leads or last < trained, "validation.num_inference_steps", rule)
    samplers = [name for name, sampler in SAMPLERS.items() if sampler.flow or config.objective.target != "flow"]
    need(v.sampler in samplers, "validation.sampler", f"choose one of {', '.join(samplers)}")
    guiders = [name for name, guider in GUIDERS.items() if not guider.weak]  # during training there is no weaker model yet
    need(v.guider in guiders, "validation.guider", f"choose one of {', '.join(guiders)}")
    if v.guider in guiders:
        alone = GUIDERS[v.guider].second and v.guidance_scale == 1
        need(not alone, "validation.guidance_scale", f"must not be 1 with guider {v.guider}")
    start, stop = (*v.guidance_interval, -1, -1)[:2]
    need(0 <= start <= stop <= 1, "validation.guidance_interval", "must be two numbers in [0, 1], the lower one first")


def settings_without_effect(config: Config) -> list[str]:
    """One line for each setting that was changed from its default but has no effect given the others."""
    default = type(config)()
    lines = []
    for without, needed, keys in _rules_without_effect(config):
        for key in keys if without else ():
            value = read_key(config, key)
            if value != read_key(default, key):
                lines.append(f"{key}={value!r} has no effect without {needed}")
    return lines


def _rules_without_effect(config: Config) -> list[tuple[bool, str, tuple[str, ...]]]:
    """Rows of: whether the keys have no effect, what they would need, and the keys."""
    o = config.objective
    data = config.data
    name = named_source(config)
    grown, learned = config.init_from is not None, config.scheduler.get("variance_type") == "learned_range"
    sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "embedding_std"]
    sizes += [] if config.text_encoder.extra_vocab and config.text_encoder.train else ["max_length"]
    pushes = config.hub.push or bool(config.hub.every_steps)
    on_hub = name is None and "/" in data.name and not Path(data.name).expanduser().exists()
    judged = bool(TASKS[config.task].scores) or any(m.at_end for m in metrics_for(name, config.task).values())
    by_drawings = config.checkpoint.best_by in score_names(config)[1:]
    rows = [
        (o.timesteps == "uniform", "objective.timesteps=normal", ("objective.log_snr_mean", "objective.log_snr_std")),
        (o.weight not in ("min_snr", "soft_min_snr"), "objective.weight=min_snr", ("objective.min_snr_gamma",)),
        (o.weight != "min_snr", "objective.weight=min_snr", ("objective.min_snr_floor",)),
        (o.weight != "p2", "objective.weight=p2", ("objective.p2_gamma",)),
        (o.weight != "edm", "objective.weight=edm", ("objective.edm_sigma_data",)),
        (not learned and not grown, "scheduler.variance_type=learned_range", ("objective.vlb_weight",)),
        (not config.lora.rank, "lora.rank", ("lora.alpha", "lora.target_modules")),
        (bool(config.lora.rank), "lora.rank=0", ("text_encoder.train",)),
        (
            grown and (not config.text_encoder.train or bool(config.lora.rank)),
            "text_encoder.train=true, without lora.rank",
            ("text_encoder.extra_vocab",),
        ),
        (
            grown or config.text_encoder.pretrained is not None,
            "a text encoder that is built from random weights",
            tuple(f"text_encoder.{key}" for key in sizes),
        ),
        (not grown, "init_from", ("text_encoder.extra_vocab",)),
        (not judged and not by_drawings, "a task or data whose images are judged", ("validation.num_judged",)),
        (not pushes, "hub.push", ("hub.repo_id", "hub.private")),
        (not config.hub.push, "hub.push", ("hub.tag", "hub.pull_request")),
        (name is not None, "images from files", ("data.image_column", "data.caption_column", "data.resize", "data.split")),
        (not on_hub, "a Hub data set", ("data.revision",)),
    ]
    for task, entry in TASKS.items():
        own = config.task == task
        rows.append((own, f"a task other than {task}", entry.idle))
        rows.append((not own, f"task={task}", own_keys(config, task, entry)))
        rows.append((own and grown, "a model that is built from random weights", entry.built))
    owners: dict[str, list[str]] = {}
    for source, entry in SOURCES.items():
        for key in own_keys(config, source, entry) if entry.named else ():
            owners.setdefault(key, []).append(source)
    for key, sources in owners.items():
        rows.append((name not in sources, f"data.name={' or '.join(sources)}", (key,)))
    return rows
