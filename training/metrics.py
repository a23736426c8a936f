"""Metrics that are plain functions of pictures."""

from functools import cache

import numpy as np

from sfumato.training.shapes import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, Scene, coverage

# A picture counts as showing a figure only if the best template covers it this well (soft intersection over union).
MIN_OVERLAP = 0.7


def _nearest(value, table: dict) -> str:
    return min(table, key=lambda name: float(np.sum((np.asarray(table[name], float) - value) ** 2)))


@cache
def _unit_area(shape: str) -> float:
    return coverage(shape, 0.5, 0.5, 0.25, 64).mean() / 0.25**2


def read_scene(picture: np.ndarray) -> Scene | None:
    """Read colour, shape, size, place and ground off a picture of the `shapes` data set.

    Args:
        picture: `(H, H, 3)` uint8, H at least 24.

    Returns:
        The scene, or None where no single clean figure can be made out.

    The ground is the median of the border. Along the line from ground to figure colour each pixel gets a coverage in
    [0, 1]; its centroid is the place, and the template that overlaps it best gives shape and size.
    """
    resolution = picture.shape[0]
    pixels = picture.astype(float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = _nearest(np.median(border, axis=0), GROUNDS)
    difference = pixels - np.array(GROUNDS[ground], float)
    core = np.linalg.norm(difference, axis=-1) > 80
    if core.sum() < 4:
        return None
    colour = _nearest(np.median(pixels[core], axis=0), COLOURS)
    axis = np.array(COLOURS[colour], float) - np.array(GROUNDS[ground], float)
    mask = np.clip(difference @ axis / (axis @ axis), 0, 1)
    mask[mask < 0.15] = 0  # faint texture is not figure
    centres = (np.arange(resolution) + 0.5) / resolution
    x, y = (mask.sum(0) @ centres) / mask.sum(), (mask.sum(1) @ centres) / mask.sum()

    best, best_overlap = None, MIN_OVERLAP
    for shape in SHAPES:
        radius = (mask.mean() / _unit_area(shape)) ** 0.5  # the radius at which this shape has the area seen
        template = coverage(shape, x, y, radius, resolution)
        overlap = np.minimum(mask, template).sum() / np.maximum(mask, template).sum()
        if overlap > best_overlap:
            size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
            best, best_overlap = Scene(colour, shape, size, _nearest((x, y), PLACES), ground), overlap
    return best


def shapes_obedience(pictures: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    """Share of pictures that show what their caption says, for each attribute and for all five together (`all`)."""
    read = [read_scene(picture) for picture in pictures]
    result = {
        name: float(np.mean([r is not None and getattr(r, name) == getattr(s, name) for r, s in zip(read, scenes)]))
        for name in ("colour", "shape", "size", "place", "ground")
    }
    result["all"] = float(np.mean([r == s for r, s in zip(read, scenes)]))
    result["unreadable"] = float(np.mean([r is None for r in read]))
    return result
