"""The `names` data set: first names and surnames of ten countries, from Faker; a twentieth, chosen by hash, are held out.

Needs the extra `texts` (faker).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.texts import COUNTRIES, KINDS, NameCodec, known_names
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record, hash_fraction

HELD_OUT_SHARE = 0.05


def open_codec(config: DataConfig, files: list[Path]) -> NameCodec:
    """A codec of sixteen characters."""
    return NameCodec()


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """Every name of every list, in a fixed random order."""
    pairs = [(f"{country} {kind}", name) for country in COUNTRIES for kind in KINDS for name in known_names(country, kind)]
    for number in np.random.default_rng(0).permutation(len(pairs)).tolist():
        caption, name = pairs[number]
        split = "held_out" if hash_fraction(f"{caption}: {name}") < HELD_OUT_SHARE else "train"
        yield Record(str(number), lambda name=name: name, [caption], split)
