"""Inpainting: a UNet that also reads a mask and the image around it."""

import numpy as np
import torch
from PIL import Image

from sfumato.pipelines.conditions import inpainting_condition
from sfumato.training.config.schema import Config
from sfumato.training.data.streams import Stream, Streams
from sfumato.training.models.denoiser import ModelNeeds
from sfumato.training.quality.drawing import sample_indices
from sfumato.training.tasks.protocol import captioned_images
from sfumato.training.tasks.text_to_image import TextToImage


class Inpainting(TextToImage):
    """A UNet that also gets a mask and the image outside it, as Stable Diffusion's inpainting models do.

    From random weights, or grown from the text-to-image model of `init_from`, whose UNet gets new channels with zero weights.
    """

    @classmethod
    def model_needs(cls, config: Config) -> ModelNeeds:
        """Channels for the mask and the masked image's latents, of which stock inpainting supports only 4."""
        return ModelNeeds(num_extra_inputs=lambda vae: vae.config["latent_channels"] + 1, latent_channels=4, widens=True)

    @staticmethod
    def extra_arrays(image: np.ndarray, key: int, streams: Streams) -> dict[str, np.ndarray]:
        """A random mask `(1, H, W)`, 1 where to draw."""
        rng = streams.numpy_generator(key, Stream.MASK)
        return {"mask": random_mask(rng, *image.shape[:2])[None].astype(np.float32)}

    def network_input(self, x_t: torch.Tensor, batch: dict[str, torch.Tensor], streams: Streams):
        """The noisy latents, the mask, and the image outside it."""
        return torch.cat([x_t, inpainting_condition(self.pipe.vae, batch["pixel_values"], batch["mask"], x_t)], dim=1), None

    def samples(self) -> tuple[list[str], list[Image.Image]]:
        """Held-out images with their centre redrawn."""
        captions, images = captioned_images(self.images, sample_indices(self.images, 12))
        masks = []
        for image in images:
            height, width = image.shape[:2]
            mask = np.zeros((height, width), bool)
            mask[height // 4 : -height // 4, width // 4 : -width // 4] = True
            masks.append(mask)
        return captions, self.draw(self.export_pipe(), captions, image=images, mask_image=masks)


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """`(height, width)` float32, 1 where to draw: a box (4 of 10), strokes (3), all but a box (2) or everything (1)."""
    kind = rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])
    if kind == 3:
        return np.ones((height, width), np.float32)
    if kind == 1:
        return _strokes(rng, height, width)
    sides = rng.uniform(0.25, 0.75, 2) * (height, width)
    top, left = rng.uniform(0, 1, 2) * ((height, width) - sides)
    mask = np.zeros((height, width), np.float32)
    mask[round(top) : max(round(top + sides[0]), 1), round(left) : max(round(left + sides[1]), 1)] = 1
    return 1 - mask if kind == 2 else mask


def _strokes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One to three brush strokes, each of two to four straight pieces."""
    points = np.stack(np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij"), -1)
    nearest = np.full((height, width), np.inf)
    for _ in range(rng.integers(1, 4)):
        corners = rng.uniform(0, 1, (rng.integers(3, 6), 2)) * (height, width)
        for a, b in zip(corners, corners[1:]):
            along = ((points - a) @ (b - a) / max((b - a) @ (b - a), 1e-9)).clip(0, 1)
            nearest = np.minimum(nearest, np.linalg.norm(points - a - along[..., None] * (b - a), axis=-1))
    return (nearest < rng.uniform(0.05, 0.12) * min(height, width)).astype(np.float32)
