"""What a network is given beside the noisy latents and the text: a mask and the picture around it, or a smaller picture.

Self-contained on purpose (torch, PIL and diffusers only): this file travels inside shared model folders.
"""

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


def beside_noise(unet, vae) -> str | None:
    """What the UNet reads beside the noisy latents: `masks` and masked pictures, as those of Stable Diffusion's inpainting do;
    a picture of `low_res`, as those of its upscaling do; None: nothing.
    """
    if unet is None or vae is None:
        return None
    more = unet.config.in_channels - vae.config.latent_channels
    if more == vae.config.in_channels and (unet.config.class_embed_type or unet.config.num_class_embeds):
        return "low_res"
    return "masks" if more == vae.config.latent_channels + 1 else None


def size_to_draw(pipe, image) -> tuple[int, int]:
    """Height and width in pixels where a call names none: the trained ones; for upscaling in latents, those of the small
    picture, or of the first of a list, times the VAE's factor, as in the stock pipeline.
    """
    first = image[0] if isinstance(image, list) and image else image
    if beside_noise(pipe.unet, pipe.vae) == "low_res" and pipe.vae_scale_factor > 1 and isinstance(first, Image.Image):
        return first.height * pipe.vae_scale_factor, first.width * pipe.vae_scale_factor
    return pipe.trained_size


def masks_beside(vae, pixels: torch.Tensor | None, mask: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
    """What an inpainting UNet reads beside the noise, `(B, 1 + C, h, w)`: the mask, 1 where to draw, and the masked picture.

    Args:
        pixels, mask: `(B, 3, H, W)` in [-1, 1] and `(B, 1, H, W)`. Without a mask, all is to be drawn.
        noise: `(B, C, h, w)`.
    """
    if mask is None:
        size = [side * 2 ** (len(vae.config.block_out_channels) - 1) for side in noise.shape[-2:]]
        mask, pixels = noise.new_ones(len(noise), 1, *size), noise.new_zeros(len(noise), vae.config.in_channels, *size)
    mask = (mask >= 0.5).to(noise)
    shown = vae.encode(pixels * (1 - mask)).latent_dist.mode() * vae.config.scaling_factor
    return torch.cat([F.interpolate(mask, shown.shape[-2:]), shown], dim=1)


def low_res_beside(scheduler, pixels: torch.Tensor, level: torch.Tensor | int, generator=None) -> torch.Tensor:
    """A small picture `(B, 3, h, w)` with noise of the timesteps `level`, one or `(B,)`, so that an upscaling network does not
    trust it too much (noise conditioning augmentation; Ho et al. 2022, arXiv 2106.15282, section 4).
    """
    noise = randn_tensor(pixels.shape, generator, pixels.device, pixels.dtype)
    return scheduler.add_noise(pixels, noise, torch.as_tensor(level, device=pixels.device).reshape(-1))
