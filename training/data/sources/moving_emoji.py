"""The `moving_emoji` data set: eight-frame clips of OpenMoji emoji that move or bounce, like the shapes in `clips`.

Needs the extra `openmoji`. A fifth of the combinations of emoji and motion are held out.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.clips import MovingPictureCodec, film_of, motion_words, motions
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record
from sfumato.training.data.sources.openmoji import rasterise, records

NAMES = (
    *("red heart", "red apple", "banana", "lemon", "carrot", "avocado", "mushroom", "cactus", "sunflower", "tulip"),
    *("frog", "pig face", "panda", "lady beetle", "ghost", "alien", "snowman", "fire", "droplet", "strawberry"),
    *("basketball", "balloon", "rocket", "bell"),
)
SIDE = 32  # side of a frame, in pixels
SIZE = 12  # side of the emoji in it, in pixels
NUM_CLIPS = 16_384  # for training


def open_codec(config: DataConfig, files: list[Path]) -> MovingPictureCodec:
    """Eight frames of 32 x 32; the judge knows the emoji as they appear in the clips."""
    pictures = {name: sprite.reshape(SIZE, 4, SIZE, 4, 3).mean((1, 3)).round() for name, sprite in sprites().items()}
    return MovingPictureCodec(side=SIDE, pictures=pictures)


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """`NUM_CLIPS` clips of the combinations that are not held out, then one clip of each that is."""
    every = list(itertools.product(sprites(), motions()))
    held_out = set(np.random.default_rng(0).permutation(len(every))[: len(every) // 5].tolist())
    train = [each for i, each in enumerate(every) if i not in held_out]
    chosen = [(*train[i % len(train)], "train") for i in range(NUM_CLIPS)]
    chosen += [(*every[i], "held_out") for i in sorted(held_out)]
    for i, (name, motion, split) in enumerate(chosen):
        article = "an" if name[0] in "aeiou" else "a"
        yield Record(str(i), partial(_draw, name, motion, i), [f"{article} {name} {motion_words(*motion)}"], split)


def _draw(name: str, motion: tuple[str, str], seed: int) -> np.ndarray:
    return film_of(sprites()[name], *motion, MovingPictureCodec().frames, SIDE, np.random.default_rng(seed))


@lru_cache(maxsize=1)
def sprites() -> dict[str, np.ndarray]:
    """Name -> the emoji on white, four times as large as it appears in the clips.

    Raises:
        ModuleNotFoundError: the packages of the extra are missing.
    """
    drawn = {record["captions"][0]: record["svg"] for record in records(["en"], False)}
    return {name: rasterise(drawn[name], 4 * SIZE) for name in NAMES}
