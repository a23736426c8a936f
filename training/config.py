"""Every setting of a run, as plain dataclasses; read from YAML and the command line by OmegaConf, nowhere else."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError


@dataclass
class DataConfig:
    """What is drawn. `name`: `openmoji`, `shapes`, or a folder of pictures with captions."""

    name: str = "openmoji"
    resolution: int = 32
    languages: list[str] = field(default_factory=lambda: ["en", "zh"])  # openmoji: whose captions
    skin_tones: bool = True  # openmoji: with the variants that differ only in skin tone
    words: list[str] = field(default_factory=list)  # openmoji: only pictures with one of these in the English name
    num_pictures: int = 16384  # shapes: how many to draw
    max_bad_share: float = 0.01  # a folder with a larger share of unusable pictures stops the run
    cache_dir: str = "~/.cache/sfumato"


@dataclass
class TextEncoderConfig:
    """A CLIP text encoder: small and random, trained with the UNet; or `pretrained` (folder or Hub id), frozen."""

    pretrained: str | None = None
    train: bool | None = None  # None: train a random one, freeze a pretrained one
    vocab_size: int = 2048  # at most; 514 are bytes and marks, the rest is learned from the captions
    max_length: int = 32  # tokens, two marks included
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    embedding_std: float = 0.5  # of the random token and position embeddings


@dataclass
class VaeConfig:
    """None: the identity, for a model that works on pixels. Else the folder or Hub id of an `AutoencoderKL`."""

    pretrained: str | None = None


@dataclass
class ObjectiveConfig:
    """Which noise levels are trained, how they are weighted, how often the caption is dropped."""

    timesteps: Literal["uniform", "normal"] = "uniform"  # normal: log-SNR from N(mean, std)
    log_snr_mean: float = 0.0
    log_snr_std: float = 2.0
    weight: Literal["unit", "min_snr"] = "unit"
    min_snr_gamma: float = 5.0
    min_snr_floor: float = 0.0  # least weight on x_0, for the noisiest steps
    caption_dropout: float = 0.1


@dataclass
class OptimConfig:
    """AdamW; the learning rate warms up, then decays with the fraction of steps or minutes done."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    lr_warmup_steps: int = 100
    lr_decay: Literal["constant", "linear", "cosine"] = "cosine"
    max_grad_norm: float = 1.0


@dataclass
class TrainConfig:
    """How long and how. The run ends at `max_steps` or `max_minutes` of training, whichever comes first."""

    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 32  # per process
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # null: what `accelerate launch` was told
    num_workers: int = 0  # processes that prepare batches
    num_threads: int | None = None  # CPU: torch threads of a process; null shares out the cores
    max_bad_steps: int = 20  # so many steps in a row with a loss or gradient that is not finite end the run


@dataclass
class EmaConfig:
    """Averaged weights, which are what is exported. The decay rises as (1 + step) / (10 + step) up to `decay`."""

    decay: float = 0.999


@dataclass
class ValidationConfig:
    """Sample grids during training, with the same prompts and seeds each time."""

    every_steps: int | None = 1000
    prompts: list[str] = field(default_factory=list)  # empty: captions of held-out pictures
    num_inference_steps: int = 30
    guidance_scale: float = 3.0
    seed: int = 0
    num_shapes: int = 256  # shapes: held-out captions judged at the end


@dataclass
class CheckpointConfig:
    """`resume`: `auto` takes up the newest checkpoint of `output_dir`, a path that one, null starts anew."""

    every_steps: int | None = 1000
    keep: int = 2
    resume: str | None = None


@dataclass
class Config:
    output_dir: str = "runs/run"
    seed: int = 0
    title: str = "A Sfumato model"
    data: DataConfig = field(default_factory=DataConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' UNet2DConditionModel
    vae: VaeConfig = field(default_factory=VaeConfig)
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of SfumatoDDPMScheduler
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


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

    need(config.data.resolution >= 8, "data.resolution", "must be at least 8 pixels")
    need(0 <= config.data.max_bad_share < 1, "data.max_bad_share", "must be in [0, 1)")
    need(config.data.num_pictures > 0, "data.num_pictures", "must be positive")
    need(set(config.data.languages) <= {"en", "zh"} and config.data.languages != [], "data.languages", "choose en, zh or both")
    need(config.text_encoder.vocab_size >= 514, "text_encoder.vocab_size", "must be at least 514 (all bytes and two marks)")
    need(config.text_encoder.max_length >= 3, "text_encoder.max_length", "must be at least 3")
    heads = config.text_encoder.num_attention_heads
    need(
        heads > 0 and config.text_encoder.hidden_size % heads == 0, "text_encoder.hidden_size", f"must divide by {heads} heads"
    )
    need(0 <= config.objective.caption_dropout <= 1, "objective.caption_dropout", "must be in [0, 1]")
    need(config.objective.log_snr_std > 0, "objective.log_snr_std", "must be positive")
    need(config.objective.min_snr_gamma > 0, "objective.min_snr_gamma", "must be positive")
    gamma = config.objective.min_snr_gamma
    need(0 <= config.objective.min_snr_floor <= gamma, "objective.min_snr_floor", f"must be in [0, min_snr_gamma={gamma}]")
    if config.objective.min_snr_floor and config.scheduler.get("prediction_type", "epsilon") == "epsilon":
        wrong.append(
            "objective.min_snr_floor: a floor on x_0 is unbounded on epsilon; use prediction_type sample or v_prediction"
        )
    need(config.optim.lr > 0, "optim.lr", "must be positive")
    need(config.optim.lr_warmup_steps >= 0, "optim.lr_warmup_steps", "must not be negative")
    need(config.optim.max_grad_norm > 0, "optim.max_grad_norm", "must be positive")
    need(0 <= config.ema.decay < 1, "ema.decay", "must be in [0, 1)")
    for key in ("batch_size", "gradient_accumulation_steps", "max_bad_steps"):
        need(getattr(config.train, key) > 0, f"train.{key}", "must be positive")
    for section, key in (
        ("train", "max_steps"),
        ("train", "max_minutes"),
        ("checkpoint", "every_steps"),
        ("validation", "every_steps"),
    ):
        value = getattr(getattr(config, section), key)
        need(value is None or value > 0, f"{section}.{key}", "must be positive, or null")
    need(config.checkpoint.keep > 0, "checkpoint.keep", "must be at least 1")
    need(config.validation.num_inference_steps > 0, "validation.num_inference_steps", "must be positive")
    if config.train.max_steps is None and config.train.max_minutes is None:
        wrong.append("train.max_steps, train.max_minutes: set at least one, so that the run ends")
    if config.objective.weight == "min_snr" and config.scheduler.get("rescale_betas_zero_snr"):
        if config.scheduler.get("prediction_type") == "epsilon":
            wrong.append("objective.weight='min_snr': divides by an SNR of zero with epsilon prediction and zero terminal SNR")
    if wrong:
        raise ValueError("these settings cannot work:\n  " + "\n  ".join(wrong))


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and `key.subkey=value` overrides.

    Raises:
        ValueError: file missing, unknown key, wrong type, or a value that `check` refuses.
    """
    if not Path(path).is_file():
        raise ValueError(f"no config file at {path}; configs/*.yaml hold examples")
    if bad := [item for item in overrides if "=" not in item]:
        raise ValueError(f"expected key=value, got {', '.join(bad)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]} (key: {getattr(error, 'full_key', '?')})") from error
    check(config)
    return config


def dump(config: Config) -> str:
    """The whole config as YAML, enough to repeat the run."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
