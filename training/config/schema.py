"""Every setting of a run, as plain dataclasses; read from YAML and the command line by OmegaConf, nowhere else."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar


@dataclass
class DataConfig:
    """What is drawn.

    `name`: `openmoji`; `shapes`; a folder with metadata.csv, metadata.jsonl, caption .txt files or class sub-folders; a
    WebDataset .tar, a .parquet file or a folder of them; or the Hub id of a data set (`owner/name`).
    """

    name: str = "openmoji"  # a named source, a folder, a file or a Hub id
    resolution: int = 32  # pixels of a side
    channels: int = 3  # 1 grey, 3 RGB, 4 RGBA
    buckets: list[list[int]] = field(default_factory=list)  # [height, width] of several sizes, the first one drawn
    resize: Literal["crop", "pad", "stretch"] = "crop"
    random_flip: bool = False  # left to right, half of the time; wrong for text and for captions that name a side
    # null: file_name in metadata files, image in parquet and Hub data sets; in a .tar, a field such as `input.png`
    image_column: str | None = None
    caption_column: str | None = None  # null: text; a text, a list of which one is drawn each time, or a class label
    split: str = "train"  # Hub data sets, and folders whose files or sub-folders are named after splits
    links_into: str | None = None  # a folder of your own that links in the data may lead into; null: no link may lead out
    revision: str | None = None  # Hub data sets: commit, tag or branch; null: as `main` is when the images are prepared
    max_records: int | None = None  # read no more than these
    languages: list[str] = field(default_factory=lambda: ["en", "zh"])  # openmoji: whose captions
    skin_tones: bool = True  # openmoji, iconify: with the variants that differ only in skin tone
    colours: bool = False  # openmoji: also captions that begin with the image's main colour, such as "pink pig face"
    recolours: int = 0  # openmoji: an image of one main colour also in so many others, such as "green soccer ball"; at most 8
    # openmoji: the unpacked folder of npm's emojibase-data, whose names, keywords and groups are captions too
    keywords: str | None = None
    words: list[str] = field(default_factory=list)  # openmoji, iconify: only images with one of these in the English name
    num_pictures: int = 16384  # shapes: how many to draw
    num_figures: int = 1  # shapes: in each image, 1 or 2
    # Read .tar or .parquet shards while training and store nothing: here, at https://, s3:// or hf:// addresses with `*` or
    # `{000..127}` in them, or of a Hub data set
    stream: bool = False
    stream_buffer: int = 4096  # stream: records in the memory of all processes together, among which the order is drawn
    stream_sample: int = 2048  # stream: records prepared beforehand, for the tokenizer, the grids and the scores
    max_bad_share: float = 0.01  # a source with a larger share of unusable images stops the run
    cache_latents: bool = False  # encode all images by the VAE once, before training, and keep the result on disk
    cache_embeddings: bool = False  # the same for captions and a frozen text encoder
    cache_dir: str = "~/.cache/sfumato"  # where sets are kept once they are prepared

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that are drawn: of the first bucket, or the square of `resolution`."""
        return (self.buckets[0][0], self.buckets[0][1]) if self.buckets else (self.resolution, self.resolution)


@dataclass
class TextEncoderConfig:
    """A CLIP text encoder: small and random, trained with the UNet; or `pretrained` (folder or Hub id), frozen."""

    pretrained: str | None = None  # a folder or Hub id, frozen unless `train` says otherwise
    train: bool | None = None  # None: train a random one, freeze a pretrained one
    vocab_size: int = 2048  # at most; 514 are bytes and marks, the rest is learned from the captions
    max_length: int = 32  # tokens, two marks included
    hidden_size: int = 128  # width of its layers and of the UNet's cross-attention
    num_hidden_layers: int = 2  # how many layers
    num_attention_heads: int = 4  # a divisor of hidden_size
    embedding_std: float = 0.5  # of the random token and position embeddings
    # With init_from: so many further tokens, learned from words of the captions that the model does not know (of another
    # language, names of one's own). Those that it knows keep theirs. `max_length` may then be longer than the model's.
    extra_vocab: int = 0


