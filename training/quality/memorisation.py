"""Whether a model reproduces training images: how near its drawings are to them, compared with true images it never saw."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from sfumato.figures import grid, to_pil
from sfumato.training.data.array_set import evenly_spaced
from sfumato.training.quality.distances import distances
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, mean_score


def nearest(queries: np.ndarray, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `(N, D)`, the nearest row of all blocks `(M, D)`: its distance `(N,)` and its number `(N,)`."""
    queries, start = np.asarray(queries, np.float64), 0
    found, which = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for block in blocks:
        apart = distances(queries, block)
        here = apart.argmin(1)
        apart = apart[np.arange(len(queries)), here]
        which = np.where(apart < found, start + here, which)
        found, start = np.minimum(apart, found), start + len(block)
    return found, which


def flat_rows(images: np.ndarray) -> np.ndarray:
    """Images `(N, H, W, C)` uint8 as rows whose distance is the root mean square over pixels, 1 from white to black."""
    return images.reshape(len(images), -1).astype(np.float32) / (255 * np.prod(images.shape[1:]) ** 0.5)


def nearest_training(
    images: np.ndarray, features: np.ndarray, train: Iterable[np.ndarray], train_features: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The training images nearest to given images, in pixels and in features.

    Args:
        images: `(N, H, W, C)` uint8.
        features, train_features: their features `(., D)` and those of the training images.
        train: the training images, in blocks `(., H, W, C)` uint8, since a large set does not fit into memory as floats.

    Returns:
        The distances and the numbers of the nearest, each `(N, 2)`: by pixels, by features.
    """
    by_pixels = nearest(flat_rows(images), map(flat_rows, train))
    by_features = nearest(features, [train_features])
    return np.stack([by_pixels[0], by_features[0]], axis=1), np.stack([by_pixels[1], by_features[1]], axis=1)


def memorisation(drawn: np.ndarray, unseen: np.ndarray) -> dict[str, float | np.ndarray]:
    """What the distances `(., 2)` of drawn and of unseen true images to the nearest training images say about copying.

    In pixels and in features: the median distance of drawn images, and the same for unseen ones. In pixels only: for each
    drawn image, whether it is nearer to a training image than all but 5% of the unseen ones are. (In features, invisible
    noise can move a copy farther away than an unseen image, so such a share would say nothing.)
    """
    scores = {}
    for k, space in enumerate(("pixels", "features")):
        scores[f"nearest training image, {space}"] = float(np.median(drawn[:, k]))
        scores[f"the same of held-out images, {space}"] = float(np.median(unseen[:, k]))
    scores["share nearer than 95% of held-out images, pixels"] = drawn[:, 0] < np.quantile(unseen[:, 0], 0.05)
    return scores


def memorisation_scores(evaluation: Evaluation) -> dict[str, Score]:
    """See `memorisation`; also adds a sheet of twelve drawings of training captions, from the nearest to the farthest.

    A training caption asks for its training image; a held-out one does not, so its drawing shows whether the model copies.
    The baseline is the true images of the same captions.
    """
    parts, dataset = evaluation.parts, evaluation.dataset
    if not len(parts["held_out"]) + len(parts["combination"]):
        return {}
    train = dataset.select("train")
    new = np.concatenate([parts["held_out"], parts["combination"]])
    blocks = (evaluation.real(train[k : k + 512]) for k in range(0, len(train), 512))
    images = np.concatenate([evaluation.drawings, evaluation.real(new)])
    features = np.concatenate([evaluation.features, evaluation.reference[new]])
    apart, which = nearest_training(images, features, blocks, evaluation.reference[train])
    of_drawn, of_real = apart[: len(evaluation.drawings)], apart[len(evaluation.drawings) :]
    of_train = evaluation.of("train", of_drawn)
    unseen = of_real[: len(parts["held_out"])] if len(parts["held_out"]) else of_real
    scores: dict[str, Score] = {}
    for label, drawn, real in (("", of_train, unseen), (", held-out captions", of_drawn[len(parts["train"]) :], of_real)):
        for name, values in memorisation(drawn, real).items():
            scores[f"{name}{label}"] = mean_score(values) if isinstance(values, np.ndarray) else Score(values)
    order = np.argsort(of_train[:, 1])
    chosen = order[evenly_spaced(len(order), 12)]
    evaluation.sheets["memorisation.png"] = _sheet(evaluation, chosen, evaluation.of("train", train[which]))
    return scores


def _sheet(evaluation: Evaluation, chosen: np.ndarray, nearest_records: np.ndarray) -> Image.Image:
    """Drawings of training captions, each next to the training images nearest to it in pixels and in features."""
    drawings = evaluation.of("train", evaluation.drawings)
    images, titles = [], []
    for i in chosen:
        images.append(drawings[i])
        titles.append(evaluation.caption(int(evaluation.parts["train"][i])))
        for space, k in zip(("pixels", "features"), nearest_records[i]):
            images.append(evaluation.dataset.image(int(k)))
            titles.append(f"{space}: {evaluation.caption(int(k))}")
    return grid([to_pil(image) for image in images], titles)
