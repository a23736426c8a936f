"""Obedience: a program reads off a drawing of `shapes` what its caption asked for."""

from functools import cache
from typing import cast

import numpy as np

from sfumato.training.data.sources import shapes
from sfumato.training.data.sources.shapes import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, Pair, Scene, coverage
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, mean_score

# An image counts as showing a figure only if the best template covers it this well (soft intersection over union).
MIN_OVERLAP = 0.7


def _nearest(value, table: dict) -> str:
    return min(table, key=lambda name: float(np.sum((np.asarray(table[name], float) - value) ** 2)))


@cache
def _unit_area(shape: str) -> float:
    return coverage(shape, 0.5, 0.5, 0.25, 64).mean() / 0.25**2


def _ground(pixels: np.ndarray) -> str:
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return _nearest(np.median(border, axis=0), GROUNDS)


def _read_figure(pixels: np.ndarray, ground: str, side: int) -> tuple[str, str, float, tuple[float, float]] | None:
    """Colour, shape, radius and centre of the one figure in a square part of an image; the radius is a fraction of `side`.

    Along the line from ground to figure colour, each pixel gets a coverage in [0, 1]; the coverage's centroid is the
    centre, and the template that overlaps the coverage best gives the shape.
    """
    resolution = len(pixels)
    difference = pixels - np.array(GROUNDS[ground], float)
    core = np.linalg.norm(difference, axis=-1) > 80
    if core.sum() < 4:
        return None
    colour = _nearest(np.median(pixels[core], axis=0), COLOURS)
    axis = np.array(COLOURS[colour], float) - np.array(GROUNDS[ground], float)
    mask = np.clip(difference @ axis / (axis @ axis), 0, 1)
    mask[mask < 0.15] = 0  # faint texture is not part of the figure
    centres = (np.arange(resolution) + 0.5) / resolution
    x, y = (mask.sum(0) @ centres) / mask.sum(), (mask.sum(1) @ centres) / mask.sum()

    best, best_overlap = None, MIN_OVERLAP
    for shape in SHAPES:
        radius = (mask.mean() / _unit_area(shape)) ** 0.5  # the radius at which this shape has the observed area
        template = coverage(shape, x, y, radius, resolution)
        overlap = np.minimum(mask, template).sum() / np.maximum(mask, template).sum()
        if overlap > best_overlap:
            best, best_overlap = (colour, shape, radius * resolution / side, (x, y)), overlap
    return best


def read_scene(image: np.ndarray) -> Scene | None:
    """Read colour, shape, size, place and ground off an image of the `shapes` data set with one figure.

    Args:
        image: `(H, H, 3)` uint8, H at least 24.

    Returns:
        The scene, or None if no single clean figure can be made out.
    """
    pixels = image.astype(float)
    ground = _ground(pixels)
    figure = _read_figure(pixels, ground, len(pixels))
    if figure is None:
        return None
    colour, shape, radius, centre = figure
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    return Scene(colour, shape, size, _nearest(centre, PLACES), ground)


def read_quarters(image: np.ndarray) -> tuple[list[tuple[str, str] | None], str]:
    """Colour and shape in each quarter (row by row; None: nothing, or nothing clean), and the ground.

    Args:
        image: `(H, H, 3)` uint8, H even and at least 24.
    """
    pixels, half = image.astype(float), len(image) // 2
    ground = _ground(pixels)
    quarters = [pixels[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
    figures = [_read_figure(quarter, ground, len(pixels)) for quarter in quarters]
    return [figure and figure[:2] for figure in figures], ground


def shapes_right(images: list[np.ndarray], scenes: list[Scene] | list[Pair]) -> dict[str, list[bool]]:
    """Which images show what their caption says: each attribute by itself, and all of them (`all`).

    For two figures: `ground`; `colours` and `shapes`, whichever figure has them; `all`, each figure in its own colour too.
    """
    if isinstance(scenes[0], Pair):
        pairs = cast(list[Pair], scenes)
        right = [_pair_right(*read_quarters(image), scene) for image, scene in zip(images, pairs)]
        return {name: [r[name] for r in right] for name in right[0]}
    read = [read_scene(image) for image in images]
    right = {
        name: [r is not None and getattr(r, name) == getattr(s, name) for r, s in zip(read, scenes)]
        for name in ("colour", "shape", "size", "place", "ground")
    }
    return right | {"all": [r == s for r, s in zip(read, scenes)], "unreadable": [r is None for r in read]}


def shapes_obedience(images: list[np.ndarray], scenes: list[Scene] | list[Pair]) -> dict[str, float]:
    """The share of images that are correct, for each entry of `shapes_right`."""
    return {name: float(np.mean(right)) for name, right in shapes_right(images, scenes).items()}


def _pair_right(quarters: list, ground: str, scene: Pair) -> dict[str, bool]:
    figures_read = sorted(figure for figure in quarters if figure)
    colours, shapes = (sorted(values) for values in zip(*scene.figures))
    return {
        "colours": [colour for colour, _ in figures_read] == colours,
        "shapes": sorted(shape for _, shape in figures_read) == shapes,
        "ground": ground == scene.ground,
        "all": figures_read == sorted(scene.figures) and ground == scene.ground,
        "unreadable": len(figures_read) != 2,
    }


def obedience(evaluation: Evaluation) -> dict[str, Score]:
    """Obedience to held-out captions of `shapes`, judged by a program; see `shapes_right`."""
    config = evaluation.config
    scenes = shapes.scenes(held_out=True, count=config.validation.num_judged, num_figures=config.data.num_figures)
    images = evaluation.draw([scene.caption for scene in scenes])
    return {name: mean_score(right) for name, right in shapes_right(list(images), scenes).items()}
