"""The `molecules` and `moses` data sets: molecules with captions that RDKit derives from them.

`molecules` is QM9, 130,831 molecules of up to nine heavy atoms (extra `molecules`: rdkit, qm9pack). `moses` is the MOSES
benchmark, 1,584,663 drug-like molecules of up to 27 heavy atoms (also `pip install --no-deps molsets`). No code of the data
packages is run; only their tables are read. Two percent of the captions, by hash, are held out with all their molecules.
"""

import csv
import gzip
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.molecules import MoleculeCodec
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record, hash_fraction

HELD_OUT_SHARE = 0.02


def open_codec(config: DataConfig, files: list[Path]) -> MoleculeCodec:
    """Nine atoms for QM9, 27 for MOSES."""
    if config.name == "moses":
        return MoleculeCodec(atoms=27, elements=("C", "N", "O", "F", "S", "Cl", "Br"))
    return MoleculeCodec()


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """All molecules in a fixed random order."""
    codec, smiles = open_codec(config, files), (moses_smiles if config.name == "moses" else qm9_smiles)()
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
    """The SMILES of QM9 in their original order."""
    smiles = []
    for part in sorted(_folder_of("qm9pack", "pip install 'sfumato[molecules]'").glob("data/qm9_part*.csv")):
        with open(part, encoding="utf-8", newline="") as lines:
            smiles += [row["SMILES"] for row in csv.DictReader(lines)]
    return smiles


def moses_smiles() -> list[str]:
    """The SMILES of the training molecules of MOSES in their original order."""
    table = _folder_of("moses", "pip install --no-deps molsets") / "dataset" / "data" / "train.csv.gz"
    with gzip.open(table, "rt", encoding="utf-8") as lines:
        return [row["SMILES"] for row in csv.DictReader(lines)]


def _folder_of(package: str, cure: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"these molecules are read from the package {package}: {cure}")
    return Path(spec.submodule_search_locations[0])
