"""What a network is given beside the noisy latents and the text: a mask and the image around it, or a smaller image.

Self-contained on purpose (torch, numpy, PIL and diffusers only): this file travels inside shared model folders.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

UPSCALERS_SCALE = 0.08333  # what StableDiffusionUpscalePipeline makes of every VAE's scaling factor


def image_channels(vae) -> int:
    """How many channels the images have that a VAE encodes; `ConsistencyDecoderVAE` has another name for them."""
    return vae.config.get("in_channels") or vae.config.encoder_in_channels


def codec_facts(unet) -> dict | None:
    """What a UNet's config says of the codec of its arrays, see `pipelines.codecs`; None of a model of pictures."""
    own = unet.config.get("_sfumato") if unet is not None else None
    return own.get("codec") if isinstance(own, dict) else None


def extra_input_kind(unet, vae) -> str | None:
    """What the UNet reads beside the noisy latents: `masks` and masked images, as those of Stable Diffusion's inpainting do;
    an image of `low_res`, as those of its upscaling do; None: nothing.
    """
    if unet is None or vae is None:
        return None
    more = unet.config.in_channels - vae.config.latent_channels
    if more == image_channels(vae) and (unet.config.class_embed_type or unet.config.num_class_embeds):
        return "low_res"
    return "masks" if more == vae.config.latent_channels + 1 else None


def x0_estimator(scheduler):
    """What a network with self-conditioning reads beside the noise: x_0 as its last prediction meant it, zeros at first (Chen
    et al. 2022, arXiv 2208.04202). A function of prediction, x_t and t, the first two `(B, C, h, w)`.
    """
    config = scheduler.config
    abar, kind = scheduler.alphas_cumprod, config.prediction_type
    clip = config.get("clip_sample") or config.get("thresholding")

    def estimated(output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = abar.to(x_t.device, torch.float32)[t.long()].reshape(-1, 1, 1, 1)  # in half precision the last would be 0
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
    """The latents `(B, C, h, w)` of pixels `(B, C, H, W)` in [-1, 1], not scaled; of any autoencoder of diffusers."""
    encoded = vae.encode(pixels)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


def default_size(pipe, image) -> tuple[int, int]:
    """Height and width in pixels where a call names none: the trained ones.

    Upscaling follows the small image, or the first of a list: an array or tensor has the size of the latents already, and so
    has a PIL image where the VAE is not the identity, as in the stock pipeline. On pixels, one whose shorter side is less
    than was trained is drawn at that.
    """
    first = image[0] if isinstance(image, list) and image else image
    factor, trained = pipe.vae_scale_factor, pipe.trained_size
    if extra_input_kind(pipe.unet, pipe.vae) != "low_res":
        return trained
    if isinstance(first, Image.Image):
        times = factor if factor > 1 else max(1, min(trained) / min(first.size))
        turned = first.getexif().get(0x0112, 1) >= 5  # lies on its side, see `images.to_8_bits`
        width, height = (side * times for side in (first.size[::-1] if turned else first.size))
    elif isinstance(first, torch.Tensor) and first.ndim >= 3:
        height, width = (side * factor for side in first.shape[-2:])
    elif isinstance(first, np.ndarray) and first.ndim >= 3:
        height, width = (side * factor for side in first.shape[-3:-1])
    else:
        return trained
    return round(height / factor) * factor, round(width / factor) * factor


def check_upscaling(vae) -> None:
    """Raise ValueError for a VAE with which `StableDiffusionUpscalePipeline` would draw something else, or fail."""
    if vae.config.scaling_factor != UPSCALERS_SCALE or vae.post_quant_conv is None:
        raise ValueError(
            f"stock upscaling takes a VAE of scaling_factor {UPSCALERS_SCALE}; see autoencoders.set_scaling_factor"
        )


def renoise(scheduler, x_s: torch.Tensor, s: torch.Tensor, t: torch.Tensor, generator) -> torch.Tensor:
    """From timestep `s` back up to `t` by fresh noise: sqrt(a) x_s + sqrt(1 - a) eps with a = abar_t / abar_s."""
    a = (scheduler.alphas_cumprod[t] / scheduler.alphas_cumprod[s]).to(x_s)
    return a.sqrt() * x_s + (1 - a).sqrt() * randn_tensor(x_s.shape, generator, x_s.device, x_s.dtype)


def inpainting_condition(vae, pixels: torch.Tensor | None, mask: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
    """What an inpainting UNet reads beside the noise, `(B, 1 + C, h, w)`: the mask, 1 where to draw, and the masked image.

    Args:
        pixels, mask: `(B, 3, H, W)` in [-1, 1] and `(B, 1, H, W)`. Without a mask, all is to be drawn.
        noise: `(B, C, h, w)`.
    """
    if mask is None or pixels is None:
        size = [side * 2 ** (len(vae.config.block_out_channels) - 1) for side in noise.shape[-2:]]
        mask, pixels = noise.new_ones(len(noise), 1, *size), noise.new_zeros(len(noise), image_channels(vae), *size)
    mask = (mask >= 0.5).to(noise)
    masked_latents = encode_image(vae, pixels * (1 - mask)) * vae.config.scaling_factor
    return torch.cat([F.interpolate(mask, masked_latents.shape[-2:]), masked_latents], dim=1)


def low_res_condition(scheduler, pixels: torch.Tensor, level: torch.Tensor | int, generator=None) -> torch.Tensor:
    """A small image `(B, 3, h, w)` with noise of the timesteps `level`, one or `(B,)`, so that an upscaling network does not
    trust it too much (noise conditioning augmentation; Ho et al. 2022, arXiv 2106.15282, section 4).
    """
    noise = randn_tensor(pixels.shape, generator, pixels.device, pixels.dtype)
    return scheduler.add_noise(pixels, noise, torch.as_tensor(level, device=pixels.device).reshape(-1))
