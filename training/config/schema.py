"""Every setting of a run, as plain dataclasses; they are filled from YAML and the command line in `load` only."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar


@dataclass
class DataConfig:
    """The images and captions to train on.

    `name`: `openmoji`; `shapes`; a folder with metadata.csv, metadata.jsonl, caption .txt files or class sub-folders; a
    WebDataset .tar, a .parquet file or a folder of them; or the Hub id of a data set (`owner/name`).
    """

    name: str = "openmoji"  # a named source, a folder, a file or a Hub id
    resolution: int = 32  # side of the images, in pixels
    channels: int = 3  # 1 grey, 3 RGB, 4 RGBA
    buckets: list[list[int]] = field(default_factory=list)  # [height, width] of each image size; samples have the first one
    resize: Literal["crop", "pad", "stretch"] = "crop"
    random_flip: bool = False  # mirror left to right, half of the time; wrong for text and for captions that name a side
    # null: file_name in metadata files, image in parquet and Hub data sets; in a .tar, a field such as `input.png`
    image_column: str | None = None
    caption_column: str | None = None  # null: text; holds a text, a list from which one is drawn each time, or a class label
    split: str = "train"  # for Hub data sets, and folders whose files or sub-folders are named after splits
    links_into: str | None = None  # a folder of yours that links in the data may point into; null: links must stay inside
    revision: str | None = None  # Hub data sets: commit, tag or branch; null: `main` at the time the images are prepared
    max_records: int | None = None  # read at most this many records
    languages: list[str] = field(default_factory=lambda: ["en", "zh"])  # openmoji: languages of the captions
    skin_tones: bool = True  # openmoji, iconify: include the variants that differ only in skin tone
    colours: bool = False  # openmoji: add captions that begin with the image's main colour, such as "pink pig face"
    recolours: int = 0  # openmoji: add images of one main colour in this many others, such as "green soccer ball"; at most 8
    # openmoji: the unpacked folder of npm's emojibase-data, whose names, keywords and groups become captions too
    keywords: str | None = None
    words: list[str] = field(default_factory=list)  # openmoji, iconify: only images with one of these in the English name
    num_pictures: int = 16384  # shapes: how many images to draw
    num_figures: int = 1  # shapes: figures in each image, 1 or 2
    # Read .tar or .parquet shards during training and store nothing: local shards, those at https://, s3:// or hf://
    # addresses, which may contain `*` or `{000..127}`, or those of a Hub data set
    stream: bool = False
    stream_buffer: int = 4096  # stream: records in the shuffle buffers of all processes together
    stream_sample: int = 2048  # stream: records prepared before training, for the tokenizer, the grids and the scores
    max_bad_share: float = 0.01  # a source with a larger share of unusable images stops the run
    cache_latents: bool = False  # encode all images with the VAE once, before training, and keep the result on disk
    cache_embeddings: bool = False  # the same for captions and a frozen text encoder
    cache_dir: str = "~/.cache/sfumato"  # where prepared data sets are kept

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that are sampled: the first bucket, or a square of side `resolution`."""
        return (self.buckets[0][0], self.buckets[0][1]) if self.buckets else (self.resolution, self.resolution)


@dataclass
class TextEncoderConfig:
    """A CLIP text encoder: small and random, trained with the UNet; or `pretrained` (folder or Hub id), frozen."""

    pretrained: str | None = None  # a folder or Hub id, frozen unless `train` says otherwise
    train: bool | None = None  # null: train a random one, freeze a pretrained one
    vocab_size: int = 2048  # upper limit; 514 are bytes and special tokens, the rest is learned from the captions
    max_length: int = 32  # in tokens, including two special tokens
    hidden_size: int = 128  # width of its layers and of the UNet's cross-attention
    num_hidden_layers: int = 2  # number of layers
    num_attention_heads: int = 4  # a divisor of hidden_size
    embedding_std: float = 0.5  # standard deviation of the random token and position embeddings
    # With init_from: this many further tokens, learned from caption words that the model does not know (another language,
    # names of your own). Words that it knows keep their tokens. `max_length` may then be longer than the model's.
    extra_vocab: int = 0


