"""Batches of prepared images.

Everything random about a sample is a function of (seed, epoch, index); see `streams`.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import ArraySet
from sfumato.training.data.streams import GOLDEN_RATIO, STREAM_VERSION, Streams, streams_of
from sfumato.training.models.latent_space import to_pixel_values


class Sample(NamedTuple):
    """What is decided about a sample before anything is read.

    Attributes:
        index: index of the image in the set.
        flip: whether it is mirrored.
        caption: which of its own captions; -1 is the empty one.
        level: the noise level, in [0, 1).
        key: the key of its random streams.
    """

    index: int
    flip: bool
    caption: int
    level: float
    key: int


@dataclass(frozen=True, kw_only=True)
class SampleData:
    """Where the tensors of a batch come from.

    Attributes:
        images: the prepared set.
        texts: token ids or embeddings of all captions, from `cached.cached_texts`.
        streams: where everything random about a sample comes from.
        latents: from `cached.cached_latents`, if they were computed.
        extra_arrays: makes the task's further arrays, by name, from an image `(H, W, C)` uint8, a key and the streams.
        tokenizer: for captions of data that are read as a stream, if the task uses captions.
        as_stored: x_0 is the array as the set stores it, one value for each square of pixels.
    """

    images: ArraySet
    texts: np.ndarray
    streams: Streams
    latents: np.ndarray | None = None
    extra_arrays: Callable[[np.ndarray, int, Streams], dict[str, np.ndarray]] | None = None
    tokenizer: Any = None
    as_stored: bool = False


class TrainingSamples(Dataset):
    """Training samples by position in an endless stream; epoch = position // length, and each epoch has its own random order.

    If images have several sizes, positions come in blocks of `block` samples of one size (what all processes together read
    for one batch); the last block of a size is filled up with the first images of that size.
    """

    def __init__(self, images: ArraySet, config: Config, *, block: int = 1, streams: Streams | None = None):
        self.images = images
        self.config = config
        self.block = block
        self.streams = streams or streams_of(STREAM_VERSION, config.seed)
        train = images.select("train")
        buckets = images.table["bucket"][train]
        parts = [train[buckets == k] for k in range(len(images.buckets))]
        self.parts = [part for part in parts if len(part)]
        several = len(self.parts) > 1
        self.length = sum(-(-len(part) // block) * block for part in self.parts) if several else len(train)
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    def order(self, epoch: int) -> np.ndarray:
        """The records of an epoch in the order in which they are read, `(length,)`."""
        rng = np.random.default_rng((self.config.seed, epoch))
        if len(self.parts) == 1:
            return self.parts[0][rng.permutation(len(self.parts[0]))]
        blocks = []
        for part in self.parts:
            shuffled = part[rng.permutation(len(part))]
            blocks += list(np.resize(shuffled, -(-len(part) // self.block) * self.block).reshape(-1, self.block))
        return np.concatenate([blocks[k] for k in rng.permutation(len(blocks))])

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position."""
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[Sample]:
        """The samples at several positions, drawn together."""
        epochs, indices = [], []
        for position in positions:
            epoch, place = divmod(position, self.length)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self.order(epoch)
            epochs.append(epoch)
            indices.append(int(self._order[place]))
        counts = self.images.table["num_captions"][indices]
        return decide(self.config, self.streams, epochs, indices, counts, positions)


def decide(
    config: Config, streams: Streams, epochs: list[int], indices: list[int], num_captions: np.ndarray, positions: list[int]
) -> list[Sample]:
    """What is decided about the records `indices` in the given epochs, at the given positions of the run."""
    random_flip = config.data.random_flip
    choices = streams.choices(np.array(epochs), np.array(indices), num_captions, random_flip)
    captions = np.where(choices.dropout < config.objective.caption_dropout, -1, choices.caption)
    levels = spread_levels(config.seed, positions) if config.objective.low_discrepancy else choices.level
    flips = choices.flip < 0.5 if random_flip else np.zeros(len(positions), bool)
    columns = (indices, flips.tolist(), captions.tolist(), levels.tolist(), choices.key.tolist())
    return [Sample(*row) for row in zip(*columns)]


