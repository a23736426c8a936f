"""The `molecules` data set: QM9, 130,831 molecules of up to nine heavy atoms, with captions that RDKit reads off them.

Needs the extra `molecules` (rdkit, qm9pack). Two of a hundred captions, by their hash, are held out with all their molecules.
"""

import csv
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.molecules import MoleculeCodec
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record, hash_fraction

HELD_OUT_SHARE = 0.02


def open_codec(config: DataConfig, files: list[Path]) -> MoleculeCodec:
    """Graphs of up to nine atoms."""
    return MoleculeCodec()


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """All molecules of QM9, or the first `max_records`, shuffled once."""
    codec, smiles = MoleculeCodec(), qm9_smiles()
    for number in np.random.default_rng(0).permutation(len(smiles)).tolist():
        try:
            molecule = codec.read(smiles[number])
            caption = codec.caption(molecule)
        except ValueError as error:
            yield Record(str(number), fault=str(error))
            continue
        split = "held_out" if hash_fraction(caption) < HELD_OUT_SHARE else "train"
        yield Record(str(number), lambda molecule=molecule: molecule, [caption], split)


def qm9_smiles() -> list[str]:
    """The SMILES of QM9 in its order. (Its package imports what newer Pythons lack, so its tables are read as they lie.)"""
    spec = find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("molecules need qm9pack: pip install 'sfumato[molecules]'")
    smiles = []
    for part in sorted(Path(spec.submodule_search_locations[0], "data").glob("qm9_part*.csv")):
        with open(part, encoding="utf-8", newline="") as lines:
            smiles += [row["SMILES"] for row in csv.DictReader(lines)]
    return smiles
