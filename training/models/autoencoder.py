"""Autoencoders: one to train, the identity for pixel models, and latents in another scale."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from sfumato.pipelines.locate import locate_pipeline
from sfumato.training.config.schema import Config
from sfumato.training.models.pretrained import check_predecessor, load_part
from sfumato.training.models.stock_classes import (
    build_stock,
    check_arguments,
    check_contradictions,
    check_divisible,
    lists_to_tuples,
)


class VariationalAutoencoder(torch.nn.Module):
    """Encoder, a latent sampled with given noise, and decoder as one forward pass (Kingma and Welling 2014).

    Args:
        latent_noise: standard deviation of the noise; None: as the encoder predicts.
    """

    def __init__(self, vae: AutoencoderKL, latent_noise: float | None = None):
        super().__init__()
        self.vae = vae
        self.latent_noise = latent_noise

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstructions of images `(B, C, H, W)`, and mean and log-variance of their latents, `(B, c, h, w)`."""
        (latent,) = self.vae.encode(pixels, return_dict=False)
        sample: Any = latent.mean + noise * (latent.std if self.latent_noise is None else self.latent_noise)
        (rebuilt,) = self.vae.decode(sample, return_dict=False)
        return rebuilt, latent.mean, latent.logvar


def build_autoencoder(config: Config, arguments: dict) -> AutoencoderKL:
    """A stock `AutoencoderKL`: that of `init_from`, or one with random weights, drawn from `config.seed`.

    Args:
        arguments: those of the class, from `autoencoder.model`.

    Raises:
        ValueError: an argument that the class does not have, or that contradicts `data`; or no VAE to start from.
    """
    if config.init_from is not None:
        check_predecessor("init_from", config.init_from)
        folder = Path(config.init_from)
        alone = (folder / "vae").is_dir() or (folder / "config.json").is_file()
        try:
            source = config.init_from if alone else locate_pipeline(config.init_from)
        except ValueError as error:
            raise ValueError(f"init_from={config.init_from!r}: {error}") from error
        vae, _ = load_part(AutoencoderKL, "init_from", source, "vae")
        if vae.config.in_channels != config.data.channels:
            raise ValueError(f"data.channels={config.data.channels}: init_from takes {vae.config.in_channels}")
        check_divisible(config, downsampling_factor(vae))
        return vae
    check_arguments(arguments, AutoencoderKL, "autoencoder.model")
    channels = config.data.channels
    derived = {"sample_size": max(config.data.size), "in_channels": channels, "out_channels": channels}
    check_contradictions(arguments, derived, "autoencoder.model", "data says")
    torch.manual_seed(config.seed)
    vae = build_stock("autoencoder.model", AutoencoderKL, {**lists_to_tuples(arguments), **derived})
    check_divisible(config, downsampling_factor(vae))
    return vae


