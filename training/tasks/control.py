"""A ControlNet beside a frozen model."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image

from sfumato import figures
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import replace_components
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import PictureSet
from sfumato.training.tasks.text_to_image import TextToImage, captioned


class Control(TextToImage):
    """A ControlNet beside the model of `init_from`, which stays as it is: pictures follow the edges that they are given."""

    def __init__(self, config: Config, pictures: PictureSet, checkpoint: Path | None, accelerator: Accelerator):
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("task=control is not spread over GPUs; use configs/accelerate/multi_gpu.yaml")
        super().__init__(config, pictures, checkpoint, accelerator)

    @staticmethod
    def beside(picture: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """The picture's edges as a map `(3, H, W)`, 1 on edges."""
        return {"map": np.repeat(edges(picture)[None], 3, 0).astype(np.float32)}

    def network_input(self, x_t: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict]:
        """The noisy latents; the map goes to the ControlNet."""
        return x_t, {"map": batch["map"]}

    def followed(self, count: int, pipe: SfumatoPipeline) -> tuple[list[str], np.ndarray, list[Image.Image]]:
        """Captions and edge maps `(N, H, W, 3)` uint8 of held-out pictures, and what is drawn by them."""
        captions, true = captioned(self.pictures, count)
        maps = np.stack([np.uint8(255 * edges(picture)) for picture in true])[..., None].repeat(3, -1)
        return captions, maps, self.drawn(pipe, captions, control_image=list(maps))

    def show(self) -> tuple[list[str], list[Image.Image]]:
        """Edges of held-out pictures, and what is drawn by them."""
        captions, maps, drawn = self.followed(6, self.shareable())
        names, pictures = zip(
            *(cell for c, m, d in zip(captions, maps, drawn) for cell in ((c, figures.to_pil(m)), ("drawn", d)))
        )
        return list(names), list(pictures)

    def scores(self, pipe: SfumatoPipeline) -> tuple[dict[str, float], str]:
        """How well the edges of what is drawn agree with those given, with the ControlNet and without."""
        captions, maps, drawn = self.followed(self.config.validation.num_judged, pipe)
        free = self.drawn(replace_components(pipe, controlnet=None), captions)
        f1 = [np.mean([edge_f1(edges(np.asarray(d)), m[..., 0] > 0) for d, m in zip(made, maps)]) for made in (drawn, free)]
        return {"F1": float(f1[0]), "F1 without control": float(f1[1])}, f"edges of {len(maps)} {self.split} pictures followed"


THRESHOLD = 48  # of 255, in the colour that differs most


def edges(picture: np.ndarray) -> np.ndarray:
    """`(H, W)` bool of a picture `(H, W, C)` or `(H, W)` uint8: pixels that differ from their right or lower neighbour."""
    values = picture.reshape(*picture.shape[:2], -1).astype(int)
    right = np.abs(np.diff(values, axis=1, append=values[:, -1:])).max(-1)
    below = np.abs(np.diff(values, axis=0, append=values[-1:])).max(-1)
    return np.maximum(right, below) > THRESHOLD


def _near(marks: np.ndarray) -> np.ndarray:
    """`marks` and the eight pixels around each."""
    height, width = marks.shape
    padded = np.pad(marks, 1)
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def edge_f1(found: np.ndarray, given: np.ndarray) -> float:
    """How well two edge maps `(H, W)` agree, to one pixel: the harmonic mean of precision and recall; 1 where both are empty.

    An edge counts as found where the other map has one on the pixel or beside it, as in the Berkeley benchmark of contours
    (Martin et al. 2004), without its one-to-one matching.
    """
    if not found.any() or not given.any():
        return float(found.any() == given.any())
    precision, recall = _near(given)[found].mean(), _near(found)[given].mean()
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))
