"""Upscaling: a UNet that also reads a smaller image."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sfumato import figures
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.conditions import low_res_condition
from sfumato.training.models.latent_space import to_pixel_values
from sfumato.training.quality.fidelity import feature_distances, picture_quality
from sfumato.training.tasks.text_to_image import TextToImage, captioned


class Upscaling(TextToImage):
    """A UNet that also gets a smaller picture, made a little noisy, as Stable Diffusion's upscaling models do."""

    def small(self, pixels: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Pictures `(B, C, H, W)` made smaller by `upscaling.factor`, in the size of the latents, and still in [-1, 1]."""
        small = F.interpolate(pixels, scale_factor=1 / self.config.upscaling.factor, mode="area")
        return F.interpolate(small, size, mode="bicubic", antialias=True).clamp(-1, 1)

    def network_input(self, x_t: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict]:
        """The noisy latents, and beside them the smaller picture with noise, whose level the network is told."""
        small, limit = self.small(batch["pixel_values"], x_t.shape[-2:]), self.pipe.config.max_noise_level
        seeds = [(int(seed) + 1) % 2**63 for seed in batch["noise_seed"]]  # not the noise of x_t
        level = torch.tensor([np.random.default_rng(s).integers(limit + 1) for s in seeds], device=x_t.device)
        generators = [torch.Generator(x_t.device).manual_seed(s) for s in seeds]
        small = low_res_condition(self.pipe.low_res_scheduler, small, level, generators)
        return torch.cat([x_t, small], dim=1), {"class_labels": level}

    def enlarged(self, count: int, pipe: SfumatoPipeline) -> tuple[list[str], list[np.ndarray], list[np.ndarray], list]:
        """Captions, held-out pictures, and what bicubic enlarging and the model make of them once they are smaller."""
        captions, true = captioned(self.pictures, count)
        pixels = to_pixel_values(np.stack(true))
        grid = [side // pipe.vae_scale_factor for side in pixels.shape[-2:]]
        given = [p for p in self.small(pixels, grid).permute(0, 2, 3, 1).div(2).add(0.5).numpy()]
        plain = self.small(pixels, pixels.shape[-2:]).permute(0, 2, 3, 1).add(1).mul(127.5).round().byte().numpy()
        return captions, true, list(plain), self.drawn(pipe, captions, image=given)

    def show(self) -> tuple[list[str], list[Image.Image]]:
        """Held-out pictures: enlarged plainly, enlarged by the model, and true."""
        captions, true, plain, drawn = self.enlarged(4, self.shareable())
        rows = zip(captions, map(figures.to_pil, plain), drawn, map(figures.to_pil, true))
        names, pictures = zip(*(cell for c, p, d, t in rows for cell in ((f"{c}: bicubic", p), ("drawn", d), ("true", t))))
        return list(names), list(pictures)

    def scores(self, pipe: SfumatoPipeline) -> tuple[dict[str, float], str]:
        """How near to the true pictures, beside bicubic enlarging."""
        _, true, plain, drawn = self.enlarged(self.config.validation.num_judged, pipe)
        true, plain, drawn = np.stack(true), np.stack(plain), np.stack([np.asarray(d).reshape(true[0].shape) for d in drawn])
        found = {}
        for name, made in (("model", drawn), ("bicubic", plain)):
            made = picture_quality(true, made) | feature_distances(true, made)
            found |= {f"{key} of {name}": value for key, value in made.items()}
        return found, f"{len(true)} {self.split} pictures, enlarged {self.config.upscaling.factor} times"
