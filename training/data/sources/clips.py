"""The `clips` data set: shapes that move or bounce, eight frames each, with captions that a program can check.

A fifth of the combinations of colour, shape and motion are held out. `frames`: single frames of the same clips, as images,
for training the 2D model to which `task: motion` adds motion.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.pipelines.codecs.clips import ClipCodec, everything, film
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record

NUM_CLIPS = 16_384


def open_codec(config: DataConfig, files: list[Path]) -> ClipCodec:
    """Eight frames of 32 x 32."""
    return ClipCodec()


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """`NUM_CLIPS` clips of the combinations that are not held out, then one clip of each that is."""
    captions, codec = everything(), ClipCodec()
    names = list(captions)
    held_out = set(np.random.default_rng(0).permutation(len(names))[: len(names) // 5].tolist())
    train = [name for i, name in enumerate(names) if i not in held_out]
    chosen = [(train[i % len(train)], "train") for i in range(NUM_CLIPS)]
    chosen += [(names[i], "held_out") for i in sorted(held_out)]
    rng = np.random.default_rng(0)
    for i, (name, split) in enumerate(chosen):
        yield Record(str(i), lambda name=name: film(captions[name], codec.frames, codec.side, rng), [name], split)


def open_frames(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """One frame of each clip, chosen by the clip's index, with the clip's caption."""
    for i, record in enumerate(open_source(config, files)):
        yield replace(record, image=partial(_one_frame, record.image, i))


def _one_frame(clip: Any, number: int) -> Image.Image:
    frames = clip()
    return Image.fromarray(frames[number % len(frames)])
