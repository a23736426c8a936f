"""Text encoder, UNet and ControlNet as the one module that is trained, and what a task asks of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel

from sfumato.pipelines.guided import NetworkInputs, run_network
from sfumato.training.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class ModelNeeds:
    """What a task's model has besides a UNet that reads text and noise.

    Attributes:
        num_extra_inputs: for a VAE, how many channels the UNet reads besides the noisy latents.
        latent_channels: what the VAE must have, if a stock pipeline supports no other number; None: the image's.
        use_quant_conv: whether an identity VAE needs these convolutions.
        prepare_vae: called with the VAE and its downsampling factor; may change it, or raise ValueError.
        unet: further arguments of the UNet.
        components: further components and settings of the pipeline.
        widens: whether the UNet of a text-to-image model in `init_from` gets new channels.
        trains_controlnet: whether only a ControlNet is trained.
        motion: settings of the motion adapter, if only one is trained; see `pipelines.motion.build_adapter`.
        has_unet: whether there is one at all.
    """

    num_extra_inputs: Callable[[AutoencoderKL], int] = lambda vae: 0
    latent_channels: int | None = None
    use_quant_conv: bool = False
    prepare_vae: Callable[[AutoencoderKL, int], None] = lambda vae, factor: None
    unet: dict[str, Any] = field(default_factory=dict)
    components: dict[str, Any] = field(default_factory=dict)
    widens: bool = False
    trains_controlnet: bool = False
    motion: dict[str, Any] | None = None
    has_unet: bool = True


class Denoiser(torch.nn.Module):
    """Text encoder, UNet and, if there is one, ControlNet as one module: one DDP wrapper and one optimizer serve all."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, controlnet: ControlNetModel | None = None
    ):  # fmt: skip
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.controlnet = controlnet

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, inputs: NetworkInputs | None = None
    ) -> torch.Tensor:
        """Prediction `(B, C, H, W)` for noisy `x_t`, timesteps `(B,)` and token ids `(B, L)` or embeddings `(B, L, D)`."""
        embeddings = text if text.is_floating_point() else self.text_encoder(text)[0]
        return run_network(self.unet, self.controlnet, x_t, t, embeddings, inputs)


def learns_variance(scheduler) -> bool:
    """Whether the network's output has a second half, which gives the variance (Nichol and Dhariwal 2021)."""
    return scheduler.config.get("variance_type") == "learned_range"


def num_unet_inputs(config: Config, vae: AutoencoderKL, needs: ModelNeeds) -> int:
    """Channels that the UNet reads: the noisy latents, those of the task, and with self-conditioning its own last estimate."""
    own = vae.config["latent_channels"] if config.objective.self_conditioning else 0
    return vae.config["latent_channels"] + needs.num_extra_inputs(vae) + own


def unet_sample_size(config: Config, factor: int) -> int | tuple[int, int]:
    """The UNet's `sample_size`: the side of the latents, or their height and width."""
    height, width = (side // factor for side in config.data.size)
    return height if height == width else (height, width)


def strengthen_conditioning(unet: UNet2DConditionModel, factor: float = 3.0) -> None:
    """Let time and pooled text scale and shift every block strongly from the first step on.

    PyTorch's own initialisation gives a linear layer outputs of std 1 / sqrt(3) for inputs of std 1, and the embedding
    is smaller than that after its SiLU; a text that hardly changes what a block does is slow to be learned
    (docs/notebook, "where is place learned").
    """
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith("time_emb_proj"):
                module.weight.mul_(factor)
