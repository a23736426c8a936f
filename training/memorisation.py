"""Whether a model gives training pictures back: how near what it draws is to them, against true pictures that it never saw."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from sfumato.training.evaluation import grid
from sfumato.training.features import distances


def nearest(queries: np.ndarray, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `(N, D)` its nearest row of all blocks `(M, D)`: the distance `(N,)` and the number `(N,)`."""
    queries, start = np.asarray(queries, np.float64), 0
    found, which = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for block in blocks:
        apart = distances(queries, block)
        here = apart.argmin(1)
        apart = apart[np.arange(len(queries)), here]
        which = np.where(apart < found, start + here, which)
        found, start = np.minimum(apart, found), start + len(block)
    return found, which


def as_rows(pictures: np.ndarray) -> np.ndarray:
    """Pictures `(N, H, W, C)` uint8 as rows whose distance is the root mean square over pixels, of 1 for white to black."""
    return pictures.reshape(len(pictures), -1).astype(np.float32) / (255 * np.prod(pictures.shape[1:]) ** 0.5)


def memorisation(
    made: np.ndarray,
    seen_made: np.ndarray,
    unseen: np.ndarray,
    seen_unseen: np.ndarray,
    train: Iterable[np.ndarray],
    seen_train: np.ndarray,
) -> tuple[dict[str, float], np.ndarray]:
    """Distances of drawn pictures to their nearest training pictures, in pixels and in features.

    Args:
        made, unseen: pictures `(., H, W, C)` uint8, drawn ones and true ones that were not trained.
        seen_made, seen_unseen, seen_train: features `(., D)`.
        train: the training pictures, in blocks `(., H, W, C)` uint8: a large set does not fit into memory as numbers.

    Returns:
        In pixels and in features, the median distance of what is drawn, and the same of unseen pictures; in pixels, the share
        of what is drawn that is nearer to a training picture than all but 5% of the unseen ones are. (In features noise that
        no eye sees takes a copy farther away than an unseen picture is, so a share there would tell nothing.) And the numbers
        of the nearest training pictures, `(N, 2)`: by pixels, by features.
    """
    scores, numbers = {}, []
    for space, x, other, blocks in (
        ("pixels", as_rows(made), as_rows(unseen), map(as_rows, train)),
        ("features", seen_made, seen_unseen, [seen_train]),
    ):
        apart, which = nearest(np.concatenate([x, other]), blocks)
        apart, baseline = apart[: len(x)], apart[len(x) :]
        numbers.append(which[: len(x)])
        scores[f"nearest training picture, {space}"] = float(np.median(apart))
        scores[f"the same of held-out pictures, {space}"] = float(np.median(baseline))
        if space == "pixels":
            scores["share nearer than 95% of held-out pictures, pixels"] = float(np.mean(apart < np.quantile(baseline, 0.05)))
    return scores, np.stack(numbers, axis=1)


def sheet(cells: list[tuple[np.ndarray, str]]) -> Image.Image:
    """Pictures with captions; rows of a drawn one, the training picture nearest in pixels and the one nearest in features."""
    shown = [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture, _ in cells]
    return grid(shown, [caption for _, caption in cells], columns=6)
