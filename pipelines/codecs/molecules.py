"""Molecules as the pairs of their atoms: bonds in some channels, what each atom of a pair is in the others.

With n atoms at most there are n - 1 rows and columns: row r stands for atom r, column c for atom c + 1, atoms in the order of
canonical SMILES. A position of the array is one pair, or a block of `block` x `block` pairs. Channels: single, double and
triple bond of each pair, then elements and charges of the rows' atoms, then of the columns'. Hydrogens are what the valences
leave. Every bond but those of the first and the last atom is there twice and every atom many times; decoding takes the mean.

With `places`, further channels say which row and which column it is: rows of a Hadamard matrix, any two of which differ in
half of their columns. They are the same for every molecule. Attention sees no places of its own, and whether an atom has a
bond too many is read along its row and column.

Decoding needs numpy alone, and gives atoms and bonds. SMILES, SDF and pictures need RDKit (extra `molecules`).
"""

import re

import numpy as np

ELEMENTS = ("C", "N", "O", "F")
NAMES = {"N": "nitrogen", "O": "oxygen", "F": "fluorine", "S": "sulfur", "Cl": "chlorine", "Br": "bromine"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDERS = ("single", "double", "triple")
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

    def __init__(self, atoms: int = 9, places: bool = False, block: int = 1, elements=ELEMENTS):
        self.atoms, self.block, self.elements = int(atoms), int(block), tuple(elements)
        if self.block < 1 or self.atoms < 2 or (self.atoms - 1) % self.block:
            raise ValueError(f"blocks of {block} do not divide the pairs of {atoms} atoms")
        self.side = (self.atoms - 1) // self.block
        self.places = _places(self.side) if places else np.zeros((self.side, 0), np.float32)
        self.facts = len(self.elements) + 1  # of an atom: its element and its charge
        per_row = self.block * self.facts + self.places.shape[1]
        self.shape = (self.side, self.side, self.block**2 * len(ORDERS) + 2 * per_row)

    def describe(self):
        """See the module."""
        pairs = [f"{i}, {j}" for i in range(self.block) for j in range(self.block)]
        channels = [f"pair {pair}: {order}" for pair in pairs for order in ORDERS]
        for end in ("row", "column"):
            channels += [f"{end} {i}: {fact}" for i in range(self.block) for fact in (*self.elements, "charge")]
        for end in ("row", "column"):
            channels += [f"place of the {end}, {k + 1}" for k in range(self.places.shape[1])]
        settings = {
            "atoms": self.atoms,
            "places": bool(self.places.size),
            "block": self.block,
            "elements": list(self.elements),
        }
        return {
            "kind": self.kind, "version": self.version, "settings": settings, "shape": list(self.shape),
            "axes": ["atom r", "atom c + 1", "channel"], "channels": channels,
            "units": "1 where it is so; charge c as 0.5 + c / 2",
        }  # fmt: skip

    def encode(self, thing):
        """Atoms and bonds to pairs."""
        elements, charges = thing["elements"], thing["charges"]
        count = len(elements)
        if not 1 <= count <= self.atoms:
            raise ValueError(f"{count} heavy atoms, of at most {self.atoms}")
        if odd := sorted(set(elements) - set(self.elements)):
            raise ValueError(f"an element that is not {', '.join(self.elements)}: {', '.join(odd)}")
        if any(abs(charge) > 1 for charge in charges):
            raise ValueError("a charge beyond one")
        bonds = np.zeros((self.atoms, self.atoms, len(ORDERS)), np.float32)
        for i, j, order in thing["bonds"]:
            if order not in (1, 2, 3) or i == j:
                raise ValueError(f"a bond of order {order} between atoms {i} and {j}")
            bonds[i, j, order - 1] = bonds[j, i, order - 1] = 1
        atoms = np.zeros((self.atoms, self.facts), np.float32)
        atoms[:, -1] = 0.5
        for i, (element, charge) in enumerate(zip(elements, charges)):
            atoms[i, self.elements.index(element)] = 1
            atoms[i, -1] = 0.5 + charge / 2
        side, block = self.side, self.block
        pairs = bonds[:-1, 1:].reshape(side, block, side, block, len(ORDERS)).transpose(0, 2, 1, 3, 4)
        rows, columns = (part.reshape(side, -1) for part in (atoms[:-1], atoms[1:]))
        whole = (side, side)
        parts = [pairs.reshape(*whole, -1)]
        for of_rows, of_columns in ((rows, columns), (self.places, self.places)):
            parts.append(np.broadcast_to(of_rows[:, None], (*whole, of_rows.shape[1])))
            parts.append(np.broadcast_to(of_columns[None], (*whole, of_columns.shape[1])))
        return np.concatenate(parts, -1)

    def decode(self, array):
        """Pairs to atoms and bonds: what is nearer to there than to not there. Nothing is corrected."""
        array, n, side, block = np.asarray(array, np.float64).reshape(self.shape), self.atoms, self.side, self.block
        ends = np.cumsum([block**2 * len(ORDERS), block * self.facts, block * self.facts])
        pairs, rows, columns = (array[..., a:b] for a, b in zip((0, *ends), ends))
        atoms = np.zeros((n, self.facts))
        atoms[:-1] += rows.sum(1).reshape(n - 1, -1)
        atoms[1:] += columns.sum(0).reshape(n - 1, -1)
        seen = np.full((n, 1), 2 * side)  # the first atom and the last are in rows or in columns alone
        seen[[0, -1]] = side
        atoms /= seen
        bonds, times = np.zeros((n, n, len(ORDERS))), np.zeros((n, n, 1))
        bonds[:-1, 1:] += pairs.reshape(side, side, block, block, -1).transpose(0, 2, 1, 3, 4).reshape(n - 1, n - 1, -1)
        times[:-1, 1:] += 1
        bonds, times = bonds + bonds.transpose(1, 0, 2), times + times.transpose(1, 0, 2)
        bonds /= np.maximum(times, 1)
        there = [i for i in range(n) if atoms[i, :-1].max() > 0.5]
        number = {i: k for k, i in enumerate(there)}
        found = []
        for i in there:
            for j in there:
                if i < j and bonds[i, j].max() > 0.5:
                    found.append((number[i], number[j], int(bonds[i, j].argmax()) + 1))
        return {
            "elements": [self.elements[int(atoms[i, :-1].argmax())] for i in there],
            "charges": [int(np.clip(np.round((atoms[i, -1] - 0.5) * 2), -1, 1)) for i in there],
            "bonds": found,
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
        chem, counts = _rdkit(), [thing["elements"].count(element) for element in self.elements]
        rings = molecule.GetRingInfo().NumRings()
        words = [f"{_number(sum(counts))} atom{'s' if sum(counts) > 1 else ''}"]
        words += [
            f"{_number(n)} {name}" for n, name in zip(counts[1:], (NAMES[element] for element in self.elements[1:])) if n
        ]
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
        counted = re.compile("|".join(["atom", *NAMES.values()]))
        formula = {word for word in wanted if counted.search(word)}
        return {
            "valid": valid,
            "valid, one piece": whole,
            "formula": bool(own) and {word for word in own if counted.search(word)} == formula,
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


def _places(count: int) -> np.ndarray:
    """`(count, k)` of 0 and 1: rows of the Hadamard matrix of the next power of two, without its constant column."""
    size = 1 << max(count - 1, 1).bit_length()
    return np.array([[bin(row & column).count("1") % 2 for column in range(1, size)] for row in range(count)], np.float32)


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _rdkit():
    try:
        from rdkit import Chem, rdBase
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("molecules need RDKit: pip install rdkit") from error
    rdBase.DisableLog("rdApp.*")
    return Chem
