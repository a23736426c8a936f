"""Every setting of a run, as plain dataclasses; read from YAML and the command line by OmegaConf, nowhere else."""

import re
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sfumato.pipelines.choices import GUIDERS, SAMPLERS, SECOND


@dataclass
class DataConfig:
    """What is drawn.

    `name`: `openmoji`; `shapes`; a folder with metadata.csv, metadata.jsonl, caption .txt files or class sub-folders; a
    WebDataset .tar, a .parquet file or a folder of them; or the Hub id of a data set (`owner/name`).
    """

    name: str = "openmoji"
    resolution: int = 32
    channels: int = 3  # 1 grey, 3 RGB, 4 RGBA
    buckets: list[list[int]] = field(default_factory=list)  # [height, width] of several picture sizes; none: one square
    resize: Literal["crop", "pad", "stretch"] = "crop"
    random_flip: bool = False  # left to right, half of the time; wrong for text and for captions that name a side
    image_column: str | None = None  # null: file_name in metadata files, image in parquet and Hub data sets
    caption_column: str | None = None  # null: text; a text, a list of which one is drawn each time, or a class label
    split: str = "train"  # Hub data sets
    revision: str | None = None  # Hub data sets: commit, tag or branch; null: as `main` is when the pictures are prepared
    max_records: int | None = None  # read no more than these
    languages: list[str] = field(default_factory=lambda: ["en", "zh"])  # openmoji: whose captions
    skin_tones: bool = True  # openmoji: with the variants that differ only in skin tone
    words: list[str] = field(default_factory=list)  # openmoji: only pictures with one of these in the English name
    num_pictures: int = 16384  # shapes: how many to draw
    num_figures: int = 1  # shapes: in each picture, 1 or 2
    max_bad_share: float = 0.01  # a source with a larger share of unusable pictures stops the run
    cache_latents: bool = False  # encode all pictures by the VAE once, before training, and keep the result on disk
    cache_embeddings: bool = False  # the same for captions and a frozen text encoder
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
class AutoencoderConfig:
    """`task: autoencoder`: the VAE that is trained, and its loss."""

    model: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' AutoencoderKL
    kl_weight: float = 1e-4  # on the Kullback-Leibler divergence of each latent number from N(0, 1)
    sharpness_weight: float = 0.0  # on the error of differences between neighbouring pixels


@dataclass
class VaeConfig:
    """None: the identity, for a model that works on pixels. Else the folder or Hub id of an `AutoencoderKL`."""

    pretrained: str | None = None


@dataclass
class LoraConfig:
    """Train low-rank additions to the attention layers of `init_from`'s UNet and nothing else (Hu et al. 2022)."""

    rank: int = 0  # 0: train all weights
    alpha: float | None = None  # strength of the addition is alpha / rank; null: as large as the rank
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


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
    """The learning rate warms up, then decays with the fraction of steps or minutes done."""

    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"  # muon: for matrices, AdamW for the rest
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
    gradient_checkpointing: bool = False  # less memory, a second forward pass
    compile: Literal["no", "unet", "regional"] = "no"  # torch.compile of the UNet, whole or block by block
    num_workers: int = 0  # processes that prepare batches
    num_threads: int | None = None  # CPU: torch threads of a process; null shares out the cores
    trackers: list[str] | None = None  # such as tensorboard, wandb; null: tensorboard where it is installed
    max_bad_steps: int = 20  # so many steps in a row with a loss or gradient that is not finite end the run


@dataclass
class EmaConfig:
    """Averaged weights, which are what is exported. The decay rises as (1 + step) / (10 + step) up to `decay`."""

    decay: float = 0.999
    offload: bool = False  # keep the averages on the CPU: frees 4 bytes a parameter of GPU memory


@dataclass
class ValidationConfig:
    """Sample grids during training, with the same prompts and seeds each time."""

    every_steps: int | None = 1000
    prompts: list[str] = field(default_factory=list)  # empty: captions of held-out pictures
    sampler: str = "ddpm"  # ddpm, ddim, dpm++, dpm++-sde, unipc, deis, euler, euler-a or heun; stored in the exported folder
    num_inference_steps: int = 30  # it and the scale go into the exported folder's card
    guidance_scale: float = 3.0
    guider: str = "cfg"  # cfg, apg, zero-star, tangential, magnitude-aware, pag, slg or seg
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # the part of the steps that is guided
    seed: int = 0
    num_shapes: int = 256  # shapes: held-out captions judged at the end


@dataclass
class CheckpointConfig:
    """`resume`: `auto` takes up the newest checkpoint of `output_dir`, a path that one, null starts anew."""

    every_steps: int | None = 1000
    keep: int = 2
    resume: str | None = None


@dataclass
class HubConfig:
    """Where the result goes on the Hub. Token, name and rights are checked before training starts."""

    repo_id: str | None = None  # `name` or `owner/name`
    push: bool = False  # push the result at the end
    private: bool = False
    every_steps: int | None = None  # push checkpoints too, in the background, each to a branch step-N
    tag: str | None = None  # name for the result
    pull_request: bool = False  # propose the result instead of writing it
    variants: list[str] = field(default_factory=list)  # of the exported weights: fp16, raw (before averaging)
    max_shard_size: str = "10GB"  # of a file of weights


