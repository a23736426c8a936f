"""The `shapes` data set: one or two figures on a plain background, drawn by code, with captions that can be checked exactly.

With one figure, every image is a combination of colour x shape x size x place x ground (6 x 4 x 2 x 9 x 4 = 1728). With two
figures, which differ in colour and shape, the caption leaves their places open: 180 pairs, named in either order, on 4
grounds. 256 of the combinations are held out, so that prompt-following is measured on captions never seen in training; with
two figures, whole pairs are held out, so that the two are never seen together.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.clips import COLOURS, SHAPES, mask_of
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.array_set import evenly_spaced
from sfumato.training.data.records import Record

# All COLOURS are darker than all grounds.
SIZES = {"small": 0.14, "large": 0.24}  # radius as a share of the image's side


PLACES = {
    f"{row} {column}".strip() or "centre": (x, y)
    for (row, y), (column, x) in itertools.product(
        {"top": 0.25, "": 0.5, "bottom": 0.75}.items(), {"left": 0.25, "": 0.5, "right": 0.75}.items()
    )
}


GROUNDS = {"white": (255, 255, 255), "grey": (190, 190, 195), "pink": (255, 190, 205), "cream": (255, 240, 185)}


PAIR_RADIUS = 0.165


NUM_HELD_OUT = 256


@dataclass(frozen=True)
class Scene:
    """What a caption with one figure says."""

    colour: str
    shape: str
    size: str
    place: str
    ground: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} at the {self.place} on {self.ground}"


@dataclass(frozen=True)
class Pair:
    """What a caption with two figures says: colour and shape of each, and the ground."""

    figures: tuple[tuple[str, str], tuple[str, str]]
    ground: str

    @property
    def caption(self) -> str:
        phrases = [f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" for colour, shape in self.figures]
        return f"{phrases[0]} and {phrases[1]} on {self.ground}"


@cache
def _everything(num_figures: int) -> tuple[list, list]:
    """All combinations: first those that are trained on, then those that are held out; this split never changes."""
    rng = np.random.default_rng(0)
    if num_figures == 1:
        everything = [Scene(*values) for values in itertools.product(COLOURS, SHAPES, SIZES, PLACES, GROUNDS)]
        order = rng.permutation(len(everything))
        chosen, rest = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
        return [everything[i] for i in sorted(rest)], [everything[i] for i in sorted(chosen)]
    figures = list(itertools.combinations(itertools.product(COLOURS, SHAPES), 2))
    pairs = [(a, b) for a, b in figures if a[0] != b[0] and a[1] != b[1]]
    held_out = set(rng.permutation(len(pairs))[: NUM_HELD_OUT // len(GROUNDS)])
    found = [], []
    for i, pair in enumerate(pairs):
        for ground in GROUNDS:
            orders = [pair, pair[::-1]]
            found[i in held_out].extend(Pair(p, ground) for p in (orders if i not in held_out else [orders[rng.integers(2)]]))
    return found


def scenes(held_out: bool, count: int | None = None, num_figures: int = 1) -> list[Scene] | list[Pair]:
    """The combinations that are held out, or those that are not.

    Either all, or at most `count`, evenly spaced, since they are sorted by colour.
    """
    found = _everything(num_figures)[held_out]
    return found if count is None else [found[i] for i in evenly_spaced(len(found), count)]


def coverage(shape: str, x: float, y: float, radius: float, resolution: int) -> np.ndarray:
    """The share of each pixel that the figure covers, `(resolution, resolution)` in [0, 1].

    `x`, `y` (the figure's centroid) and `radius` are shares of the image's side. Sampled at 4 x 4 points per pixel.
    """
    return mask_of(shape, x, y, resolution, radius=radius, fineness=4)


def draw(scene: Scene | Pair, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene, `(resolution, resolution, 3)` uint8; `rng` varies the centre (3%) and radius (6%) slightly.

    The two figures of a pair are in two different quarters of the image, chosen by `rng`.
    """
    if isinstance(scene, Pair):
        quarters = [((i % 2) / 2 + 0.25, (i // 2) / 2 + 0.25) for i in rng.permutation(4)[:2]]
        figures = [(*figure, centre, PAIR_RADIUS) for figure, centre in zip(scene.figures, quarters)]
    else:
        figures = [(scene.colour, scene.shape, PLACES[scene.place], SIZES[scene.size])]
    image = np.array(GROUNDS[scene.ground], float)
    for colour, shape, centre, radius in figures:
        x, y = np.array(centre) + rng.uniform(-0.03, 0.03, 2)
        mask = coverage(shape, x, y, radius * rng.uniform(0.94, 1.06), resolution)[..., None]
        image = mask * np.array(COLOURS[colour]) + (1 - mask) * image
    return np.round(image).astype(np.uint8)


def check(config, need) -> None:
    """Check the settings of this source; see `config.rules`."""
    need(config.data.num_pictures > 0, "data.num_pictures", "must be positive")
    need(config.data.num_figures in (1, 2), "data.num_figures", "must be 1 or 2")
    absent = ("colours", "shapes") if config.data.num_figures == 1 else ("colour", "shape", "size", "place")
    fits = config.checkpoint.best_by not in absent
    need(fits, "checkpoint.best_by", f"data.num_figures={config.data.num_figures} has no score {', '.join(absent)}")


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """`num_pictures` drawings of the scenes that are not held out, then one of each that is."""
    train, held_out = (scenes(held_out=held, num_figures=config.num_figures) for held in (False, True))
    chosen = [(train[i % len(train)], "train") for i in range(config.num_pictures)] + [(s, "held_out") for s in held_out]
    rng = np.random.default_rng(0)
    for i, (scene, split) in enumerate(chosen):
        yield Record(str(i), lambda scene=scene: draw(scene, config.resolution, rng), [scene.caption], split)
