"""The `spoken_pictures` data set: a coloured shape and its name spoken by espeak-ng, two modalities at once.

Needs the program (Debian: `apt install espeak-ng`). A fifth of the combinations of colour and shape are held out.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.clips import COLOURS, SHAPES, mask_of
from sfumato.pipelines.codecs.sounds import RADIUS, SpokenPictureCodec
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record
from sfumato.training.data.sources.speech import trimmed, with_espeak

SPEAKERS = ("m1", "m3", "m7", "f2", "f4")
TAKES = 120  # samples of each caption


def open_codec(config: DataConfig, files: list[Path]) -> SpokenPictureCodec:
    """Images of 32 x 32 and one second of sound."""
    return SpokenPictureCodec()


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """`TAKES` samples of each training combination, four of each held-out one."""
    names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    held_out = set(np.random.default_rng(0).permutation(len(names))[: len(names) // 5].tolist())
    spoken: dict[tuple, np.ndarray] = {}
    for take in range(TAKES):
        for number, (colour, shape) in enumerate(names):
            if number in held_out and take >= 4:
                continue
            rng = np.random.default_rng([number, take])
            speaker, pitch = SPEAKERS[take % len(SPEAKERS)], 40 + 10 * (take // len(SPEAKERS) % 3)
            key = (colour, shape, speaker, pitch)
            if key not in spoken:
                spoken[key] = trimmed(with_espeak(f"{colour} {shape}", f"en-us+{speaker}", 190, pitch))
            mask = mask_of(shape, *rng.uniform(0.42, 0.58, 2), 32, radius=RADIUS)[..., None]
            picture = np.round(mask * np.array(COLOURS[colour]) + (1 - mask) * 255).astype(np.uint8)
            thing = {"picture": picture, "sound": np.pad(spoken[key], (int(rng.integers(0, 800)), 0))}
            split = "held_out" if number in held_out else "train"
            article = "an" if colour == "orange" else "a"
            yield Record(f"{number}-{take}", lambda thing=thing: thing, [f"{article} {colour} {shape}"], split)
