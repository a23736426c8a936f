"""Whether a model gives training pictures back: how near what it draws is to them, against true pictures that it never saw."""

from collections.abc import Iterable

import numpy as np

from sfumato.training.quality.distances import distances


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


def flat_rows(pictures: np.ndarray) -> np.ndarray:
    """Pictures `(N, H, W, C)` uint8 as rows whose distance is the root mean square over pixels, of 1 for white to black."""
    return pictures.reshape(len(pictures), -1).astype(np.float32) / (255 * np.prod(pictures.shape[1:]) ** 0.5)


def nearest_training(
    shown: np.ndarray, seen: np.ndarray, train: Iterable[np.ndarray], seen_train: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest training pictures of pictures, in pixels and in features.

    Args:
        shown: pictures `(N, H, W, C)` uint8.
        seen, seen_train: features `(., D)` of them and of the training pictures.
        train: the training pictures, in blocks `(., H, W, C)` uint8: a large set does not fit into memory as numbers.

    Returns:
        The distances and the numbers of the nearest, each `(N, 2)`: by pixels, by features.
    """
    pixels, features = nearest(flat_rows(shown), map(flat_rows, train)), nearest(seen, [seen_train])
    return np.stack([pixels[0], features[0]], axis=1), np.stack([pixels[1], features[1]], axis=1)


def memorisation(made: np.ndarray, unseen: np.ndarray) -> dict[str, float | np.ndarray]:
    """What the distances `(., 2)` of drawn pictures and of unseen true ones to the nearest training pictures tell of copies.

    In pixels and in features, the median distance of what is drawn, and the same of unseen pictures; in pixels, for each
    picture whether it is nearer to a training picture than all but 5% of the unseen ones are. (In features noise that no eye
    sees takes a copy farther away than an unseen picture is, so a share there would tell nothing.)
    """
    scores = {}
    for k, space in enumerate(("pixels", "features")):
        scores[f"nearest training picture, {space}"] = float(np.median(made[:, k]))
        scores[f"the same of held-out pictures, {space}"] = float(np.median(unseen[:, k]))
    scores["share nearer than 95% of held-out pictures, pixels"] = made[:, 0] < np.quantile(unseen[:, 0], 0.05)
    return scores
