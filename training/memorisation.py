"""Whether a model gives training pictures back: how near what it draws is to them, against true pictures that it never saw."""

import numpy as np
from PIL import Image

from sfumato.training.evaluation import grid
from sfumato.training.features import distances


def nearest(queries: np.ndarray, among: np.ndarray, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `(N, D)` its nearest row of `(M, D)`: the distance `(N,)` and the number `(N,)`."""
    found = [distances(queries[k : k + chunk], among) for k in range(0, len(queries), chunk)]
    return np.concatenate([d.min(1) for d in found]), np.concatenate([d.argmin(1) for d in found])


def as_rows(pictures: np.ndarray) -> np.ndarray:
    """Pictures `(N, H, W, C)` uint8 as rows whose distance is the root mean square over pixels, of 1 for white to black."""
    return pictures.reshape(len(pictures), -1).astype(np.float32) / (255 * np.prod(pictures.shape[1:]) ** 0.5)


def memorisation(
    made: np.ndarray,
    seen_made: np.ndarray,
    train: np.ndarray,
    seen_train: np.ndarray,
    held_out: np.ndarray,
    seen_held_out: np.ndarray,
) -> tuple[dict[str, float], np.ndarray]:
    """Distances of drawn pictures to their nearest training pictures, in pixels and in features.

    Args:
        made, train, held_out: pictures `(., H, W, C)` uint8.
        seen_made, seen_train, seen_held_out: their features `(., D)`.

    Returns:
        In pixels and in features, the median distance of what is drawn, the same of held-out pictures, and the share of what
        is drawn that is nearer to a training picture than all but 5% of the held-out ones are. And the numbers of the
        nearest training pictures, `(N, 2)`: by pixels, by features.
    """
    scores, numbers = {}, []
    for space, (x, among, other) in {
        "pixels": map(as_rows, (made, train, held_out)),
        "features": (seen_made, seen_train, seen_held_out),
    }.items():
        apart, which = nearest(x, among)
        baseline = nearest(other, among)[0]
        numbers.append(which)
        scores[f"nearest training picture, {space}"] = float(np.median(apart))
        scores[f"the same of held-out pictures, {space}"] = float(np.median(baseline))
        scores[f"share nearer than 95% of held-out pictures, {space}"] = float(np.mean(apart < np.quantile(baseline, 0.05)))
    return scores, np.stack(numbers, axis=1)


def sheet(made: np.ndarray, captions: list[str], train: np.ndarray, names: list[str], which: np.ndarray) -> Image.Image:
    """Rows of a drawn picture, the training picture nearest in pixels and the one nearest in features."""
    cells = [
        cell
        for picture, caption, (a, b) in zip(made, captions, which)
        for cell in ((picture, caption), (train[a], f"pixels: {names[a]}"), (train[b], f"features: {names[b]}"))
    ]
    return grid(
        [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p, _ in cells], [c for _, c in cells], columns=6
    )
