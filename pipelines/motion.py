"""Clips by a 2D model and a motion adapter (Guo et al. 2023, arXiv 2307.04725): what `AnimateDiffPipeline` draws.

A clip is an array like any other here, the channels of its frames one after another: `(B, F * C, H, W)`. `MotionUNet` and
`FrameVae` make frames of it and join them again, so that training, samplers, guiders and judges see one array.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.configuration_utils import FrozenDict

from sfumato.pipelines.conditions import codec_facts


def split_frames(array: torch.Tensor, channels: int) -> torch.Tensor:
    """`(B, F * C, H, W)` to `(B * F, C, H, W)`."""
    return array.unflatten(1, (-1, channels)).flatten(0, 1)


def join_frames(frames: torch.Tensor, batch: int) -> torch.Tensor:
    """`(B * F, C, H, W)` to `(B, F * C, H, W)`."""
    return frames.unflatten(0, (batch, -1)).flatten(1, 2)


class MotionUNet(UNetMotionModel):
    """`UNetMotionModel` that reads and returns `(B, F * C, h, w)`, and embeddings `(B, L, D)` once for all frames."""

    @classmethod
    def of(cls, unet: UNetMotionModel) -> "MotionUNet":
        """The same network, sharing all weights."""
        own: Any = cls.from_config(unet.config)
        own.load_state_dict(unet.state_dict(), assign=True)
        return own.train(unet.training)

    def forward(self, sample, timestep, encoder_hidden_states, *, return_dict=True, **more) -> Any:
        """As of `UNetMotionModel`, but for the shapes."""
        clips = sample.unflatten(1, (-1, self.config["in_channels"])).transpose(1, 2)
        context = encoder_hidden_states.repeat_interleave(clips.shape[2], dim=0)
        output = super().forward(clips, timestep, context, return_dict=False, **more)[0]
        output = output.transpose(1, 2).flatten(1, 2)
        return SimpleNamespace(sample=output) if return_dict else (output,)

    def to_stock(self) -> tuple[UNetMotionModel, MotionAdapter]:
        """diffusers' own two classes; the network shares its weights, the adapter has a copy of its own part."""
        unet: Any = UNetMotionModel.from_config(self.config)
        unet.load_state_dict(self.state_dict(), assign=True)
        adapter: Any = build_adapter(
            self.config,
            num_attention_heads=self.config["motion_num_attention_heads"],
            max_frames=self.config["motion_max_seq_length"],
            mid_block=self.config["use_motion_mid_block"],
        )
        adapter.load_state_dict({name: value for name, value in self.state_dict().items() if "motion_modules." in name})
        return unet.eval(), adapter.to(self.device, self.dtype).eval()


def build_adapter(config, *, num_attention_heads: int, max_frames: int, mid_block: bool) -> MotionAdapter:
    """A motion adapter for a UNet of this config, random but for its last layers, which are zero: at first nothing moves."""
    adapter = MotionAdapter(
        block_out_channels=tuple(config["block_out_channels"]),
        motion_layers_per_block=config["layers_per_block"],
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=num_attention_heads,
        motion_norm_num_groups=config["norm_num_groups"],
        motion_max_seq_length=max_frames,
        use_motion_mid_block=mid_block,
    )
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if ".proj_out." in name:
                parameter.zero_()
    return adapter


class FrameVae(torch.nn.Module):
    """A VAE of pictures that encodes and decodes each frame of `(B, F * C, H, W)` by itself.

    Attributes:
        vae: that of pictures.
        frames: F.
        config: as of `vae`, with the channels of all frames.
    """

    def __init__(self, vae, frames: int):
        super().__init__()
        self.vae, self.frames = vae, frames
        counts = {name: frames * vae.config[name] for name in ("in_channels", "out_channels", "latent_channels")}
        self.config = FrozenDict({**vae.config, **counts})

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.vae.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vae.device

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        """`latents`, `(B, F * c, h, w)`: the means, not scaled."""
        frames = split_frames(pixels, self.vae.config.in_channels)
        return SimpleNamespace(latents=join_frames(self.vae.encode(frames).latent_dist.mode(), len(pixels)))

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
        """Pixels `(B, F * C, H, W)`."""
        frames = split_frames(latents, self.vae.config.latent_channels)
        pixels = join_frames(self.vae.decode(frames, return_dict=False)[0], len(latents))
        return SimpleNamespace(sample=pixels) if return_dict else (pixels,)


def as_clips(unet: UNetMotionModel, vae) -> tuple[MotionUNet, FrameVae]:
    """The network and the VAE of an `AnimateDiffPipeline` that Sfumato wrote, for arrays of clips.

    Raises:
        ValueError: it was not trained here, so it is not known of how many frames its clips are.
    """
    facts = codec_facts(unet)
    if facts is None:
        raise ValueError("an AnimateDiffPipeline that was not trained here: open it with diffusers' own class")
    return MotionUNet.of(unet), FrameVae(vae, facts["shape"][-1] // vae.config.in_channels)
