"""The random streams of a sample: their names, and what is drawn from them.

Each sample has one key. Everything random about it is a function of the key and a stream, so nothing has to be replayed on
resume, and a sample gets the same caption, noise and noise level on any number of processes.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

GOLDEN_RATIO = 0.6180339887498949


class Stream(IntEnum):
    """What is drawn for a sample. The numbers are part of the checkpoint format and never change."""

    CAPTION = 0  # which of its captions is used
    DROPOUT = 1  # whether the caption is dropped
    FLIP = 2  # whether the image is mirrored
    LEVEL = 3  # its noise level, unless levels are spread evenly over a batch
    NOISE = 4  # the noise that is added to it, including all candidates
    OFFSET = 5  # the part of the noise that is constant over each channel
    MASK = 6  # the mask for inpainting
    ESTIMATE = 7  # whether the network is given its own estimate of x_0 as input
    LOW_RES_LEVEL = 8  # the noise level of the low-resolution image in upscaling
    LOW_RES_NOISE = 9  # the noise on that image
    LAYERS = 10  # the seed of dropout layers, taken from the first sample of a batch
    STEP_KIND = 11  # distillation: whether the timestep is one that the sampler visits
    OWN_STEP = 12  # distillation: which of those timesteps
    GUIDANCE = 13  # the guidance scale that the teacher samples with
    LARGE_GUIDANCE = 14  # whether the student's guidance scale is larger
    EMPTY = 15  # what replaces the image when its caption is dropped


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is decided about samples, `(B,)` each: the key, the index of the caption, and numbers in [0, 1)."""

    key: np.ndarray
    caption: np.ndarray
    dropout: np.ndarray
    flip: np.ndarray
    level: np.ndarray


