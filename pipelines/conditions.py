"""What a network reads besides the noisy latents and the text: a mask and the image around it, or a smaller image.

Self-contained on purpose (torch, numpy, PIL and diffusers only): this file travels inside shared model folders.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

UPSCALERS_SCALE = 0.08333  # StableDiffusionUpscalePipeline sets every VAE's scaling factor to this


def image_channels(vae) -> int:
    """Number of channels of the images that a VAE encodes; `ConsistencyDecoderVAE` has another name for it."""
    return vae.config.get("in_channels") or vae.config.encoder_in_channels


def codec_facts(unet) -> dict | None:
    """The facts in a UNet's config about the codec of its arrays, see `pipelines.codecs`; None for a model of images."""
    own = unet.config.get("_sfumato") if unet is not None else None
    return own.get("codec") if isinstance(own, dict) else None


def extra_input_kind(unet, vae) -> str | None:
    """What the UNet reads besides the noisy latents: `masks` (and masked images) as in Stable Diffusion's inpainting,
    `low_res` (a smaller image) as in its upscaling, or None for nothing.
    """
    if unet is None or vae is None:
        return None
    more = unet.config.in_channels - vae.config.latent_channels
    if more == image_channels(vae) and (unet.config.class_embed_type or unet.config.num_class_embeds):
        return "low_res"
    return "masks" if more == vae.config.latent_channels + 1 else None


def x0_estimator(scheduler):
    """What a network with self-conditioning reads besides the noise: the x_0 of its last prediction, zeros at first (Chen
    et al. 2022, arXiv 2208.04202). Returns a function of prediction, x_t and t, the first two `(B, C, h, w)`.
    """
    config = scheduler.config
    abar, kind = scheduler.alphas_cumprod, config.prediction_type
    clip = config.get("clip_sample") or config.get("thresholding")

    def estimated(output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = abar.to(x_t.device, torch.float32)[t.long()].reshape(-1, 1, 1, 1)  # in half precision the last value would be 0
        dtype = x_t.dtype
        output = output[:, : x_t.shape[1]].float()
        x_t = x_t.float()
        if kind == "epsilon":
            output = (x_t - (1 - a).sqrt() * output) / a.sqrt()
        elif kind == "v_prediction":
            output = a.sqrt() * x_t - (1 - a).sqrt() * output
        return (output.clamp(-1, 1) if clip else output).to(dtype)

    return estimated


def encode_image(vae, pixels: torch.Tensor) -> torch.Tensor:
    """The unscaled latents `(B, C, h, w)` of pixels `(B, C, H, W)` in [-1, 1]; works with any autoencoder of diffusers."""
    encoded = vae.encode(pixels)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


def default_size(pipe, image) -> tuple[int, int]:
    """Height and width in pixels if a call names none: those of training.

    Upscaling follows the small image, or the first of a list: an array or tensor already has the size of the latents, and so
    does a PIL image unless the VAE is the identity, as in the stock pipeline. With pixels, a PIL image whose shorter side is
    below the trained size is enlarged to it.
    """
    first = image[0] if isinstance(image, list) and image else image
    factor, trained = pipe.vae_scale_factor, pipe.trained_size
    if extra_input_kind(pipe.unet, pipe.vae) != "low_res":
        return trained
    if isinstance(first, Image.Image):
        times = factor if factor > 1 else max(1, min(trained) / min(first.size))
        turned = first.getexif().get(0x0112, 1) >= 5  # stored on its side, see `images.to_8_bits`
        width, height = (side * times for side in (first.size[::-1] if turned else first.size))
    elif isinstance(first, torch.Tensor) and first.ndim >= 3:
        height, width = (side * factor for side in first.shape[-2:])
    elif isinstance(first, np.ndarray) and first.ndim >= 3:
        height, width = (side * factor for side in first.shape[-3:-1])
    else:
        return trained
    return round(height / factor) * factor, round(width / factor) * factor


def check_upscaling(vae) -> None:
    """Raise ValueError for a VAE with which `StableDiffusionUpscalePipeline` would draw other images or fail."""
    if vae.config.scaling_factor != UPSCALERS_SCALE or vae.post_quant_conv is None:
        raise ValueError(
            f"stock upscaling takes a VAE with scaling_factor {UPSCALERS_SCALE}; see autoencoders.set_scaling_factor"
        )


def renoise(scheduler, x_s: torch.Tensor, s: torch.Tensor, t: torch.Tensor, generator) -> torch.Tensor:
    """Go back up from timestep `s` to `t` with fresh noise: sqrt(a) x_s + sqrt(1 - a) eps, where a = abar_t / abar_s."""
    a = (scheduler.alphas_cumprod[t] / scheduler.alphas_cumprod[s]).to(x_s)
    return a.sqrt() * x_s + (1 - a).sqrt() * randn_tensor(x_s.shape, generator, x_s.device, x_s.dtype)


def inpainting_condition(vae, pixels: torch.Tensor | None, mask: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
    """What an inpainting UNet reads besides the noise, `(B, 1 + C, h, w)`: the mask, 1 where to draw, and the masked image.

    Args:
        pixels, mask: `(B, 3, H, W)` in [-1, 1] and `(B, 1, H, W)`. Without a mask, everything is drawn.
        noise: `(B, C, h, w)`.
    """
    if mask is None or pixels is None:
        size = [side * 2 ** (len(vae.config.block_out_channels) - 1) for side in noise.shape[-2:]]
        mask, pixels = noise.new_ones(len(noise), 1, *size), noise.new_zeros(len(noise), image_channels(vae), *size)
    mask = (mask >= 0.5).to(noise)
    masked_latents = encode_image(vae, pixels * (1 - mask)) * vae.config.scaling_factor
    return torch.cat([F.interpolate(mask, masked_latents.shape[-2:]), masked_latents], dim=1)


def low_res_condition(scheduler, pixels: torch.Tensor, level: torch.Tensor | int, generator=None) -> torch.Tensor:
    """Add noise of the timesteps `level`, one or `(B,)`, to a small image `(B, 3, h, w)`, so that an upscaling network does
    not trust it too much (noise conditioning augmentation; Ho et al. 2022, arXiv 2106.15282, section 4).
    """
    noise = randn_tensor(pixels.shape, generator, pixels.device, pixels.dtype)
    return scheduler.add_noise(pixels, noise, torch.as_tensor(level, device=pixels.device).reshape(-1))
