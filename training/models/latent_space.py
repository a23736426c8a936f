"""From images to the space that the UNet works in."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from sfumato.pipelines.motion import FrameVae, join_frames, split_frames
from sfumato.training.models.autoencoder import downsampling_factor


def is_identity(vae: AutoencoderKL | FrameVae) -> bool:
    """Whether this VAE passes values through unchanged, one per pixel or per square of pixels, as `identity_vae` does."""
    if isinstance(vae, FrameVae):
        return is_identity(vae.vae)
    channels = vae.config["in_channels"]
    alike = set(vae.config["block_out_channels"]) == {2 * channels + 2} and vae.config["latent_channels"] in (channels, 4)
    bias: Any = vae.encoder.conv_out.bias
    return alike and bias[-1].item() == -30.0  # the log-variance of no noise


def to_pixel_values(images: np.ndarray) -> torch.Tensor:
    """`(B, H, W, C)` uint8, or float16 in [-1, 1], to `(B, C, H, W)` float32 in [-1, 1]."""
    if images.dtype != np.uint8:
        return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().contiguous()
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


@torch.no_grad()
def encode(vae: AutoencoderKL | FrameVae, pixel_values: torch.Tensor, *, is_pixel_model: bool | None = None) -> torch.Tensor:
    """`(B, C, H, W)` in [-1, 1] to x_0: for an identity VAE the pixels themselves (the first of each square), else scaled
    latents `(B, C, h, w)`.

    Args:
        is_pixel_model: the result of `is_identity`, which reads a weight; for callers that need it often.
    """
    is_pixel_model = is_identity(vae) if is_pixel_model is None else is_pixel_model
    if isinstance(vae, FrameVae):
        frames = split_frames(pixel_values, vae.vae.config.in_channels)
        return join_frames(encode(vae.vae, frames, is_pixel_model=is_pixel_model), len(pixel_values))
    if is_pixel_model:
        factor = downsampling_factor(vae)
        first = pixel_values[:, :, ::factor, ::factor]
        return F.pad(first, (0, 0, 0, 0, 0, vae.config["latent_channels"] - first.shape[1]))
    return vae.encode(pixel_values, return_dict=False)[0].mode() * vae.config["scaling_factor"]
