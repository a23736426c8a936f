"""Settings and checks of the tasks that have some. Free of torch: a config is checked before anything heavy is imported."""

from dataclasses import dataclass, field
from typing import Any

from sfumato.training.config.schema import Config


@dataclass
class UpscalingConfig:
    """`task: upscaling`: from what images, and how noisy they may be."""

    factor: int = 2  # images of data.resolution are drawn from those of this part of it
    max_noise_level: int = 350  # the small image gets the noise of a timestep from 0 to this one


@dataclass
class AutoencoderConfig:
    """`task: autoencoder`: the VAE that is trained, and its loss."""

    model: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' AutoencoderKL
    kl_weight: float = 1e-4  # on the Kullback-Leibler divergence of each latent number from N(0, 1)
    sharpness_weight: float = 0.0  # on the error of differences between neighbouring pixels


@dataclass
class MotionConfig:
    """`task: motion`: the adapter between the frames of a 2D model."""

    num_attention_heads: int = 4  # must divide the width of every level of the 2D model
    max_frames: int = 32  # of a clip, as long as one may ever be
    mid_block: bool = True  # whether the middle of the UNet has one too


def check_upscaling(config: Config, need) -> None:
    """Check the settings of the task; see `config.rules`."""
    settings = config.section(UpscalingConfig)
    need(settings.factor >= 2, "upscaling.factor", "must be at least 2")
    need(settings.max_noise_level >= 0, "upscaling.max_noise_level", "must not be negative")
    fits = config.data.resolution % max(1, settings.factor) == 0
    need(fits, "upscaling.factor", f"must divide data.resolution={config.data.resolution}")


def check_control(config: Config, need) -> None:
    """Check the settings of the task; see `config.rules`."""
    need(config.init_from is not None, "init_from", "task=control is for a trained model: name it")


def check_motion(config: Config, need) -> None:
    """Check the settings of the task; see `config.rules`."""
    settings = config.section(MotionConfig)
    need(config.init_from is not None, "init_from", "task=motion is for a trained model of pictures: name it")
    need(settings.num_attention_heads >= 1, "motion.num_attention_heads", "must be at least 1")
    need(settings.max_frames >= 2, "motion.max_frames", "must be at least 2")


def check_autoencoder(config: Config, need) -> None:
    """Check the settings of the task; see `config.rules`."""
    settings = config.section(AutoencoderConfig)
    need(settings.kl_weight >= 0, "autoencoder.kl_weight", "must not be negative")
    need(settings.sharpness_weight >= 0, "autoencoder.sharpness_weight", "must not be negative")
    need(config.init_from is None, "init_from", "is not for task=autoencoder")
    need(not (config.hub.push or config.hub.every_steps), "hub", "pushes pipelines, which task=autoencoder does not make")
    need(config.train.compile != "regional", "train.compile", "choose no or unet for task=autoencoder")
    need(not config.ema.snapshot_steps, "ema.snapshot_steps", "is not for task=autoencoder")
