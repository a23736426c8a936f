"""Text encoder, UNet and ControlNet as the one module that is trained, and what its shape follows from."""

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel

from sfumato.pipelines.guided import run_network
from sfumato.training.config.schema import Config


class Denoiser(torch.nn.Module):
    """Text encoder, UNet and, where there is one, ControlNet as one module: one DDP wrapper and one optimizer serve all."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, controlnet: ControlNetModel | None = None
    ):  # fmt: skip
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.controlnet = controlnet

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, given: dict | None = None) -> torch.Tensor:
        """Prediction `(B, C, H, W)` for noisy `x_t`, timesteps `(B,)` and token ids `(B, L)` or embeddings `(B, L, D)`.

        `given`: see `guided.run_network`.
        """
        embeddings = text if text.is_floating_point() else self.text_encoder(text)[0]
        return run_network(self.unet, self.controlnet, x_t, t, embeddings, given)


def learns_variance(scheduler) -> bool:
    """Whether the network's output has a second half, which says the variance (Nichol and Dhariwal 2021)."""
    return scheduler.config.get("variance_type") == "learned_range"


def num_unet_inputs(config: Config, vae: AutoencoderKL) -> int:
    """Channels that the UNet reads: the noisy latents; for inpainting also the mask and the masked picture's latents; for
    upscaling the small picture; with self-conditioning what it last made of them.
    """
    beside = {"inpainting": vae.config.latent_channels + 1, "upscaling": vae.config.in_channels}
    own = vae.config.latent_channels if config.objective.self_conditioning else 0
    return vae.config.latent_channels + beside.get(config.task, own)


def sample_size(config: Config, factor: int) -> int | tuple[int, int]:
    """The UNet's `sample_size`: the side of the latents, or their height and width."""
    height, width = (side // factor for side in config.data.size)
    return height if height == width else (height, width)


def strengthen_conditioning(unet: UNet2DConditionModel, factor: float = 3.0) -> None:
    """Let time and pooled text scale and shift every block strongly from the first step on.

    PyTorch's own initialisation gives a linear layer outputs of std 1 / sqrt(3) for inputs of std 1, and the embedding
    is smaller than that after its SiLU; a text that hardly changes what a block does is a text that is slow to learn
    (LOG.md, "where is place learned?").
    """
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith("time_emb_proj"):
                module.weight.mul_(factor)
