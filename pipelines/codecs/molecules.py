"""Molecules as the pairs of their atoms: bonds in some channels, what each atom of a pair is in the others.

With n atoms at most the grid has n - 1 rows and columns: row r stands for atom r, column c for atom c + 1, atoms in the order
of canonical SMILES. Channels: single, double and triple bond between the two, then element (C, N, O, F) and charge of the
row's atom, then of the column's. Hydrogens are what the valences leave. Every bond but those of the first and the last atom
is there twice and every atom many times; decoding takes the mean.

Decoding needs numpy alone, and gives atoms and bonds. SMILES, SDF and pictures need RDKit (extra `molecules`).
"""

import re

import numpy as np

ELEMENTS = ("C", "N", "O", "F")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# SMARTS of the groups that captions name.
GROUPS = {
    "alcohol": "[OX2H][CX4]",
    "amine": "[NX3;!$(NC=[O,N]);!$(N[#6]#*);!$(N=*)][CX4]",
    "nitrile": "[CX2]#[NX1]",
    "carbonyl": "[CX3]=[OX1]",
    "ether": "[OX2;!H]([CX4])[CX4]",
}


class MoleculeCodec:
    """A molecule is a dict: `elements`, a list of symbols; `charges`, a list; `bonds`, a list of (i, j, order)."""

    kind, version, stored = "molecules", 1, "uint8"
    endings = (".sdf", ".smi", ".png")

    def __init__(self, atoms: int = 9):
        self.atoms = int(atoms)
        self.shape = (self.atoms - 1, self.atoms - 1, 13)

    def describe(self):
        """See the module."""
        channels = ["single", "double", "triple"]
        channels += [f"{end} {name}" for end in ("row", "column") for name in (*ELEMENTS, "charge")]
        return {
            "kind": self.kind, "version": self.version, "settings": {"atoms": self.atoms}, "shape": list(self.shape),
            "axes": ["atom r", "atom c + 1", "channel"], "channels": channels, 
            "units": "1 where it is so; charge c as 0.5 + c / 2",
        }  # fmt: skip

    def encode(self, thing):
        """Atoms and bonds to pairs."""
        elements, charges = thing["elements"], thing["charges"]
        count = len(elements)
        if not 1 <= count <= self.atoms:
            raise ValueError(f"{count} heavy atoms, of at most {self.atoms}")
        if odd := sorted(set(elements) - set(ELEMENTS)):
            raise ValueError(f"an element that is not {', '.join(ELEMENTS)}: {', '.join(odd)}")
        if any(abs(charge) > 1 for charge in charges):
            raise ValueError("a charge beyond one")
        bonds = np.zeros((self.atoms, self.atoms, 3), np.float32)
        for i, j, order in thing["bonds"]:
            if order not in (1, 2, 3) or i == j:
                raise ValueError(f"a bond of order {order} between atoms {i} and {j}")
            bonds[i, j, order - 1] = bonds[j, i, order - 1] = 1
        atoms = np.zeros((self.atoms, 5), np.float32)
        atoms[:, 4] = 0.5
        for i, (element, charge) in enumerate(zip(elements, charges)):
            atoms[i, ELEMENTS.index(element)] = 1
            atoms[i, 4] = 0.5 + charge / 2
        rows = np.broadcast_to(atoms[:-1, None], (*self.shape[:2], 5))
        columns = np.broadcast_to(atoms[None, 1:], (*self.shape[:2], 5))
        return np.concatenate([bonds[:-1, 1:], rows, columns], -1)

    def decode(self, array):
        """Pairs to atoms and bonds: what is nearer to there than to not there. Nothing is corrected."""
        array, n = np.asarray(array, np.float64).reshape(self.shape), self.atoms
        atoms, seen = np.zeros((n, 5)), np.zeros((n, 1))
        atoms[:-1] += array[..., 3:8].sum(1)
        atoms[1:] += array[..., 8:13].sum(0)
        seen[:-1] += n - 1
        seen[1:] += n - 1
        atoms /= seen
        pairs, times = np.zeros((n, n, 3)), np.zeros((n, n, 1))
        pairs[:-1, 1:] += array[..., :3]
        times[:-1, 1:] += 1
        pairs, times = pairs + pairs.transpose(1, 0, 2), times + times.transpose(1, 0, 2)
        pairs /= np.maximum(times, 1)
        there = [i for i in range(n) if atoms[i, :4].max() > 0.5]
        number = {i: k for k, i in enumerate(there)}
        bonds = []
        for i in there:
            for j in there:
                if i < j and pairs[i, j].max() > 0.5:
                    bonds.append((number[i], number[j], int(pairs[i, j].argmax()) + 1))
        return {
            "elements": [ELEMENTS[int(atoms[i, :4].argmax())] for i in there],
            "charges": [int(np.clip(np.round((atoms[i, 4] - 0.5) * 2), -1, 1)) for i in there],
            "bonds": bonds,
        }

    def to_rdkit(self, thing):
        """The molecule as RDKit has it, sanitised; None where RDKit says that there is no such molecule."""
        chem = _rdkit()
        writable = chem.RWMol()
        for element, charge in zip(thing["elements"], thing["charges"]):
            atom = chem.Atom(element)
            atom.SetFormalCharge(charge)
            writable.AddAtom(atom)
        orders = (chem.BondType.SINGLE, chem.BondType.DOUBLE, chem.BondType.TRIPLE)
        for i, j, order in thing["bonds"]:
            writable.AddBond(i, j, orders[order - 1])
        molecule = writable.GetMol()
        if not molecule.GetNumAtoms() or chem.SanitizeMol(molecule, catchErrors=True):
            return None
        return molecule

    def read(self, smiles):
        """A molecule from SMILES, hydrogens left out, atoms in canonical order.

        Raises:
            ValueError: it is none, or holds what this codec has no place for.
        """
        chem = _rdkit()
        parsed = chem.MolFromSmiles(smiles)
        if parsed is None:
            raise ValueError("no molecule")
        parsed = chem.MolFromSmiles(chem.MolToSmiles(chem.RemoveHs(parsed), isomericSmiles=False))
        if parsed is None:
            raise ValueError("no molecule")
        chem.Kekulize(parsed, clearAromaticFlags=True)
        thing = {
            "elements": [atom.GetSymbol() for atom in parsed.GetAtoms()],
            "charges": [atom.GetFormalCharge() for atom in parsed.GetAtoms()],
            "bonds": [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), int(b.GetBondTypeAsDouble())) for b in parsed.GetBonds()],
        }
        if any(atom.GetNumRadicalElectrons() for atom in parsed.GetAtoms()):
            raise ValueError("a radical")
        self.encode(thing)
        return thing

    def smiles(self, thing):
        """Canonical SMILES, or None where it is no molecule; `.` stands between its pieces."""
        molecule = self.to_rdkit(thing)
        return None if molecule is None else _rdkit().MolToSmiles(molecule)

    def caption(self, thing):
        """What RDKit reads off a molecule, such as `nine atoms, two nitrogen, one oxygen, one ring, aromatic, amine`."""
        molecule = self.to_rdkit(thing)
        if molecule is None:
            raise ValueError("no molecule")
        chem, counts = _rdkit(), [thing["elements"].count(element) for element in ELEMENTS]
        rings = molecule.GetRingInfo().NumRings()
        words = [f"{_number(sum(counts))} atom{'s' if sum(counts) > 1 else ''}"]
        words += [f"{_number(n)} {name}" for n, name in zip(counts[1:], ("nitrogen", "oxygen", "fluorine")) if n]
        words += [f"{_number(rings)} ring{'s' if rings > 1 else ''}"] if rings else ["no ring"]
        words += ["aromatic"] if any(atom.GetIsAromatic() for atom in molecule.GetAtoms()) else []
        words += [name for name, smarts in GROUPS.items() if molecule.HasSubstructMatch(chem.MolFromSmarts(smarts))]
        return ", ".join(words)

    def judge(self, thing, caption):
        """Whether it is a molecule in one piece, without any correction, and whether its own caption is this one."""
        smiles = self.smiles(thing)
        valid = smiles is not None
        whole = valid and "." not in smiles
        own = set(self.caption(thing).split(", ")) if valid else set()
        wanted = set(caption.split(", "))
        formula = {word for word in wanted if re.search(r"atom|nitrogen|oxygen|fluorine", word)}
        return {
            "valid": valid,
            "valid, one piece": whole,
            "formula": bool(own) and {word for word in own if re.search(r"atom|nitrogen|oxygen|fluorine", word)} == formula,
            "all": whole and own == wanted,
        }

    def picture(self, thing):
        """Its structure as RDKit draws it; white where there is no such molecule."""
        from io import BytesIO

        from PIL import Image
        from rdkit.Chem import Draw

        molecule = self.to_rdkit(thing)
        if molecule is None:
            return np.full((128, 128, 3), 255, np.uint8)
        drawing = Draw.MolDraw2DCairo(128, 128)
        drawing.DrawMolecule(molecule)
        drawing.FinishDrawing()
        return np.asarray(Image.open(BytesIO(drawing.GetDrawingText())).convert("RGB"))

    def write(self, thing, path):
        """`.sdf`, flat; `.smi`, SMILES; `.png`, its structure."""
        path, chem, molecule = str(path), _rdkit(), self.to_rdkit(thing)
        if path.endswith(".png"):
            from PIL import Image

            return Image.fromarray(self.picture(thing)).save(path)
        if molecule is None:
            raise ValueError("what was drawn is no molecule, by RDKit's rules; draw again with another seed")
        if path.endswith(".smi"):
            with open(path, "w", encoding="utf-8") as file:
                file.write(chem.MolToSmiles(molecule) + "\n")
            return None
        from rdkit.Chem.rdDepictor import Compute2DCoords

        Compute2DCoords(molecule)
        return chem.MolToMolFile(molecule, path)


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _rdkit():
    try:
        from rdkit import Chem, rdBase
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("molecules need RDKit: pip install rdkit") from error
    rdBase.DisableLog("rdApp.*")
    return Chem