@dataclass
class VaeConfig:
    """The identity, for a model that works on pixels, or with `pretrained` an `AutoencoderKL`."""

    pretrained: str | None = None  # a run of task=autoencoder, a folder or a Hub id
    # each value covers a square of this many pixels per side, as the source requires (molecules: 8); this allows grids smaller
    # than 8 in stock pipelines, whose sides are multiples of 8
    repeat: int = 1


@dataclass
class LoraConfig:
    """Train low-rank additions to the attention layers of `init_from`'s UNet and nothing else (Hu et al. 2022)."""

    rank: int = 0  # 0: train all weights
    alpha: float | None = None  # the addition is scaled by alpha / rank; null: equal to the rank
    # layers of the UNet that get an adapter
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


@dataclass
class ObjectiveConfig:
    """What is predicted, which noise levels are trained, how they are weighted, and how often the caption is dropped.

    `target: null` predicts noise, image or v, as `scheduler.prediction_type` says; `target: flow` predicts the velocity of
    flow matching. With `scheduler.variance_type: learned_range` the network also learns its variance, with the hybrid loss.
    """

    target: Literal["flow"] | None = None
    timesteps: Literal["uniform", "normal", "laplace"] = "uniform"  # the latter two: of log-SNR; see objectives.py
    log_snr_mean: float = 0.0  # mean log-SNR of the noise levels, for timesteps=normal and laplace
    log_snr_std: float = 2.0  # its standard deviation, in nats
    low_discrepancy: bool = True  # spread noise levels evenly over every batch instead of drawing each independently
    importance: bool = False  # draw noise levels with a large loss more often, and weight them down accordingly
    weight: Literal["unit", "min_snr", "soft_min_snr", "p2", "edm", "debiased"] = "unit"  # see objectives.loss_weight
    min_snr_gamma: float = 5.0  # for weight=min_snr and soft_min_snr
    min_snr_floor: float = 0.0  # for weight=min_snr: smallest weight on x_0, for the noisiest steps
    p2_gamma: float = 1.0  # for weight=p2
    edm_sigma_data: float = 0.5  # for weight=edm: standard deviation of the images' values
    vlb_weight: float = 0.001  # weight of the variational bound that is added to the loss for a learned variance
    offset_noise: float = 0.0  # strength of noise that is constant over each channel; 0.1 is usual
    noise_candidates: int = 1  # of this many, the noise nearest to the image is used (immiscible noise); 8 is usual
    self_conditioning: bool = False  # the network also reads its last x_0; such a model opens only with trust_remote_code
    caption_dropout: float = 0.1  # share of captions that are dropped, which guidance needs
    # what the empty caption stands for: the data, or pure noise. With noise, guidance by s samples from about
    # p(x | caption)^s: the likeliest images, with fewer mistakes and less variety
    empty_caption: Literal["data", "noise"] = "data"


@dataclass
class OptimConfig:
    """The learning rate warms up, then decays with the fraction of steps or minutes done."""

    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"  # muon: for matrices and kernels, with AdamW for the rest
    lr: float = 1e-3  # learning rate after the warm-up
    betas: tuple[float, float] = (0.9, 0.99)  # decay rates of AdamW's averages of gradients and of their squares
    eps: float = 1e-8  # added to AdamW's denominator
    weight_decay: float = 0.01  # decoupled, as in AdamW; a step shrinks weights by learning rate x this
    lr_warmup_steps: int = 100  # steps until the full learning rate is reached
    lr_decay: Literal["constant", "linear", "cosine", "trapezoid"] = "cosine"
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it


@dataclass
class TrainConfig:
    """How long and how to train. The run ends at `max_steps` or `max_minutes`, whichever comes first.

    Minutes are wall-clock time from the first step on: sample grids and saves along the way count, those at the end do not.
    """

    max_steps: int | None = None  # optimizer steps
    max_minutes: float | None = None  # wall-clock minutes
    batch_size: int = 32  # per process
    gradient_accumulation_steps: int = 1  # batches whose gradients add up to one step
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # null: the setting of `accelerate launch`
    gradient_checkpointing: bool = False  # saves memory at the cost of a second forward pass
    # torch.compile: the UNet, whole or block by block (regional); the whole loss, including noise and text encoder; or the
    # same as CUDA graphs, which saves small networks the time between kernels
    compile: Literal["no", "unet", "regional", "loss", "graphs"] = "no"
    num_workers: int = 0  # processes that prepare batches
    num_threads: int | None = None  # CPU: torch threads per process; null: divide the cores that the run may use
    trackers: list[str] | None = None  # such as tensorboard, trackio, wandb; null: tensorboard if it is installed
    log_every_steps: int | None = None  # steps between two reads of the loss from the device; null: 1 on a CPU, else 10
    patience: int | None = None  # end after this many validations in a row without a better score of checkpoint.best_by
    webhook: str | None = None  # a URL that receives how the run ended, in the format of Slack, Discord and others
    max_bad_steps: int = 20  # end after this many steps in a row with a loss or gradient that is not finite