@dataclass
class VaeConfig:
    """None: the identity, for a model that works on pixels. Else the folder or Hub id of an `AutoencoderKL`."""

    pretrained: str | None = None  # a run of task=autoencoder, a folder or a Hub id
    # each value covers so many pixels a side, as the source has it (molecules: 8): grids of fewer places than 8, in stock
    # pipelines, whose sides are multiples of 8
    repeat: int = 1


@dataclass
class LoraConfig:
    """Train low-rank additions to the attention layers of `init_from`'s UNet and nothing else (Hu et al. 2022)."""

    rank: int = 0  # 0: train all weights
    alpha: float | None = None  # strength of the addition is alpha / rank; null: as large as the rank
    # layers of the UNet that get an adapter
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


@dataclass
class ObjectiveConfig:
    """What is predicted, which noise levels are trained, how they are weighted, how often the caption is dropped.

    `target`: null: noise, image or v, as `scheduler.prediction_type` says; `flow`: the velocity of flow matching. With
    `scheduler.variance_type: learned_range` the network learns its variance too, by the hybrid loss.
    """

    target: Literal["flow"] | None = None
    timesteps: Literal["uniform", "normal", "laplace"] = "uniform"  # the latter two: of log-SNR; see objectives.py
    log_snr_mean: float = 0.0  # of the noise levels trained on, for timesteps=normal and laplace
    log_snr_std: float = 2.0  # their spread, in nats
    low_discrepancy: bool = True  # spread the noise levels evenly over every batch, rather than draw each by itself
    importance: bool = False  # draw noise levels as often as their loss is large, and weight them down
    weight: Literal["unit", "min_snr", "soft_min_snr", "p2", "edm", "debiased"] = "unit"  # see objectives.loss_weight
    min_snr_gamma: float = 5.0  # soft_min_snr's too
    min_snr_floor: float = 0.0  # least weight on x_0, for the noisiest steps
    p2_gamma: float = 1.0  # of weight=p2
    edm_sigma_data: float = 0.5  # of weight=edm: deviation of the images' values
    vlb_weight: float = 0.001  # of the variational bound beside the loss, for a learned variance
    offset_noise: float = 0.0  # strength of noise that is the same all over a channel; 0.1 is usual
    noise_candidates: int = 1  # of so many, the noise nearest to the image is taken (immiscible noise); 8 is usual
    self_conditioning: bool = False  # the network also reads its last x_0; such a model opens with trust_remote_code only
    caption_dropout: float = 0.1  # share of captions left out, which guidance needs
    # what the empty caption stands for: the data, or pure noise. Guidance by s then draws from about p(x | caption)^s: what
    # is likeliest, with fewer mistakes and less variety
    empty_caption: Literal["data", "noise"] = "data"


@dataclass
class OptimConfig:
    """The learning rate warms up, then decays with the fraction of steps or minutes done."""

    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"  # muon: for matrices and kernels, AdamW beside
    lr: float = 1e-3  # learning rate after the warm-up
    betas: tuple[float, float] = (0.9, 0.99)  # decay of AdamW's averages of gradients and of their squares
    eps: float = 1e-8  # of AdamW's denominator
    weight_decay: float = 0.01  # of AdamW; a step shrinks weights by learning rate x this
    lr_warmup_steps: int = 100  # until the learning rate is whole
    lr_decay: Literal["constant", "linear", "cosine", "trapezoid"] = "cosine"
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it


@dataclass
class TrainConfig:
    """How long and how. The run ends at `max_steps` or `max_minutes`, whichever comes first.

    Minutes of the clock from the first step on: the grids and saves on the way are part of them, those at the end are not.
    """

    max_steps: int | None = None  # optimizer steps
    max_minutes: float | None = None  # minutes of the clock
    batch_size: int = 32  # per process
    gradient_accumulation_steps: int = 1  # batches whose gradients add up to one step
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # null: the setting of `accelerate launch`
    gradient_checkpointing: bool = False  # less memory, a second forward pass
    # torch.compile: of the UNet, whole or block by block; of the whole loss, noise and text encoder with it; or that as
    # CUDA graphs, which spares small networks the time between kernels
    compile: Literal["no", "unet", "regional", "loss", "graphs"] = "no"
    num_workers: int = 0  # processes that prepare batches
    num_threads: int | None = None  # CPU: torch threads of a process; null shares out the cores that the run may use
    trackers: list[str] | None = None  # such as tensorboard, trackio, wandb; null: tensorboard where it is installed
    log_every_steps: int | None = None  # how many steps between two looks at the device; null: 1 on a CPU, else 10
    patience: int | None = None  # so many validations in a row without a better score of checkpoint.best_by end the run
    webhook: str | None = None  # an address that is told how the run ended; as Slack, Discord and others take it
    max_bad_steps: int = 20  # so many steps in a row with a loss or gradient that is not finite end the run