def downsampling_factor(vae: AutoencoderKL) -> int:
    """How many pixels of the image correspond to one of the latents, along a side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def identity_vae(
    sample_size: int,
    channels: int = 3,
    latent_channels: int | None = None,
    use_quant_conv: bool = False,
    repeat: int = 1,
) -> AutoencoderKL:
    """A stock `AutoencoderKL` that computes the identity, for images to 6e-7: a pixel model is an ordinary folder.

    Latent channels beyond the image's, if any, are zero: Stable Diffusion's inpainting supports only 4. With `repeat`,
    a power of 2, a latent is the first pixel of each square of `repeat` pixels a side, and images repeat latents over such
    squares.

    Each colour x goes through the network as the pair (x, -x), and silu(x) - silu(-x) = x recovers it. Two channels of
    +-K fix the group norm's variance at K^2 / (channels + 1) whatever the image; its weight undoes the division.
    """
    latent_channels = latent_channels or channels
    width = 2 * channels + 2
    levels: dict[str, Any] = {"block_out_channels": (width,)} if repeat == 1 else _halving_levels(width, repeat)
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        **levels,
        latent_channels=latent_channels,
        norm_num_groups=1,
        mid_block_add_attention=False,
        use_quant_conv=use_quant_conv,
        use_post_quant_conv=use_quant_conv,
        scaling_factor=1.0,
        sample_size=sample_size,
    )
    big = 1000.0
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        halves: list[Any] = [vae.encoder, vae.decoder]
        for half in halves:
            half.conv_norm_out.weight.fill_((big**2 / (channels + 1) + half.conv_norm_out.eps) ** 0.5)
            half.conv_in.bias[2 * channels :] = torch.tensor([big, -big])
            for colour in range(channels):
                half.conv_in.weight[2 * colour, colour, 1, 1] = 1
                half.conv_in.weight[2 * colour + 1, colour, 1, 1] = -1
                half.conv_out.weight[colour, 2 * colour, 1, 1] = 1
                half.conv_out.weight[colour, 2 * colour + 1, 1, 1] = -1
        for conv in filter(None, (vae.quant_conv, vae.post_quant_conv)):
            torch.nn.init.dirac_(conv.weight)
        for block in halves[0].down_blocks:
            for sampler in block.downsamplers or []:  # its padding is on the right and below: each step takes the first of two
                sampler.conv.weight.copy_(_passing(sampler.conv.weight, 0))
        for block in halves[1].up_blocks:
            for sampler in block.upsamplers or []:
                sampler.conv.weight.copy_(_passing(sampler.conv.weight, 1))
        halves[0].conv_out.bias[latent_channels:] = -30.0  # log-variance: no noise
    return vae.requires_grad_(False).eval()


def _halving_levels(width: int, repeat: int) -> dict[str, Any]:
    """Arguments of an `AutoencoderKL` that only halves an image until `repeat` pixels of a side become one."""
    count = repeat.bit_length()
    return {
        "block_out_channels": (width,) * count,
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "layers_per_block": 0,
    }


def _passing(kernel: torch.Tensor, place: int) -> torch.Tensor:
    """A kernel of this shape that passes on the value at row and column `place` of its window."""
    passing = torch.zeros_like(kernel)
    passing[:, :, place, place] = torch.eye(len(kernel))
    return passing


def quant_convs(vae: AutoencoderKL) -> tuple[Any, Any]:
    """The 1 x 1 convolutions, of the encoder and of the decoder, that can absorb another scale of the latents.

    Raises:
        ValueError: the VAE has none.
    """
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise ValueError("this VAE has no quant_conv and post_quant_conv, by which its latents could be scaled")
    return vae.quant_conv, vae.post_quant_conv


def normalise_channels(vae: AutoencoderKL, first: int, mean: torch.Tensor, std: torch.Tensor, target: float) -> torch.Tensor:
    """Give the latent channels from number `first` on mean 0 and standard deviation `target`; images stay the same.

    Args:
        mean, std: those of these channels so far. A channel that carries nothing (std below 0.001) is not scaled up.

    Returns:
        The factor by which each is multiplied after its mean is subtracted.

    Raises:
        ValueError: see `quant_convs`.
    """
    encoding, decoding = quant_convs(vae)
    channels = vae.config["latent_channels"]
    mean, std = mean.to(encoding.bias), std.to(encoding.bias)
    by = torch.where(std < 1e-3, 1.0, target / std)
    with torch.no_grad():
        encoding.bias[first:channels] -= mean
        encoding.bias[first:channels] *= by
        encoding.weight[first:channels] *= by[:, None, None, None]
        encoding.bias[channels + first :] += 2 * torch.log(by)  # the log-variance
        decoding.bias += decoding.weight[:, first:, 0, 0] @ mean
        decoding.weight[:, first:] /= by[:, None, None]
    return by


def set_scaling_factor(vae: AutoencoderKL, factor: float) -> None:
    """Scale the VAE's own latents so that its scaling factor becomes `factor`; scaled latents stay as they are.

    Stable Diffusion's upscaling sets the factor to 0.08333 whatever the config says.

    Raises:
        ValueError: see `quant_convs`.
    """
    encoding, decoding = quant_convs(vae)
    by, channels = vae.config["scaling_factor"] / factor, vae.config["latent_channels"]
    with torch.no_grad():
        for parameter in (encoding.weight, encoding.bias):
            parameter[:channels] *= by
        encoding.bias[channels:] += 2 * torch.log(torch.tensor(by))  # the log-variance
        decoding.weight /= by
    vae.register_to_config(scaling_factor=factor)
