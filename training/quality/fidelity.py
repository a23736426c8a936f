"""How near images are to the true ones, pair by pair."""

import importlib.util

import numpy as np
import torch

from sfumato.training.config.rules import PACKAGES
from sfumato.training.quality.distances import frechet_distance
from sfumato.training.quality.features import features


def feature_distances(true: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """`FD`, the Fréchet distance of two sets of pictures `(N, H, W, C)` uint8, and `LD`, the mean distance within pairs.

    Both in `features`; of one pair, no FD; empty where their packages are not installed.
    """
    if not all(map(importlib.util.find_spec, PACKAGES)):
        return {}
    a, b = features(true), features(made)
    spread = {"FD": frechet_distance(a, b)} if len(a) > 1 else {}
    return spread | {"LD": float(np.linalg.norm(a - b, axis=1).mean())}


def picture_quality(true: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """How near pictures are to the true ones; both `(N, H, W, C)` uint8.

    Returns:
        `PSNR` in dB, the mean over pictures of 10 log10(255^2 / MSE), at most 100; `SSIM`, the mean structural similarity
        (Wang et al. 2004), where torchmetrics is installed (extra `[metrics]`).
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except ModuleNotFoundError:
        ssim = None
    found = {"PSNR": []} if ssim is None else {"PSNR": [], "SSIM": []}
    for pair in zip(true, drawn):
        a, b = (x.astype(np.float32) / 255 for x in pair)
        found["PSNR"].append(10 * np.log10(1 / max(float(np.square(a - b).mean()), 1e-10)))
        if ssim is not None:
            pair = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (b, a))
            found["SSIM"].append(float(ssim(*pair, data_range=1.0)))
    return {name: float(np.mean(values)) for name, values in found.items()}
