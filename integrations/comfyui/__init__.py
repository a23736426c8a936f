"""A node for ComfyUI that draws with a Sfumato model, or with any text-to-image model that stock diffusers opens.

ComfyUI's own loaders know the networks of large models, not these small ones. Copy this folder into `custom_nodes`; it needs
diffusers and transformers in ComfyUI's environment, but not Sfumato.
"""

from functools import lru_cache

import numpy as np
import torch


@lru_cache(maxsize=2)
def open_model(model: str):
    """The pipeline of a folder or a Hub id, on the best available device."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


class SfumatoDraw:
    """Text to images `(B, H, W, 3)` float32 in [0, 1], as ComfyUI expects them."""

    CATEGORY = "sfumato"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802  (ComfyUI's name)
        """The inputs that ComfyUI asks for."""
        return {
            "required": {
                "model": ("STRING", {"default": "runs/demo/pipeline"}),
                "prompt": ("STRING", {"multiline": True, "default": "red heart"}),
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
                "steps": ("INT", {"default": 30, "min": 1, "max": 1000}),
                "guidance_scale": ("FLOAT", {"default": 3.0, "min": 1.0, "max": 30.0, "step": 0.1}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
                "enlarge": ("INT", {"default": 1, "min": 1, "max": 32}),
            }
        }

    def draw(self, model, prompt, negative_prompt, seed, steps, guidance_scale, batch_size, enlarge) -> tuple[torch.Tensor]:
        """Image i of the batch has seed + i; `enlarge` repeats each pixel that many times in both directions."""
        images = open_model(model)(
            [prompt] * batch_size,
            negative_prompt=[negative_prompt] * batch_size if negative_prompt else None,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed((seed + i) % 2**64) for i in range(batch_size)],
            output_type="np",
        ).images
        images = torch.from_numpy(np.asarray(images, np.float32)).clamp(0, 1)
        if images.shape[-1] == 1:
            images = images.expand(-1, -1, -1, 3)
        return (images[..., :3].repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2),)


NODE_CLASS_MAPPINGS = {"SfumatoDraw": SfumatoDraw}
NODE_DISPLAY_NAME_MAPPINGS = {"SfumatoDraw": "Draw with Sfumato"}
