"""The random streams of a sample."""

import torch

GOLDEN_RATIO = 0.6180339887498949


def noise_for(seeds: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal noise `(B, *shape)`, each sample's from its own seed."""
    generator = torch.Generator(device)
    rows = [torch.randn(shape, generator=generator.manual_seed(int(s)), device=device) for s in seeds]
    return torch.stack(rows)
