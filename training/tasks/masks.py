"""Random masks for inpainting: what people cut out of pictures."""

import numpy as np


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
    """One to three strokes of a brush, each of two to four straight pieces."""
    points = np.stack(np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij"), -1)
    nearest = np.full((height, width), np.inf)
    for _ in range(rng.integers(1, 4)):
        corners = rng.uniform(0, 1, (rng.integers(3, 6), 2)) * (height, width)
        for a, b in zip(corners, corners[1:]):
            along = ((points - a) @ (b - a) / max((b - a) @ (b - a), 1e-9)).clip(0, 1)
            nearest = np.minimum(nearest, np.linalg.norm(points - a - along[..., None] * (b - a), axis=-1))
    return (nearest < rng.uniform(0.05, 0.12) * min(height, width)).astype(np.float32)
