"""Batches of prepared pictures.

All randomness of a sample is a function of (seed, epoch, index), so nothing has to be replayed on resume and the same
sample gets the same caption, noise and noise level on any number of processes.
"""

import signal
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import PictureSet
from sfumato.training.data.streams import GOLDEN_RATIO
from sfumato.training.models.latent_space import to_pixel_values


class CaptionedPictures(Dataset):
    """Training samples by position in an endless stream; epoch = position // length, each in its own shuffled order.

    With pictures of several sizes, positions come in blocks of `block` (all that the processes read for one batch) of one
    size; the last block of a size is filled up with pictures from its start.
    """

    def __init__(
        self,
        pictures: PictureSet,
        seed: int,
        caption_dropout: float,
        random_flip: bool = False,
        block: int = 1,
        low_discrepancy: bool = True,
    ):
        self.pictures, self.seed, self.block, self.low_discrepancy = pictures, seed, block, low_discrepancy
        self.caption_dropout, self.random_flip = caption_dropout, random_flip
        train = pictures.select("train")
        buckets = pictures.table["bucket"][train]
        self.parts = [part for k in range(len(pictures.buckets)) if len(part := train[buckets == k])]
        several = len(self.parts) > 1
        self.length = sum(-(-len(part) // block) * block for part in self.parts) if several else len(train)
        self._epoch, self._order = -1, None
        self._first_u = np.random.default_rng(seed).random()

    def order(self, epoch: int) -> np.ndarray:
        """The records of an epoch in the order they are read, `(length,)`."""
        rng = np.random.default_rng((self.seed, epoch))
        if len(self.parts) == 1:
            return self.parts[0][rng.permutation(len(self.parts[0]))]
        blocks = []
        for part in self.parts:
            shuffled = part[rng.permutation(len(part))]
            blocks += list(np.resize(shuffled, -(-len(part) // self.block) * self.block).reshape(-1, self.block))
        return np.concatenate([blocks[k] for k in rng.permutation(len(blocks))])

    def __getitem__(self, position: int) -> tuple[int, bool, int, float, int]:
        """Number of the picture, whether to mirror it, number of the caption, and for the noise its level and seed.

        A dropped caption has the number past the last; the level is a uniform number in [0, 1).
        """
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.order(epoch)
        index = int(self._order[place])
        rng = np.random.default_rng((self.seed, epoch, index))
        row = self.pictures.table[index]
        number = int(row["first_caption"]) + int(rng.integers(row["num_captions"]))
        if rng.random() < self.caption_dropout:
            number = len(self.pictures.captions)
        # Golden-ratio steps spread the noise levels evenly over any run of positions, hence over every batch.
        u = (self._first_u + position * GOLDEN_RATIO) % 1.0
        seed = int(rng.integers(2**63))
        flip = self.random_flip and rng.random() < 0.5
        if not self.low_discrepancy:
            u = rng.random()
        return index, flip, number, u, seed


class Positions(Sampler):
    """The positions that one process reads, endlessly: block after block of `batch_size`, dealt out to the processes."""

    def __init__(self, batch_size: int, rank: int, num_processes: int, start: int = 0):
        self.batch_size, self.rank, self.num_processes, self.start = batch_size, rank, num_processes, start

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.num_processes * self.batch_size


def collate(samples, pictures: PictureSet, texts: np.ndarray, latents: np.ndarray | None, beside) -> dict:
    """One batch of what `CaptionedPictures` gives; arguments and result as of `batches`."""
    numbers, flips, captions, u, seeds = zip(*samples)
    batch = {"u": torch.tensor(u), "noise_seed": torch.tensor(seeds), "text": torch.from_numpy(texts[list(captions)])}
    if latents is None:
        shown = [pictures.picture(i)[:, ::-1] if f else pictures.picture(i) for i, f in zip(numbers, flips)]
        batch["pixel_values"] = to_pixel_values(np.stack(shown))
        if beside is not None:
            rows = [beside(picture, seed) for picture, seed in zip(shown, seeds)]
            batch |= {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    else:
        batch["x_0"] = torch.from_numpy(latents[list(numbers)])
    return batch


def batches(
    pictures: PictureSet,
    config: Config,
    texts: np.ndarray,
    rank: int = 0,
    num_processes: int = 1,
    start: int = 0,
    latents: np.ndarray | None = None,
    beside: Callable[[np.ndarray, int], dict[str, np.ndarray]] | None = None,
) -> Iterator[dict]:
    """Endless training batches of one process, from global position `start` on.

    Args:
        texts: token ids or embeddings of all captions, from `latents.cached_texts`.
        latents: from `latents.cached_latents`, if they were made.
        beside: what else the task makes, by name, of a picture `(H, W, C)` uint8 and the seed of its noise.

    Yields:
        `pixel_values` (B, C, H, W) float32 in [-1, 1], or `x_0` (B, C, h, w) where there are latents; `text`, which is
        token ids (B, L) or embeddings (B, L, D); `u` (B,) in [0, 1); `noise_seed` (B,); and what `beside` makes.
    """

    block = config.train.batch_size * num_processes
    o, flip = config.objective, config.data.random_flip
    return iter(
        DataLoader(
            CaptionedPictures(pictures, config.seed, o.caption_dropout, flip, block, o.low_discrepancy),
            batch_sampler=Positions(config.train.batch_size, rank, num_processes, start),
            collate_fn=partial(collate, pictures=pictures, texts=texts, latents=latents, beside=beside),
            num_workers=config.train.num_workers,
            multiprocessing_context="fork" if config.train.num_workers else None,  # workers share the mapped files
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
        )
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and SIGTERM reach every process of a group; the trainer still needs its workers to end the step under way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
