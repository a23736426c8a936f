"""Compositions of materials on the map of the periodic table: how many atoms of each element a formula unit has, as bits.

Needs only numpy. Judging needs smact (extra `materials`).
"""

import re
from importlib import import_module

import numpy as np

# Periods of the long form, 32 columns; `.` is a cell without an element.
TABLE = [
    "H" + " ." * 30 + " He",
    "Li Be" + " ." * 24 + " B C N O F Ne",
    "Na Mg" + " ." * 24 + " Al Si P S Cl Ar",
    "K Ca" + " ." * 14 + " Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr",
    "Rb Sr" + " ." * 14 + " Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe",
    "Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn",
    "Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og",
]
PLACES = {s: (r, c) for r, row in enumerate(TABLE) for c, s in enumerate(row.split()) if s != "."}
ELEMENTS = {place: symbol for symbol, place in PLACES.items()}
# A compound is named after the first of its elements in this order.
ANIONS = {
    "F": "fluoride", "O": "oxide", "Cl": "chloride", "N": "nitride", "Br": "bromide", "I": "iodide", "S": "sulfide",
    "Se": "selenide", "Te": "telluride", "P": "phosphide", "As": "arsenide", "Sb": "antimonide", "C": "carbide",
}  # fmt: skip
SIZES = {1: "unary", 2: "binary", 3: "ternary", 4: "quaternary", 5: "quinary"}


def group_of(symbol: str) -> str | None:
    """The group of metals that an element belongs to, or None."""
    row, column = PLACES[symbol]
    if column == 0 and row > 0:
        return "alkali metal"
    if column == 1:
        return "alkaline earth"
    if row >= 5 and 2 <= column <= 15:
        return "lanthanide" if row == 5 else "actinide"
    return "transition metal" if 16 <= column <= 25 else None


def parse(formula: str) -> dict[str, int]:
    """Symbols and numbers of a formula without brackets.

    Raises:
        ValueError: it is not such a formula.
    """
    found: dict[str, int] = {}
    if not formula or re.sub(r"[A-Z][a-z]?\d*", "", formula):
        raise ValueError(f"no formula: {formula!r}")
    for symbol, number in re.findall(r"([A-Z][a-z]?)(\d*)", formula):
        if symbol not in PLACES:
            raise ValueError(f"no element {symbol}")
        found[symbol] = found.get(symbol, 0) + int(number or 1)
    return found


class CompositionCodec:
    """A composition is a dict: symbol -> number of atoms."""

    kind, version, stored = "compositions", 1, "uint8"
    endings = (".txt", ".png")
    shape = (8, 32, 5)

    def describe(self):
        """See `pipelines.codecs`."""
        return {
            "kind": self.kind, "version": self.version, "settings": {}, "shape": list(self.shape),
            "axes": ["period - 1", "column of the long form", "bit, highest first"], "units": "1 where a bit is set",
        }  # fmt: skip

    def encode(self, thing):
        """Numbers of atoms to bits in the elements' cells.

        Raises:
            ValueError: no atoms, an unknown element, or a number outside 1 to 31.
        """
        if not thing:
            raise ValueError("no atoms")
        array = np.zeros(self.shape, np.float32)
        for symbol, number in thing.items():
            if symbol not in PLACES:
                raise ValueError(f"no element {symbol}")
            if not 1 <= number < 32:
                raise ValueError(f"{number} atoms of {symbol}, of at most 31")
            array[PLACES[symbol]] = [number >> bit & 1 for bit in (4, 3, 2, 1, 0)]
        return array

    def decode(self, array):
        """Bits to numbers; nothing is corrected."""
        bits = np.asarray(array, np.float32).reshape(self.shape) > 0.5
        numbers = bits @ (1 << np.arange(4, -1, -1))
        return {symbol: int(numbers[place]) for symbol, place in PLACES.items() if numbers[place]}

    def formula(self, thing):
        """A formula such as `BaTiO3`: metals from left to right, then the rest."""
        order = sorted(thing, key=lambda symbol: (symbol in ANIONS, PLACES[symbol][1], PLACES[symbol][0]))
        return "".join(f"{symbol}{thing[symbol] if thing[symbol] > 1 else ''}" for symbol in order)

    def caption(self, thing):
        """A caption such as `ternary oxide, alkaline earth, transition metal`."""
        kind = next((name for symbol, name in ANIONS.items() if symbol in thing), "intermetallic")
        groups = dict.fromkeys(filter(None, map(group_of, sorted(thing, key=lambda s: PLACES[s][1]))))
        return ", ".join([f"{SIZES.get(len(thing), 'larger')} {kind}", *groups])

    def judge(self, thing, caption):
        """`all`: its own caption equals this one; `valid`: smact finds neutral charges that agree with electronegativities."""
        try:
            smact_validity = import_module("smact.screening").smact_validity
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("judging compositions needs smact: pip install 'sfumato[materials]'") from error
        valid = bool(thing) and len(thing) < 8 and bool(smact_validity(self.formula(thing)))
        return {"valid": valid, "all": bool(thing) and self.caption(thing) == caption}

    def picture(self, thing):
        """The periodic table with elements in grey; those of the composition are darker the more atoms they have."""
        image = np.full((8, 32), 255, np.uint8)
        for symbol, place in PLACES.items():
            image[place] = 225 if symbol not in thing else 150 - 4 * min(thing[symbol], 31)
        return np.repeat(np.kron(image, np.ones((4, 4), np.uint8))[..., None], 3, -1)

    def write(self, thing, path):
        """`.txt`, its formula; `.png`, its picture."""
        if str(path).endswith(".png"):
            from PIL import Image

            return Image.fromarray(self.picture(thing)).save(path)
        with open(path, "w", encoding="utf-8") as file:
            return file.write(self.formula(thing) + "\n")
