"""The `clips` data set: shapes that move or bounce, eight frames each, with captions that a program can check.

A fifth of the combinations of colour, shape and motion are held out.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.clips import ClipCodec, everything, film
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record

NUM_CLIPS = 16_384


def open_codec(config: DataConfig, files: list[Path]) -> ClipCodec:
    """Eight frames of 32 x 32."""
    return ClipCodec()


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """`NUM_CLIPS` clips of the combinations that are not held out, then one of each that is."""
    captions, codec = everything(), ClipCodec()
    names = list(captions)
    held_out = set(np.random.default_rng(0).permutation(len(names))[: len(names) // 5].tolist())
    train = [name for i, name in enumerate(names) if i not in held_out]
    chosen = [(train[i % len(train)], "train") for i in range(NUM_CLIPS)]
    chosen += [(names[i], "held_out") for i in sorted(held_out)]
    rng = np.random.default_rng(0)
    for i, (name, split) in enumerate(chosen):
        yield Record(str(i), lambda name=name: film(captions[name], codec.frames, codec.side, rng), [name], split)
