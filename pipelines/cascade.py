"""From text to a small image and from that to a larger one: two models in one call and one folder."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from huggingface_hub import snapshot_download

from sfumato.pipelines.conditions import image_channels
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.pipelines.trust import UNREAD

UPSCALER = "upscaler"  # the folder of the second model, inside that of the first


class Cascade:
    """A cascaded diffusion model (Ho et al. 2022, arXiv 2106.15282).

    `export_pipeline(base, folder, upscaler=...)` or `sfumato export RUN FOLDER --upscaler RUN` writes the folder: that of the
    first model, with the second one in `upscaler/`. Stock diffusers opens both as they are.

    Args:
        base: draws an image from text.
        upscaler: makes the image larger, guided by the same text.

    Raises:
        ValueError: the models are not of these kinds or do not fit together.
    """

    def __init__(self, base: SfumatoPipeline, upscaler: SfumatoPipeline):
        if base.reads is not None or base.controlnet is not None:
            raise ValueError("the first model of a cascade draws from text and nothing else")
        if upscaler.reads != "low_res":
            raise ValueError("the second model of a cascade must be one for upscaling")
        channels = [image_channels(pipe.vae) for pipe in (base, upscaler)]
        if channels[0] != channels[1]:
            raise ValueError(f"the first model draws {channels[0]} channels, the second reads {channels[1]}")
        sides = [pipe.trained_size[0] for pipe in (base, upscaler)]
        if sides[1] % sides[0]:
            raise ValueError(f"the first model draws {sides[0]} pixels, the second {sides[1]}, which is not a multiple")
        self.base, self.upscaler = base, upscaler

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **arguments) -> "Cascade":
        """Open a folder or Hub repository; arguments as for `SfumatoPipeline.from_pretrained`."""
        names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        of_hub = {name: arguments.pop(name) for name in names if name in arguments}
        if not Path(folder).is_dir():
            folder = snapshot_download(str(folder), ignore_patterns=UNREAD, **of_hub)
        parts = (Path(folder), Path(folder) / UPSCALER)
        return cls(*(SfumatoPipeline.from_pretrained(str(part), **arguments) for part in parts))

    def to(self, *where) -> "Cascade":
        """Move both models."""
        self.base.to(*where)
        self.upscaler.to(*where)
        return self

    def set_progress_bar_config(self, **settings: Any) -> None:
        """As for a single pipeline, of both models."""
        self.base.set_progress_bar_config(**settings)
        self.upscaler.set_progress_bar_config(**settings)

    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise_level: int | None = None,
        upscaling_steps: int = 10,
        upscaling_guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        **call: Any,
    ) -> ImagePipelineOutput | tuple:
        """Draw small images and make them larger.

        Args:
            prompt, negative_prompt: for both models.
            generator: as for `SfumatoPipeline`; the second model continues to draw from it.
            noise_level: how much noise is added to the small image, so that errors of the first model are redrawn.
            upscaling_steps, upscaling_guidance_scale: for the second model.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            call: further arguments of the first model's call.
        """
        small = self.base(prompt, negative_prompt, generator=generator, output_type="pil", return_dict=True, **call).images  # pyright: ignore[reportAttributeAccessIssue]
        prompts = [prompt] if isinstance(prompt, str) else prompt
        each = call.get("num_images_per_prompt", 1)
        repeated = [text for text in prompts for _ in range(each)]
        negative = negative_prompt
        if isinstance(negative, list):
            negative = [text for text in negative for _ in range(each)]
        times = self.upscaler.trained_size[0] // self.base.trained_size[0]
        size: dict[str, Any] = {"height": small[0].height * times, "width": small[0].width * times}
        return self.upscaler(
            repeated, negative, image=small, generator=generator, noise_level=noise_level, **size,
            num_inference_steps=upscaling_steps, guidance_scale=upscaling_guidance_scale, output_type=output_type,
            return_dict=return_dict,
        )  # fmt: skip
