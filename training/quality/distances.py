"""Distances between sets of images in the features of a network."""

import numpy as np
import torch

from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, jackknife_score, mean_score


def gaussian(x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(D,)` of a set `(N, D)` and a factor F, `(min(N, D), D)`, of its covariance F'F."""
    values = torch.from_numpy(np.asarray(x, np.float64))
    factor = (values - values.mean(0)) / (len(values) - 1) ** 0.5
    return values.mean(0), torch.linalg.qr(factor, mode="r").R if len(values) > values.shape[1] else factor


def frechet_distance(a: np.ndarray | tuple, b: np.ndarray | tuple) -> float:
    """`|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))` of two sets `(N, D)` (Heusel et al. 2017, arXiv 1706.08500).

    A set that is compared often may be given as the result of `gaussian`.
    """
    (m_a, x), (m_b, y) = (s if isinstance(s, tuple) else gaussian(s) for s in (a, b))
    # With S_a = x'x and S_b = y'y, the eigenvalues of S_a S_b are the squared singular values of x y'.
    root = torch.linalg.svdvals(x @ y.T).sum()
    return float((m_a - m_b).square().sum() + x.square().sum() + y.square().sum() - 2 * root)


def _kernel_sum(a: np.ndarray, b: np.ndarray, rows: int = 256) -> float:
    """The sum of KID's kernel (x'y / D + 1)^3 over all pairs of two sets, a few rows at a time: sets may be large."""
    return sum(((a[k : k + rows] @ b.T / a.shape[1] + 1) ** 3).sum() for k in range(0, len(a), rows))


def kernel_within(x: np.ndarray) -> float:
    """The mean of KID's kernel over pairs of different images of a set `(N, D)`."""
    x = np.asarray(x, np.float64)
    own = ((np.square(x).sum(1) / x.shape[1] + 1) ** 3).sum()
    return float(_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))


def kernel_distance(a: np.ndarray, b: np.ndarray, within: float | None = None) -> float:
    """Squared maximum mean discrepancy of two sets `(N, D)`, unbiased, kernel (x'y / D + 1)^3: KID (Binkowski et al. 2018,
    arXiv 1801.01401), over all images at once rather than over subsets.

    `within`: the result of `kernel_within(a)`, for a set that is compared often.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    within = kernel_within(a) if within is None else within
    return float(within + kernel_within(b) - 2 * _kernel_sum(b, a) / (len(a) * len(b)))


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances between the rows of `(N, D)` and `(M, D)`: `(N, M)` float64."""
    x, y = (torch.from_numpy(np.asarray(values, np.float64)) for values in (a, b))
    return torch.cdist(x, y).numpy()


def manifold_scores(real: np.ndarray, drawn: np.ndarray, k: int = 5) -> dict[str, np.ndarray]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020, arXiv
    2002.09797), each as values to be averaged: precision and density per drawn image, recall and coverage per real one.

    A set's manifold is the union of balls around its images that reach to their `k`-th neighbours in the set.
    """
    between = distances(real, drawn)  # (N, M)
    of_real, of_drawn = (np.sort(distances(x, x), axis=1)[:, min(k, len(x) - 1)] for x in (real, drawn))
    inside = between < of_real[:, None]
    return {
        "precision": inside.any(0).astype(float),
        "recall": (between < of_drawn[None]).any(1).astype(float),
        "density": inside.sum(0) / k,
        "coverage": (between.min(1) < of_real).astype(float),
    }


def set_distances(evaluation: Evaluation) -> dict[str, Score]:
    """The Frechet and the kernel distance between drawings of training captions and all training images."""
    train = evaluation.reference[evaluation.dataset.select("train")]
    drawn = evaluation.of("train", evaluation.features)
    whole, within = gaussian(train), kernel_within(train)
    measures = {
        "FD": lambda x: frechet_distance(whole, x),
        "KID": lambda x: kernel_distance(train, x, within),
    }
    if not evaluation.plan.intervals:
        return {name: Score(measure(drawn)) for name, measure in measures.items()}
    return {name: jackknife_score(measure, drawn) for name, measure in measures.items()}


def manifold(evaluation: Evaluation) -> dict[str, Score]:
    """Precision, recall, density and coverage of drawings against the training images of the same captions."""
    drawn = evaluation.of("train", evaluation.features)
    values = manifold_scores(evaluation.reference[evaluation.parts["train"]], drawn, k=min(5, len(drawn) - 1))
    return {name: mean_score(v) for name, v in values.items()}