@dataclass
class EmaConfig:
    """Averaged weights, which are the ones that are exported. The decay rises as (1 + step) / (10 + step) up to `decay`."""

    decay: float = 0.999  # 0.99 for a few hundred steps, 0.9999 for a hundred thousand
    offload: bool = False  # keep the averages on the CPU, which frees 4 bytes of GPU memory per parameter
    # steps between snapshots of two further averages in `ema/`, from which `sfumato ema` makes an average of any length
    snapshot_steps: int | None = None


@dataclass
class ValidationConfig:
    """Sample grids during training, with the same prompts and seeds each time."""

    every_steps: int | None = 1000  # steps between two grids; null: only at the end
    at_start: bool = False  # also draw a grid at step 0
    prompts: list[str] = field(default_factory=list)  # empty: captions of held-out images
    # ddpm, ddim, dpm++, dpm++-sde, unipc, deis, euler, euler-a, heun, lcm or tcd; stored in the exported folder
    sampler: str = "ddpm"
    num_inference_steps: int = 30  # this and guidance_scale are stated on the exported model's card
    guidance_scale: float = 3.0  # 1: no guidance
    guider: str = "cfg"  # cfg, apg, zero-star, tangential, magnitude-aware, pag, slg or seg
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # the part of the steps that is guided
    seed: int = 0  # seed of the noise of image 0; image i uses seed + i
    num_held_out: int = 64  # images for the held-out loss, written to validation.jsonl; see training/quality/held_out.py
    num_judged: int = 256  # held-out captions (shapes) or images (upscaling, control) that are judged at the end


@dataclass
class CheckpointConfig:
    """`resume`: `auto` continues from the newest checkpoint of `output_dir`, a path from that one; null starts a new run."""

    every_steps: int | None = 1000  # steps between two checkpoints
    every_minutes: float | None = 10.0  # minutes of training between two checkpoints, the most that can be lost
    keep: int = 2  # how many of the newest are kept
    resume: str | None = None  # auto, a checkpoint, or null
    # Keep the best model in `best/`, judged by held_out_loss, FD, KID, or a score of the task or of a metric. (Not by
    # held_out_loss if few noise levels are trained: images kept getting better while it got worse.)
    best_by: str | None = None


@dataclass
class HubConfig:
    """Where the result goes on the Hub. Token, name and rights are checked before training starts."""

    repo_id: str | None = None  # `name` or `owner/name`
    push: bool = False  # push the result at the end
    private: bool = False  # make a new repository private
    every_steps: int | None = None  # also push checkpoints, in the background, each to a branch step-N
    tag: str | None = None  # tag for the result
    pull_request: bool = False  # propose the result instead of writing it
    variants: list[str] = field(default_factory=list)  # further copies of the exported weights: fp16, raw (before averaging)
    max_shard_size: str = "10GB"  # largest size of one weights file


T = TypeVar("T")


@dataclass
class Config:
    """All settings of a run. Sections of tasks, such as `upscaling` and `autoencoder`, are mounted by `load.config_class`."""

    output_dir: str = "runs/run"  # the run folder
    seed: int = 0  # random seed of weights, noise and data order
    title: str = "A Sfumato model"  # the model's name, on its card
    task: str = "text_to_image"  # a name in registries.TASKS
    init_from: str | None = None  # fine-tune the model in this folder or with this Hub id, of Stable Diffusion's form
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' UNet2DConditionModel
    vae: VaeConfig = field(default_factory=VaeConfig)
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of SfumatoDDPMScheduler (flow: SfumatoFlowScheduler)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def section(self, kind: type[T]) -> T:
        """The mounted section whose settings are of this class."""
        return next(value for value in vars(self).values() if isinstance(value, kind))
