"""The `volumes` data set: solids of two parts, one for each combination of words, with captions that a program can check.

A fifth of the combinations are held out.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.volumes import VolumeCodec, caption_of, everything, ideal_solid
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record

COPIES = 20  # of each solid, so that an epoch is more than a few steps


def open_codec(config: DataConfig, files: list[Path]) -> VolumeCodec:
    """Grids of 16 x 16 x 16."""
    return VolumeCodec()


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """The training solids, then each held-out solid once."""
    words, side = everything(), VolumeCodec().side
    held_out = set(np.random.default_rng(0).permutation(len(words))[: len(words) // 5].tolist())
    for copy in range(COPIES):
        for i, each in enumerate(words):
            if i not in held_out:
                yield Record(f"{i}-{copy}", lambda each=each: ideal_solid(each, side), [caption_of(each)], "train")
    for i in sorted(held_out):
        yield Record(str(i), lambda i=i: ideal_solid(words[i], side), [caption_of(words[i])], "held_out")
