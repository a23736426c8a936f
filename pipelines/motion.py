"""Clips from a 2D model and a motion adapter (Guo et al. 2023, arXiv 2307.04725), as `AnimateDiffPipeline` draws them.

Here a clip is an array like any other, with the channels of its frames one after another: `(B, F * C, H, W)`. `MotionUNet`
and `FrameVae` split it into frames and join them again, so that training, samplers, guiders and judges see one array.
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
        """As in `UNetMotionModel`, except for the shapes."""
        clips = sample.unflatten(1, (-1, self.config["in_channels"])).transpose(1, 2)
        context = encoder_hidden_states.repeat_interleave(clips.shape[2], dim=0)
        output = super().forward(clips, timestep, context, return_dict=False, **more)[0]
        output = output.transpose(1, 2).flatten(1, 2)
        return SimpleNamespace(sample=output) if return_dict else (output,)

    def to_stock(self) -> tuple[UNetMotionModel, MotionAdapter]:
        """The model as diffusers' own two classes; the network shares its weights, the adapter holds a copy of its part."""
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
    """A random motion adapter for a UNet with this config; its last layers are zero, so that nothing moves at first."""
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
    """An image VAE that encodes and decodes each frame of `(B, F * C, H, W)` separately.

    Attributes:
        vae: the image VAE.
        frames: F.
        config: that of `vae`, with the channels of all frames.
    """

    def __init__(self, vae, frames: int):
        super().__init__()
        self.vae, self.frames = vae, frames
        counts = {name: frames * vae.config[name] for name in ("in_channels", "out_channels", "latent_channels")}
        self.config = FrozenDict({**vae.config, **counts})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.vae.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vae.device

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        """Encode pixels; `latents` `(B, F * c, h, w)` are the means, not scaled."""
        frames = split_frames(pixels, self.vae.config.in_channels)
        return SimpleNamespace(latents=join_frames(self.vae.encode(frames).latent_dist.mode(), len(pixels)))

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
        """Decode latents to pixels `(B, F * C, H, W)`."""
        frames = split_frames(latents, self.vae.config.latent_channels)
        pixels = join_frames(self.vae.decode(frames, return_dict=False)[0], len(latents))
        return SimpleNamespace(sample=pixels) if return_dict else (pixels,)


def as_clips(unet: UNetMotionModel, vae) -> tuple[MotionUNet, FrameVae]:
    """The network and the VAE of an `AnimateDiffPipeline` that Sfumato wrote, in the forms that work on clip arrays.

    Raises:
        ValueError: it was not trained here, so the number of frames of its clips is unknown.
    """
    facts = codec_facts(unet)
    if facts is None:
        raise ValueError("this AnimateDiffPipeline was not trained with Sfumato; open it with diffusers' own class")
    return MotionUNet.of(unet), FrameVae(vae, facts["shape"][-1] // vae.config.in_channels)
