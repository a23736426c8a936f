"""Where a picture changes from one pixel to the next: the example of what a ControlNet follows."""

import numpy as np

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
