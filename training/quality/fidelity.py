"""How near images are to the true ones, pair by pair; all arrays `(N, H, W, C)` uint8."""

import importlib.util

import numpy as np
import torch

from sfumato.registries import METRICS
from sfumato.training.quality.distances import frechet_distance
from sfumato.training.quality.features import compute_features


def psnr(real: np.ndarray, drawn: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB: the mean over images of 10 log10(255^2 / MSE), at most 100."""
    values = []
    for a, b in zip(real, drawn):
        error = float(np.square(a.astype(np.float32) / 255 - b.astype(np.float32) / 255).mean())
        values.append(10 * np.log10(1 / max(error, 1e-10)))
    return float(np.mean(values))


def ssim(real: np.ndarray, drawn: np.ndarray) -> float:
    """Mean structural similarity (Wang et al. 2004), by torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = []
    for pair in zip(drawn, real):
        a, b = (torch.from_numpy(x.astype(np.float32) / 255).permute(2, 0, 1)[None] for x in pair)
        values.append(structural_similarity_index_measure(a, b, data_range=1.0))
    return float(torch.stack(values).double().mean())


def feature_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """Mean distance within pairs in the features of a network."""
    return float(np.linalg.norm(compute_features(real) - compute_features(drawn), axis=1).mean())


def image_quality(real: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """`PSNR`, and `SSIM` if its package is installed."""
    return {name: METRICS[name].compute(real, drawn) for name in ("PSNR", "SSIM") if is_installed(name)}


def feature_distances(real: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """`FD`, the Frechet distance of the two sets, and `LD`, the mean distance within pairs, in the same features.

    A single pair has no FD; the result is empty if the packages are not installed.
    """
    if not is_installed("LD"):
        return {}
    a, b = compute_features(real), compute_features(drawn)
    spread = {"FD": frechet_distance(a, b)} if len(a) > 1 else {}
    return spread | {"LD": float(np.linalg.norm(a - b, axis=1).mean())}


def is_installed(metric: str) -> bool:
    """Whether the packages that a metric needs are installed."""
    return all(importlib.util.find_spec(package) for package in METRICS[metric].needs)