@dataclass
class EmaConfig:
    """Averaged weights, which are what is exported. The decay rises as (1 + step) / (10 + step) up to `decay`."""

    decay: float = 0.999  # 0.99 for some hundred steps, 0.9999 for a hundred thousand
    offload: bool = False  # keep the averages on the CPU: frees 4 bytes a parameter of GPU memory
    snapshot_steps: int | None = None  # so often two more averages go to `ema/`: `sfumato ema` makes any length of them


@dataclass
class ValidationConfig:
    """Sample grids during training, with the same prompts and seeds each time."""

    every_steps: int | None = 1000  # steps between two grids; null: at the end alone
    at_start: bool = False  # a grid of step 0 too
    prompts: list[str] = field(default_factory=list)  # empty: captions of held-out images
    sampler: str = "ddpm"  # ddpm, ddim, dpm++, dpm++-sde, unipc, deis, euler, euler-a or heun; stored in the exported folder
    num_inference_steps: int = 30  # it and the scale go into the exported folder's card
    guidance_scale: float = 3.0  # 1: no guidance
    guider: str = "cfg"  # cfg, apg, zero-star, tangential, magnitude-aware, pag, slg or seg
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # the part of the steps that is guided
    seed: int = 0  # of the noise of image 0; image i has seed + i
    num_held_out: int = 64  # images of the held-out loss, which goes to validation.jsonl; see training/quality/held_out.py
    num_judged: int = 256  # at the end: held-out captions (shapes), or images (upscaling, control)


@dataclass
class CheckpointConfig:
    """`resume`: `auto` takes up the newest checkpoint of `output_dir`, a path that one, null starts a new run."""

    every_steps: int | None = 1000  # steps between two checkpoints
    every_minutes: float | None = 10.0  # of training, since the last one: so much is lost at the most
    keep: int = 2  # so many, the newest
    resume: str | None = None  # auto, a checkpoint, or null
    # Keep the best model in `best/`, by held_out_loss, FD, KID, a score of the task's own or a metric's. (Not by
    # held_out_loss where few noise levels are trained: images went on to get better while it got worse.)
    best_by: str | None = None


@dataclass
class HubConfig:
    """Where the result goes on the Hub. Token, name and rights are checked before training starts."""

    repo_id: str | None = None  # `name` or `owner/name`
    push: bool = False  # push the result at the end
    private: bool = False  # make a new repository private
    every_steps: int | None = None  # push checkpoints too, in the background, each to a branch step-N
    tag: str | None = None  # name for the result
    pull_request: bool = False  # propose the result instead of writing it
    variants: list[str] = field(default_factory=list)  # of the exported weights: fp16, raw (before averaging)
    max_shard_size: str = "10GB"  # of a file of weights


T = TypeVar("T")


@dataclass
class Config:
    """A run. The sections of tasks, such as `upscaling` and `autoencoder`, are mounted by `load.config_class`."""

    output_dir: str = "runs/run"  # the run folder
    seed: int = 0  # of weights, noise and order
    title: str = "A Sfumato model"  # the model's name, on its card
    task: str = "text_to_image"  # a name of registries.TASKS
    init_from: str | None = None  # fine-tune the model in this folder, of Stable Diffusion's form, or with this Hub id
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' UNet2DConditionModel
    vae: VaeConfig = field(default_factory=VaeConfig)
    scheduler: dict[str, Any] = field(default_factory=dict)  # of SfumatoDDPMScheduler; for flow, of SfumatoFlowScheduler
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
