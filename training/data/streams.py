"""The random streams of a sample: their names, and what is drawn from them.

A sample has one key. All that is random about it is a function of the key and a stream, so nothing has to be replayed on
resume, and the same sample gets the same caption, noise and noise level on any number of processes.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch

GOLDEN_RATIO = 0.6180339887498949


class Stream(IntEnum):
    """What is drawn for a sample. The numbers are part of the format of checkpoints and never change."""

    CAPTION = 0  # which of its captions
    DROPOUT = 1  # whether the caption is dropped
    FLIP = 2  # whether the image is mirrored
    LEVEL = 3  # its noise level, where levels are not spread evenly over a batch
    NOISE = 4  # the noise on it, all candidates of it
    OFFSET = 5  # the part of the noise that is the same all over a channel
    MASK = 6  # the mask for inpainting
    ESTIMATE = 7  # whether the network is given its own estimate
    LOW_RES_LEVEL = 8  # how noisy the small image for upscaling is
    LOW_RES_NOISE = 9  # and that noise


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is decided about samples, `(B,)` each: the key, the number of the caption, and numbers in [0, 1)."""

    key: np.ndarray
    caption: np.ndarray
    dropout: np.ndarray
    flip: np.ndarray
    level: np.ndarray


class Streams(Protocol):
    """Draws from the streams of samples, by their keys `(B,)` int64.

    Attributes:
        version: kept in checkpoints, so that a run goes on with the streams it began with.
    """

    version: int

    def choices(self, epoch: np.ndarray, index: np.ndarray, num_captions: np.ndarray, flips: bool) -> Choices:
        """What is decided about the records `index` in epochs `epoch`; `flips` says whether some are mirrored."""
        ...

    def uniform(self, keys: torch.Tensor, stream: Stream) -> torch.Tensor:
        """`(B,)` in [0, 1), on the keys' device."""
        ...

    def integers(self, keys: torch.Tensor, stream: Stream, high: int) -> torch.Tensor:
        """`(B,)` int64 in [0, high), on the keys' device."""
        ...

    def normal(self, keys: torch.Tensor, stream: Stream, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers `(B, *shape)`, float32, on the keys' device."""
        ...

    def numpy_generator(self, key: int, stream: Stream) -> np.random.Generator:
        """A generator for what is drawn on the CPU by numpy."""
        ...


class SeededStreams:
    """Version 1, of runs that began before 0.2: a key is a seed of its own, and noise comes from a `torch.Generator` each."""

    version = 1

    def __init__(self, seed: int):
        self.seed = seed

    def choices(self, epoch: np.ndarray, index: np.ndarray, num_captions: np.ndarray, flips: bool) -> Choices:
        """See `Streams`."""
        rows = []
        for each_epoch, each_index, count in zip(epoch, index, num_captions):
            rng = np.random.default_rng((self.seed, int(each_epoch), int(each_index)))
            caption, dropout, key = rng.integers(count), rng.random(), rng.integers(2**63)
            flip = rng.random() if flips else 1.0
            rows.append((key, caption, dropout, flip, rng.random()))
        key, caption, dropout, flip, level = zip(*rows)
        return Choices(
            key=np.array(key, np.int64),
            caption=np.array(caption, np.int64),
            dropout=np.array(dropout),
            flip=np.array(flip),
            level=np.array(level),
        )

    def uniform(self, keys: torch.Tensor, stream: Stream) -> torch.Tensor:
        """See `Streams`. Half of the samples, by a bit of the key, are given the network's estimate."""
        if stream is not Stream.ESTIMATE:
            raise ValueError(f"version 1 draws no {stream.name} by itself")
        return (keys & 4 == 0) * 0.5 + 0.25

    def integers(self, keys: torch.Tensor, stream: Stream, high: int) -> torch.Tensor:
        """See `Streams`."""
        numbers = [int(self.numpy_generator(int(key), stream).integers(high)) for key in keys]
        return torch.tensor(numbers, device=keys.device)

    def normal(self, keys: torch.Tensor, stream: Stream, shape: tuple[int, ...]) -> torch.Tensor:
        """See `Streams`."""
        return noise_for(self._seeds(keys, stream), shape, keys.device)

    def numpy_generator(self, key: int, stream: Stream) -> np.random.Generator:
        """See `Streams`."""
        return np.random.default_rng(int(self._seeds(torch.tensor([key]), stream)[0]))

    @staticmethod
    def _seeds(keys: torch.Tensor, stream: Stream) -> torch.Tensor:
        if stream is Stream.OFFSET:
            return keys ^ 1
        if stream in (Stream.LOW_RES_LEVEL, Stream.LOW_RES_NOISE):
            return (keys + 1) & (2**63 - 1)
        return keys


def noise_for(seeds: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal noise `(B, *shape)`, each sample's from a `torch.Generator` of its own seed."""
    generator = torch.Generator(device)
    rows = [torch.randn(shape, generator=generator.manual_seed(int(s)), device=device) for s in seeds]
    return torch.stack(rows)


_VERSIONS = {1: SeededStreams}
STREAM_VERSION = 1  # of new runs


def streams_of(version: int, seed: int) -> Streams:
    """The streams of a version.

    Raises:
        ValueError: a version that this code does not know.
    """
    if version not in _VERSIONS:
        raise ValueError(f"this run draws its noise by version {version} of the streams, which a later sfumato knows")
    return _VERSIONS[version](seed)