class Streams(Protocol):
    """Draws from the streams of samples, which are given by their keys `(B,)` int64.

    Attributes:
        version: stored in checkpoints, so that a run continues with the streams it began with.
    """

    version: int

    def choices(self, epoch: np.ndarray, index: np.ndarray, num_captions: np.ndarray, flips: bool) -> Choices:
        """What is decided about the records `index` in epochs `epoch`; `flips` says whether images are mirrored at random."""
        ...

    def uniform(self, keys: torch.Tensor, stream: Stream) -> torch.Tensor:
        """Uniform numbers `(B,)` in [0, 1), on the keys' device."""
        ...

    def integers(self, keys: torch.Tensor, stream: Stream, high: int) -> torch.Tensor:
        """Uniform integers `(B,)` int64 in [0, high), on the keys' device."""
        ...

    def normal(self, keys: torch.Tensor, stream: Stream, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers `(B, *shape)`, float32, on the keys' device."""
        ...

    def numpy_generator(self, key: int, stream: Stream) -> np.random.Generator:
        """A generator for what numpy draws on the CPU."""
        ...

    def torch_seed(self, key: int) -> int:
        """The seed of torch's global generator, for dropout layers."""
        ...


class SeededStreams:
    """Version 1, for runs that began before 0.2: a key is itself a seed, and every sample has its own `torch.Generator`."""

    version = 1

    def __init__(self, seed: int):
        self.seed = seed

    def choices(self, epoch: np.ndarray, index: np.ndarray, num_captions: np.ndarray, flips: bool) -> Choices:
        """See `Streams`."""
        rows = []
        for each_epoch, each_index, count in zip(epoch, index, num_captions):
            rng = np.random.default_rng((self.seed, int(each_epoch), int(each_index)))
            caption = rng.integers(count)
            dropout = rng.random()
            key = rng.integers(2**63)
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
        """See `Streams`. A bit of the key decides which half of the samples is given the network's own estimate."""
        if stream is not Stream.ESTIMATE:
            raise ValueError(f"version 1 has no separate stream {stream.name}")
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

    def torch_seed(self, key: int) -> int:
        """See `Streams`."""
        return key

    @staticmethod
    def _seeds(keys: torch.Tensor, stream: Stream) -> torch.Tensor:
        if stream is Stream.OFFSET:
            return keys ^ 1
        if stream in (Stream.LOW_RES_LEVEL, Stream.LOW_RES_NOISE):
            return (keys + 1) & (2**63 - 1)
        return keys


def noise_for(seeds: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal noise `(B, *shape)`, drawn for each sample with a `torch.Generator` under its own seed."""
    generator = torch.Generator(device)
    rows = [torch.randn(shape, generator=generator.manual_seed(int(s)), device=device) for s in seeds]
    return torch.stack(rows)


# Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2 and section 3.3).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


Words = TypeVar("Words", torch.Tensor, np.ndarray, int)


def philox(counter: tuple[Words, ...], key: tuple[int, int], rounds: int = 10) -> tuple[Words, ...]:
    """Four words of 32 random bits for each counter, by Philox4x32.

    Only integer operations are used, so the bits are the same on every device; and they depend only on the counter and the
    key, so they are the same whatever else is drawn.

    Args:
        counter: four tensors or arrays of the same shape, int64 in [0, 2^32); or four Python integers.
        key: two numbers in [0, 2^32).

    Returns:
        Four tensors or arrays of that shape, int64 in [0, 2^32); or four integers.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A product of two words has 64 bits; int64 keeps all of them, although the sign may come out negative.
        product_0, product_2 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = ((product_2 >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product_2 & _WORD, product_0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


class PhiloxStreams:
    """Version 2: a counter-based generator, keyed by seed, epoch, index and stream, that serves the whole batch at once.

    Nothing waits for the host: every draw is computed from tensors on their own device. A key is epoch * 2^32 + index.
    """

    version = 2

    def __init__(self, seed: int):
        self.seed = seed
        self._key = (seed & _WORD, (seed >> 32) & _WORD)

    def words(self, keys: torch.Tensor, streams: torch.Tensor | int, num_blocks: int = 1) -> torch.Tensor:
        """Random 32-bit words, `(B, num_blocks, 4)` int64, for keys `(B,)` and one stream, or one stream per block."""
        block = torch.arange(num_blocks, device=keys.device)
        if isinstance(streams, torch.Tensor):
            block, stream = torch.zeros_like(block), streams.to(keys.device)
        else:
            stream = torch.full_like(block, streams)
        index, epoch = (keys & _WORD)[:, None], (keys >> 32)[:, None]
        counter = torch.broadcast_tensors(block[None], stream[None], index, epoch)
        return torch.stack(philox(tuple(counter), self._key), dim=-1)

    def choices(self, epoch: np.ndarray, index: np.ndarray, num_captions: np.ndarray, flips: bool) -> Choices:
        """See `Streams`."""
        keys = (epoch.astype(np.int64) << 32) | index.astype(np.int64)
        drawn = (Stream.CAPTION, Stream.DROPOUT, Stream.FLIP, Stream.LEVEL)
        # In numpy, because handing the loader's few numbers to torch costs more than drawing them.
        stream = np.array(drawn, np.int64)[:, None]
        counter = np.broadcast_arrays(np.zeros((1, 1), np.int64), stream, keys & _WORD, keys >> 32)
        words = philox(tuple(counter), self._key)[0]
        numbers: Any = ((words >> 8).astype(np.float32) * np.float32(2.0**-24)).astype(np.float64)
        caption, dropout, flip, level = numbers
        number = np.minimum((caption * num_captions).astype(np.int64), num_captions.astype(np.int64) - 1)
        return Choices(key=keys, caption=number, dropout=dropout, flip=flip, level=level)

    def uniform(self, keys: torch.Tensor, stream: Stream) -> torch.Tensor:
        """See `Streams`."""
        return _to_unit(self.words(keys, stream)[:, 0, 0])

    def integers(self, keys: torch.Tensor, stream: Stream, high: int) -> torch.Tensor:
        """See `Streams`. (Takes the upper half of a product; the bias is below high / 2^32.)"""
        return (self.words(keys, stream)[:, 0, 0] * high) >> 32

    def normal(self, keys: torch.Tensor, stream: Stream, shape: tuple[int, ...]) -> torch.Tensor:
        """See `Streams`; uses the Box-Muller transform of pairs of words, with tails cut at 6.8."""
        count = math.prod(shape)
        words = self.words(keys, stream, -(-count // 4)).reshape(len(keys), -1, 2)
        radius = (-2 * ((words[..., 0].float() + 0.5) * 2.0**-32).log()).sqrt()
        angle = words[..., 1].float() * (2 * math.pi * 2.0**-32)
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
        return pairs.flatten(1)[:, :count].reshape(len(keys), *shape)

    def numpy_generator(self, key: int, stream: Stream) -> np.random.Generator:
        """See `Streams`."""
        return np.random.default_rng((self.seed, key >> 32, key & _WORD, stream))

    def torch_seed(self, key: int) -> int:
        """See `Streams`."""
        first, second, *_ = philox((0, int(Stream.LAYERS), key & _WORD, key >> 32), self._key)
        return (first << 31) ^ second


def _to_unit(words: torch.Tensor) -> torch.Tensor:
    """32-bit words as float32 in [0, 1), made from their upper 24 bits."""
    return (words >> 8).float() * 2.0**-24


_VERSIONS = {1: SeededStreams, 2: PhiloxStreams}
STREAM_VERSION = 2  # for new runs


def streams_of(version: int, seed: int) -> Streams:
    """The streams of a version.

    Raises:
        ValueError: this code does not know the version.
    """
    if version not in _VERSIONS:
        raise ValueError(f"this run draws its noise with version {version} of the streams, which needs a later sfumato")
    return _VERSIONS[version](seed)
