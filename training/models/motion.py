"""A frozen 2D model with a motion adapter, the only part that is trained."""

import inspect
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.motion import FrameVae, MotionUNet, build_adapter
from sfumato.training.config.schema import Config
from sfumato.training.models.denoiser import learns_variance

# Settings of a UNet that have another name, or no effect, in diffusers' network for clips.
_RENAMED = {"attention_head_dim", "down_block_types", "up_block_types", "mid_block_type", "sample_size"}


def add_motion(pipe: SfumatoPipeline, config: Config, settings: dict[str, Any]) -> None:
    """Put a motion adapter into a 2D model, and freeze the rest; a model that has one already keeps it.

    Args:
        settings: of `pipelines.motion.build_adapter`.

    Raises:
        ValueError: the model does not draw images, diffusers' network for clips lacks something it has, or the data are
            not clips of such images.
    """
    source, channels = f"init_from={config.init_from!r}", config.data.channels
    if not isinstance(pipe.unet, MotionUNet):
        if pipe.reads is not None or pipe.controlnet is not None or pipe.codec is not None or learns_variance(pipe.scheduler):
            raise ValueError(f"{source} is not a text-to-image model whose network reads only noise and text")
        each = pipe.vae.config.in_channels
        if channels % each or channels < 2 * each:
            raise ValueError(f"data.channels={channels} are not frames of {each} channels, as {source} draws")
        pipe.register_modules(
            unet=_animated(pipe.unet, config.seed, settings, source), vae=FrameVae(pipe.vae, channels // each)
        )
    if pipe.vae.config.in_channels != channels:
        raise ValueError(f"data.channels={channels}: {source} draws {pipe.vae.config.in_channels}")
    most: Any = pipe.unet.config["motion_max_seq_length"]
    if pipe.vae.frames > most:
        raise ValueError(f"motion.max_frames={most}: the clips have {pipe.vae.frames} frames")
    pipe.vae.requires_grad_(False).eval()
    pipe.text_encoder.requires_grad_(False).eval()
    pipe.unet.requires_grad_(False)
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_("motion_modules." in name)
    pipe.unet.train()


def _animated(unet: UNet2DConditionModel, seed: int, settings: dict[str, Any], source: str) -> MotionUNet:
    """A 2D network with a new adapter."""
    known, own = inspect.signature(UNetMotionModel.__init__).parameters, dict(unet.config)
    usual = {name: value.default for name, value in inspect.signature(UNet2DConditionModel.__init__).parameters.items()}
    lost = [
        name for name, value in own.items()
        if name in usual and name not in known and name not in _RENAMED and value != usual[name]
    ]  # fmt: skip
    lost += [name for name in ("addition_embed_type", "encoder_hid_dim_type") if own.get(name) is not None]
    if lost:
        raise ValueError(
            f"{source}: diffusers' UNetMotionModel does not have unet.{', unet.'.join(lost)}; "
            "train a model without them, such as with configs/frames.yaml"
        )
    torch.manual_seed(seed)
    try:
        animated: Any = MotionUNet.from_unet2d(unet, build_adapter(own, **settings))
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source}: diffusers' UNetMotionModel cannot take its UNet: {reason}") from error
    animated.register_to_config(sample_size=unet.config["sample_size"])
    if missing := sorted(set(unet.state_dict()) - set(animated.state_dict())):
        raise ValueError(f"{source}: diffusers' UNetMotionModel would lose {len(missing)} weights, such as {missing[0]}")
    return animated