@dataclass
class Config:
    output_dir: str = "runs/run"
    seed: int = 0
    title: str = "A Sfumato model"
    task: Literal["text_to_image", "inpainting", "autoencoder"] = "text_to_image"  # what is trained: see training/tasks.py
    init_from: str | None = None  # fine-tune the model in this folder, of Stable Diffusion's form, or with this Hub id
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' UNet2DConditionModel
    vae: VaeConfig = field(default_factory=VaeConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of SfumatoDDPMScheduler
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hub: HubConfig = field(default_factory=HubConfig)


def _check_data(config: Config, need) -> None:
    need(config.data.resolution >= 8, "data.resolution", "must be at least 8 pixels")
    need(0 <= config.data.max_bad_share < 1, "data.max_bad_share", "must be in [0, 1)")
    need(config.data.channels in (1, 3, 4), "data.channels", "must be 1, 3 or 4")
    drawn = config.data.name in ("openmoji", "shapes")
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


def _check_models(config: Config, need) -> None:
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
    epsilon = config.scheduler.get("prediction_type", "epsilon") == "epsilon" and config.init_from is None
    need(
        not (epsilon and config.objective.min_snr_floor),
        "objective.min_snr_floor",
        "a floor on x_0 is unbounded on epsilon; use prediction_type sample or v_prediction",
    )
    need(
        not (epsilon and config.objective.weight == "min_snr" and config.scheduler.get("rescale_betas_zero_snr")),
        "objective.weight",
        "divides by an SNR of zero with epsilon prediction and zero terminal SNR",
    )
    need(config.autoencoder.kl_weight >= 0, "autoencoder.kl_weight", "must not be negative")
    need(config.autoencoder.sharpness_weight >= 0, "autoencoder.sharpness_weight", "must not be negative")
    other = config.task in ("inpainting", "autoencoder")
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
        rule = "comes from init_from; leave it out"
        need(not config.unet, "unet", rule)
        need(not config.scheduler, "scheduler", rule)
        need(config.vae.pretrained is None, "vae.pretrained", rule)
        need(config.text_encoder.pretrained is None, "text_encoder.pretrained", rule)


def _check_run(config: Config, need) -> None:
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
        ("hub", "every_steps"),
    ):
        value = getattr(getattr(config, section), key)
        need(value is None or value > 0, f"{section}.{key}", "must be positive, or null")
    need(config.checkpoint.keep > 0, "checkpoint.keep", "must be at least 1")
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
    need(config.validation.num_shapes > 0, "validation.num_shapes", "must be positive")
    need(0 <= config.validation.guidance_scale < 1000, "validation.guidance_scale", "must be in [0, 1000)")
    need(config.validation.num_inference_steps > 0, "validation.num_inference_steps", "must be positive")
    need(config.validation.sampler in SAMPLERS, "validation.sampler", f"choose one of {', '.join(SAMPLERS)}")
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
    given = config.init_from is not None
    sizes = ("vocab_size", "max_length", "hidden_size", "num_hidden_layers", "num_attention_heads", "embedding_std")
    rules = [
        (o.timesteps != "normal", "objective.timesteps=normal", "objective", ("log_snr_mean", "log_snr_std")),
        (o.weight != "min_snr", "objective.weight=min_snr", "objective", ("min_snr_gamma", "min_snr_floor")),
        (not config.lora.rank, "lora.rank", "lora", ("alpha", "target_modules")),
        (config.lora.rank, "lora.rank=0", "text_encoder", ("train",)),
        (given or config.text_encoder.pretrained, "a text encoder that is built anew", "text_encoder", sizes),
        (config.task != "autoencoder", "task=autoencoder", "autoencoder", ("model", "kl_weight", "sharpness_weight")),
        (config.task == "inpainting", "task=text_to_image", "validation", ("prompts",)),
        (d.name != "openmoji", "data.name=openmoji", "data", ("languages", "skin_tones", "words")),
        (d.name != "shapes", "data.name=shapes", "data", ("num_pictures", "num_figures")),
        (d.name != "shapes", "data.name=shapes", "validation", ("num_shapes",)),
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


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and `key.subkey=value` overrides; warns of settings without effect.

    Raises:
        ValueError: file missing, unknown key, wrong type, or a value that `check` refuses.
    """
    if not Path(path).is_file():
        raise ValueError(f"no config file at {path}; configs/*.yaml hold examples")
    if bad := [item for item in overrides if "=" not in item]:
        raise ValueError(f"expected key=value, got {', '.join(bad)}")
    try:
        given = [OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))]
        if any("${" in OmegaConf.to_yaml(layer) for layer in given):
            raise ValueError(f"{path}: values of the form ${{...}} are not read; a stranger's could name secrets of yours")
        for layer in given:
            for key in ("train.mixed_precision", "train.compile"):
                if OmegaConf.select(layer, key) is False:  # what YAML makes of a bare no
                    OmegaConf.update(layer, key, "no")
        merged = OmegaConf.merge(OmegaConf.structured(Config), *given)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]} (key: {getattr(error, 'full_key', '?')})") from error
    check(config)
    for line in idle(config):
        warnings.warn(line, stacklevel=2)
    return config


def dump(config: Config) -> str:
    """The whole config as YAML, enough to repeat the run."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
