"""Settings and checks of the tasks that have some. Free of torch: a config is checked before anything heavy is imported."""

from dataclasses import dataclass, field
from typing import Any

from sfumato.training.config.schema import Config


@dataclass
class UpscalingConfig:
    """`task: upscaling`: what small images it starts from, and how noisy they may be."""

    factor: int = 2  # images of data.resolution are drawn from images this many times smaller
    max_noise_level: int = 350  # the small image gets the noise of a timestep from 0 to this one


@dataclass
class AutoencoderConfig:
    """`task: autoencoder`: the VAE that is trained, and its loss."""

    model: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' AutoencoderKL
    kl_weight: float = 1e-4  # on the Kullback-Leibler divergence of each latent value from N(0, 1)
    sharpness_weight: float = 0.0  # on the error of differences between neighbouring pixels
    # On the squared error between the first channels of the latents and the downscaled image: a pixel model of that size
    # can continue in such latents (`init_from` and `vae.pretrained` together), and they can be viewed without decoding.
    thumbnail_weight: float = 0.0
    train_encoder: bool = True  # false, with init_from: only the decoder, so models that work in the latents stay valid
    latent_noise: float | None = None  # standard deviation of noise on latents in training; null: as the encoder predicts


@dataclass
class DistilConfig:
    """`task: distillation`: how a student learns to draw in a few steps."""

    segments: int = 1  # of the path from noise to image; 1: the whole path at once, which drawing in one or two steps needs
    max_guidance_scale: float = 2.5  # the teacher draws with scales from 1 to this one; larger ones act like this one
    guidance_width: int = 64  # width of the embedding by which the scale enters the network
    masks: bool = False  # the teacher inpaints: the student also reads a mask and the image around it
    student: str | None = (
        None  # start from this student of the same teacher, such as one with more segments, not from the teacher's weights
    )
    min_spread: float = 0.2  # the run stops if images differ by less than this fraction of what training images do


@dataclass
class MotionConfig:
    """`task: motion`: the adapter between the frames of a 2D model."""

    num_attention_heads: int = 4  # must divide the width of every level of the 2D model
    max_frames: int = 32  # of a clip, the most that one may ever have
    mid_block: bool = True  # whether the middle block of the UNet has motion layers too


def check_upscaling(config: Config, need) -> None:
    """Check the settings of the task; see `config.rules`."""
    settings = config.section(UpscalingConfig)
    need(settings.factor >= 2, "upscaling.factor", "must be at least 2")
    need(settings.max_noise_level >= 0, "upscaling.max_noise_level", "must not be negative")
    fits = config.data.resolution % max(1, settings.factor) == 0
    need(fits, "upscaling.factor", f"must divide data.resolution={config.data.resolution}")


def check_control(config: Config, need) -> None:
    """Check the settings of the task; see `config.rules`."""
    need(config.init_from is not None, "init_from", "task=control needs a trained model: name it")


def check_distillation(config: Config, need) -> None:
    """Check the settings of the task; see `config.rules`."""
    settings = config.section(DistilConfig)
    need(config.init_from is not None, "init_from", "task=distillation needs a trained model, the teacher: name it")
    need(1 <= settings.segments <= 16, "distil.segments", "must be from 1 to 16")
    need(settings.max_guidance_scale >= 1, "distil.max_guidance_scale", "must be at least 1")
    even = settings.guidance_width >= 4 and settings.guidance_width % 2 == 0
    need(even, "distil.guidance_width", "must be even and at least 4")
    need(0 <= settings.min_spread < 1, "distil.min_spread", "must be in [0, 1)")
    need(config.lora.rank == 0, "lora.rank", "is not for task=distillation")
    need(not config.objective.self_conditioning, "objective.self_conditioning", "is not for task=distillation")
    few = config.validation.sampler in ("lcm", "tcd")
    need(few, "validation.sampler", "must be lcm or tcd for task=distillation: others take steps the student never learned")
    plain = config.validation.guider == "cfg" and list(config.validation.guidance_interval) == [0.0, 1.0]
    need(plain, "validation.guider", "must be cfg at all steps for task=distillation: the scale is an input of the network")


def check_motion(config: Config, need) -> None:
    """Check the settings of the task; see `config.rules`."""
    settings = config.section(MotionConfig)
    need(config.init_from is not None, "init_from", "task=motion needs a trained image model: name it")
    need(settings.num_attention_heads >= 1, "motion.num_attention_heads", "must be at least 1")
    need(settings.max_frames >= 2, "motion.max_frames", "must be at least 2")


def check_autoencoder(config: Config, need) -> None:
    """Check the settings of the task; see `config.rules`."""
    settings = config.section(AutoencoderConfig)
    need(settings.kl_weight >= 0, "autoencoder.kl_weight", "must not be negative")
    need(settings.sharpness_weight >= 0, "autoencoder.sharpness_weight", "must not be negative")
    need(settings.thumbnail_weight >= 0, "autoencoder.thumbnail_weight", "must not be negative")
    need(settings.latent_noise is None or settings.latent_noise >= 0, "autoencoder.latent_noise", "must not be negative")
    need(config.init_from is None or not settings.model, "autoencoder.model", "comes from init_from; leave it out")
    rule = "shapes the latents; leave it out if only the decoder is trained"
    need(settings.train_encoder or not settings.thumbnail_weight, "autoencoder.thumbnail_weight", rule)
    alone = settings.train_encoder or config.init_from is not None
    need(alone, "autoencoder.train_encoder", "false needs a VAE to start from: set init_from")
    need(not (config.hub.push or config.hub.every_steps), "hub", "pushes pipelines, which task=autoencoder does not make")
    need(config.train.compile in ("no", "unet"), "train.compile", "choose no or unet for task=autoencoder")
    need(not config.ema.snapshot_steps, "ema.snapshot_steps", "is not for task=autoencoder")
