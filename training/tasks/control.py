"""A ControlNet for a frozen model: images follow edge maps, as an example of any kind of map."""

import numpy as np
import torch
from PIL import Image

from sfumato.figures import to_pil
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import replace_components
from sfumato.pipelines.guided import NetworkInputs
from sfumato.training.config.schema import Config
from sfumato.training.data.streams import Streams
from sfumato.training.models.denoiser import ModelNeeds
from sfumato.training.quality.drawing import sample_indices
from sfumato.training.tasks.protocol import TaskContext, captioned_images, check_not_sharded
from sfumato.training.tasks.text_to_image import TextToImage


class Control(TextToImage):
    """A ControlNet for the frozen model of `init_from`: images follow the edges that it is given."""

    @classmethod
    def model_needs(cls, config: Config) -> ModelNeeds:
        """A ControlNet."""
        return ModelNeeds(trains_controlnet=True)

    def __init__(self, context: TaskContext):
        check_not_sharded(context)
        super().__init__(context)

    @staticmethod
    def extra_arrays(image: np.ndarray, key: int, streams: Streams) -> dict[str, np.ndarray]:
        """The image's edges as a map `(3, H, W)`, 1 on edges."""
        return {"map": np.repeat(find_edges(image)[None], 3, 0).astype(np.float32)}

    def network_input(
        self, x_t: torch.Tensor, batch: dict[str, torch.Tensor], streams: Streams
    ) -> tuple[torch.Tensor, NetworkInputs]:
        """The noisy latents; the map goes to the ControlNet."""
        return x_t, NetworkInputs(control=batch["map"])

    def follow(self, count: int, pipe: SfumatoPipeline) -> tuple[list[str], np.ndarray, list[Image.Image]]:
        """Captions and edge maps `(N, H, W, 3)` uint8 of held-out images, and the images drawn from them."""
        captions, images = captioned_images(self.images, sample_indices(self.images, count))
        maps = np.stack([np.uint8(255 * find_edges(image)) for image in images])[..., None].repeat(3, -1)
        return captions, maps, self.draw(pipe, captions, control_image=list(maps))

    def samples(self) -> tuple[list[str], list[Image.Image]]:
        """Edges of held-out images, and the images drawn from them."""
        titles, images = [], []
        for caption, edge_map, drawing in zip(*self.follow(6, self.export_pipe())):
            titles += [caption, "drawn"]
            images += [to_pil(edge_map), drawing]
        return titles, images

    def scores(self) -> tuple[dict[str, float], str]:
        """How well the edges of drawn images agree with the maps, with the ControlNet and without."""
        pipe = self.export_pipe()
        captions, maps, followed = self.follow(self.config.validation.num_judged, pipe)
        free = self.draw(replace_components(pipe, controlnet=None), captions)
        label = f"edges of {len(maps)} {self.judged_split} images followed"
        return {"F1": _mean_f1(followed, maps), "F1 without control": _mean_f1(free, maps)}, label


def _mean_f1(drawings: list[Image.Image], maps: np.ndarray) -> float:
    """Mean agreement of the edges of drawings with maps `(N, H, W, 3)`."""
    return float(np.mean([edge_f1(find_edges(np.asarray(d)), m[..., 0] > 0) for d, m in zip(drawings, maps)]))


THRESHOLD = 48  # of 255, in the colour channel that differs most


def find_edges(image: np.ndarray) -> np.ndarray:
    """`(H, W)` bool of an image `(H, W, C)` or `(H, W)` uint8: pixels that differ from their right or lower neighbour."""
    values = image.reshape(*image.shape[:2], -1).astype(int)
    right = np.abs(np.diff(values, axis=1, append=values[:, -1:])).max(-1)
    below = np.abs(np.diff(values, axis=0, append=values[-1:])).max(-1)
    return np.maximum(right, below) > THRESHOLD


def _near(marks: np.ndarray) -> np.ndarray:
    """`marks` and the eight pixels around each."""
    height, width = marks.shape
    padded = np.pad(marks, 1)
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def edge_f1(drawn: np.ndarray, expected: np.ndarray) -> float:
    """How well edge maps `(H, W)` agree, to within a pixel: the harmonic mean of precision and recall; 1 if both are empty.

    An edge counts as found where the other map has one on the pixel or next to it, as in the Berkeley contour benchmark
    (Martin et al. 2004), without its one-to-one matching.
    """
    if not drawn.any() or not expected.any():
        return float(drawn.any() == expected.any())
    precision, recall = _near(expected)[drawn].mean(), _near(drawn)[expected].mean()
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))