def spread_levels(seed: int, positions: list[int]) -> np.ndarray:
    """Noise levels in [0, 1): golden-ratio steps spread them evenly over any consecutive positions, hence over every batch."""
    return (np.random.default_rng(seed).random() + np.array(positions) * GOLDEN_RATIO) % 1.0


class Positions(Sampler):
    """The positions that one process reads, endlessly: blocks of `batch_size`, which the processes take in turn."""

    def __init__(self, batch_size: int, rank: int, num_processes: int, start: int = 0):
        self.batch_size = batch_size
        self.rank = rank
        self.num_processes = num_processes
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.num_processes * self.batch_size


def collate(samples: list[Sample], data: SampleData) -> dict[str, torch.Tensor]:
    """One batch; see `batches`."""
    first, empty = data.images.table["first_caption"], len(data.images.captions)
    captions = [empty if sample.caption < 0 else int(first[sample.index]) + sample.caption for sample in samples]
    text = torch.from_numpy(data.texts[captions])
    if data.latents is not None:
        x_0 = torch.from_numpy(data.latents[[sample.index for sample in samples]])
        return {"x_0": x_0, "text": text, **level_and_key(samples)}
    if data.as_stored:
        x_0 = to_pixel_values(np.stack([data.images.stored(sample.index) for sample in samples]))
        return {"x_0": x_0, "text": text, **level_and_key(samples)}
    images = [data.images.image(sample.index) for sample in samples]
    return {"text": text, **level_and_key(samples), **image_tensors(images, samples, data)}


def level_and_key(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """`timestep_u`, `sample_key` and `is_empty`."""
    return {
        "timestep_u": torch.tensor([sample.level for sample in samples]),
        "sample_key": torch.tensor([sample.key for sample in samples]),
        "is_empty": torch.tensor([sample.caption < 0 for sample in samples]),
    }


def image_tensors(images: list[np.ndarray], samples: list[Sample], data: SampleData) -> dict[str, torch.Tensor]:
    """`pixel_values` of images `(H, W, C)`, mirrored where that was decided, and the task's further tensors."""
    images = [image[:, ::-1] if sample.flip else image for image, sample in zip(images, samples)]
    tensors = {"pixel_values": to_pixel_values(np.stack(images))}
    if data.extra_arrays is not None:
        rows = [data.extra_arrays(image, sample.key, data.streams) for image, sample in zip(images, samples)]
        tensors |= {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    return tensors


def batches(
    data: SampleData, config: Config, *, rank: int = 0, num_processes: int = 1, start: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless training batches of one process, starting at the global position `start`.

    Yields:
        `pixel_values` (B, C, H, W) float32 in [-1, 1], or `x_0` (B, C, h, w) if there are latents; `text`, which is token
        ids (B, L) or embeddings (B, L, D); `timestep_u` (B,) in [0, 1); `sample_key` (B,) int64; `is_empty` (B,), true where
        the caption was dropped; and what `extra_arrays` returns.
    """
    block = config.train.batch_size * num_processes
    return iter(
        DataLoader(
            TrainingSamples(data.images, config, block=block, streams=data.streams),
            batch_sampler=Positions(config.train.batch_size, rank, num_processes, start),
            collate_fn=partial(collate, data=data),
            num_workers=config.train.num_workers,
            multiprocessing_context="fork" if config.train.num_workers else None,  # workers share the mapped files
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
        )
    )


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on the device, by non-blocking copies."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def seed_layers(streams: Streams, batch: dict[str, torch.Tensor]) -> None:
    """Seed torch's global generator, which dropout layers use, with the first sample of a batch from the loader."""
    seed = streams.torch_seed(int(batch["sample_key"].numpy()[0]))
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # seeds only the CPU's generator, at a fraction of the cost
        torch.default_generator.manual_seed(seed)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach the whole process group; the trainer needs its workers to finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
