"""Molecules as a square of atoms; each atom says what it is and how it is bonded to the atoms before it.

Atoms are in the order of canonical SMILES, row by row. An atom's values are its element, its charge, and for each atom before
it, nearest first, whether a single, double or triple bond joins them. Hydrogens follow from the remaining valences. An array
repeats each atom over 8 x 8 pixels, since stock pipelines draw sides that are multiples of 8; with `vae.repeat: 8`, a model
works on one value per square.

Decoding needs only numpy and gives atoms and bonds. SMILES, SDF and pictures need RDKit (extra `molecules`).
"""

import re

import numpy as np

ELEMENTS = ("C", "N", "O", "F")
NAMES = {"N": "nitrogen", "O": "oxygen", "F": "fluorine", "S": "sulfur", "Cl": "chlorine", "Br": "bromine"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDERS = ("single", "double", "triple")
# SMARTS patterns of the groups that captions name.
GROUPS = {
    "alcohol": "[OX2H][CX4]",
    "amine": "[NX3;!$(NC=[O,N]);!$(N[#6]#*);!$(N=*)][CX4]",
    "nitrile": "[CX2]#[NX1]",
    "carbonyl": "[CX3]=[OX1]",
    "ether": "[OX2;!H]([CX4])[CX4]",
}


class MoleculeCodec:
    """A molecule is a dict: `elements`, a list of symbols; `charges`, a list; `bonds`, a list of (i, j, order).

    Args:
        atoms: maximum number of atoms.
        elements: symbols of the elements, carbon first.
    """

    kind = "molecules"
    version = 3
    stored = "uint8"
    endings = (".sdf", ".smi", ".png")
    repeat = 8

    def __init__(self, atoms: int = 9, elements=ELEMENTS):
        self.atoms, self.elements = int(atoms), tuple(elements)
        if not 2 <= self.atoms <= 1024:
            raise ValueError(f"{atoms} atoms; the codec can hold 2 to 1024")
        if not self.elements:
            raise ValueError("`elements` is empty; name at least one, carbon first")
        self.facts = len(self.elements) + 1  # per atom: its element and its charge
        self.side = int(np.ceil(self.atoms**0.5))  # atoms in a row
        self.num_values = self.facts + len(ORDERS) * (self.atoms - 1)  # per atom
        self.shape = (self.repeat * self.side, self.repeat * self.side, self.num_values)

    def describe(self):
        """See the module."""
        values = [*self.elements, "charge"]
        values += [f"{order} bond to the atom {k} places earlier" for k in range(1, self.atoms) for order in ORDERS]
        return {
            "kind": self.kind, "version": self.version, "settings": {"atoms": self.atoms, "elements": list(self.elements)},
            "shape": list(self.shape),
            "axes": [f"row of an atom, {self.repeat} times", f"its column, {self.repeat} times", "what it says"],
            "values": values, "units": "1 where it is so; charge c as 0.5 + c / 2",
        }  # fmt: skip

    def encode(self, thing):
        """Atoms and bonds to the values of each atom.

        Raises:
            ValueError: the molecule does not fit into this codec.
        """
        elements, charges, n = thing["elements"], thing["charges"], self.atoms
        if not 1 <= len(elements) <= n:
            raise ValueError(f"{len(elements)} heavy atoms, of at most {n}")
        if odd := sorted(set(elements) - set(self.elements)):
            raise ValueError(f"an element that is not {', '.join(self.elements)}: {', '.join(odd)}")
        if any(abs(charge) > 1 for charge in charges):
            raise ValueError("a charge beyond one")
        places = np.zeros((self.side**2, self.num_values), np.float32)
        places[:, self.facts - 1] = 0.5
        for i, (element, charge) in enumerate(zip(elements, charges)):
            places[i, self.elements.index(element)] = 1
            places[i, self.facts - 1] = 0.5 + charge / 2
        for i, j, order in thing["bonds"]:
            if order not in (1, 2, 3) or i == j:
                raise ValueError(f"a bond of order {order} between atoms {i} and {j}")
            places[max(i, j), self._number(abs(i - j), order)] = 1
        rows = places.reshape(self.side, self.side, self.num_values)
        return rows.repeat(self.repeat, axis=0).repeat(self.repeat, axis=1)

    def _number(self, distance: int, order: int) -> int:
        """The index of the value for a bond of `order` to the atom `distance` places before."""
        return self.facts + len(ORDERS) * (distance - 1) + order - 1

    def decode(self, array):
        """Values of each atom to atoms and bonds, thresholded at 0.5. Nothing is corrected.

        Raises:
            ValueError: an array of another shape.
        """
        if np.shape(array) != self.shape:
            raise ValueError(f"an array of shape {np.shape(array)}; molecules of {self.atoms} atoms have {self.shape}")
        places = np.asarray(array, np.float64)[:: self.repeat, :: self.repeat].reshape(-1, self.num_values)[: self.atoms]
        atoms, bonds = places[:, : self.facts], places[:, self.facts :].reshape(self.atoms, -1, len(ORDERS))
        there = [i for i in range(self.atoms) if atoms[i, :-1].max() > 0.5]
        number = {i: k for k, i in enumerate(there)}
        found = []
        for i in there:
            for j in there:
                if j < i and bonds[i, i - j - 1].max() > 0.5:
                    found.append((number[j], number[i], int(bonds[i, i - j - 1].argmax()) + 1))
        return {
            "elements": [self.elements[int(atoms[i, :-1].argmax())] for i in there],
            "charges": [int(np.clip(np.round((atoms[i, -1] - 0.5) * 2), -1, 1)) for i in there],
            "bonds": found,
        }

    def to_rdkit(self, thing):
        """The molecule as a sanitised RDKit molecule; None if RDKit rejects it."""
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
        """Read a molecule from SMILES, without hydrogens, with atoms in canonical order.

        Raises:
            ValueError: it is not a valid molecule, or it does not fit into this codec.
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
        """Canonical SMILES, with `.` between separate pieces; None if the molecule is invalid."""
        molecule = self.to_rdkit(thing)
        return None if molecule is None else _rdkit().MolToSmiles(molecule)

    def caption(self, thing):
        """What RDKit finds in a molecule, such as `nine atoms, two nitrogen, one oxygen, one ring, aromatic, amine`."""
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
        """Whether it is a valid molecule in one piece, uncorrected, and whether its own caption equals this one."""
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
        """Its structure as drawn by RDKit; white if the molecule is invalid."""
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
            raise ValueError("what was drawn is not a valid molecule by RDKit's rules; draw again with another seed")
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
