"""The `compositions` data set: formulas of the Materials Project for which Ricci et al. 2017 computed transport properties.

They are read from the package matminer, none of whose code is run: `pip install --no-deps matminer`. Formulas that differ
only by a common factor count as one. Three percent of the captions, chosen by hash, are held out with all their compositions.
"""

import csv
import io
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from math import gcd
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.compositions import CompositionCodec, parse
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record, hash_fraction

HELD_OUT_SHARE = 0.03
MAX_ATOMS = 31


def open_codec(config: DataConfig, files: list[Path]) -> CompositionCodec:
    """The periodic table."""
    return CompositionCodec()


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """Every composition with up to 31 atoms of each element, once, in a fixed random order."""
    codec, known = CompositionCodec(), {}
    for formula in formulas():
        numbers = parse(formula)
        divisor = gcd(*numbers.values())
        numbers = {symbol: number // divisor for symbol, number in numbers.items()}
        if max(numbers.values()) <= MAX_ATOMS:
            known.setdefault(codec.formula(numbers), numbers)
    names = sorted(known)
    for number in np.random.default_rng(0).permutation(len(names)).tolist():
        thing = known[names[number]]
        caption = codec.caption(thing)
        split = "held_out" if hash_fraction(caption) < HELD_OUT_SHARE else "train"
        yield Record(names[number], lambda thing=thing: thing, [caption], split)


def formulas() -> list[str]:
    """The formulas of the table inside the package matminer, whose modules are not imported."""
    spec = find_spec("matminer")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the compositions are read from matminer: pip install --no-deps matminer")
    archive = Path(spec.submodule_search_locations[0], "utils/data_files/mp_transport/transport_database.tar.xz")
    with tarfile.open(archive) as members:
        name = next(member for member in members if member.name.endswith("transport_database.csv"))
        text = io.TextIOWrapper(members.extractfile(name), encoding="utf-8", newline="")  # pyright: ignore[reportArgumentType]
        return [row["pretty_formula"] for row in csv.DictReader(text) if "(" not in row["pretty_formula"]]
