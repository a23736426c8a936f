"""Short texts as analog bits (arXiv 2208.04202): one column per character, its eight bits from top to bottom.

Needs only numpy. Characters are those of Latin-1.
"""

import re

import numpy as np


class TextCodec:
    """A text is a str of at most `length` Latin-1 characters; the rest of the array is zeros."""

    kind, version, stored = "texts", 1, "uint8"
    endings = (".txt",)

    def __init__(self, length: int = 16):
        self.length = int(length)
        if not 1 <= self.length <= 4096:
            raise ValueError(f"length={length}; texts may have 1 to 4096 characters")
        self.shape = (8, self.length, 1)

    def describe(self):
        """See `pipelines.codecs`."""
        return {
            "kind": self.kind, "version": self.version, "settings": {"length": self.length}, "shape": list(self.shape),
            "axes": ["bit, highest first", "character", "channel"], "units": "1 where a bit is set; Latin-1",
        }  # fmt: skip

    def encode(self, thing):
        """Characters to bits.

        Raises:
            ValueError: not a text, an empty or too long one, or characters outside Latin-1.
        """
        if not isinstance(thing, str) or not thing or "\0" in thing:
            raise ValueError("no text")
        if len(thing) > self.length:
            raise ValueError(f"{len(thing)} characters, of at most {self.length}")
        try:
            codes = thing.encode("latin-1")
        except UnicodeEncodeError as error:
            raise ValueError(f"a character that is not in Latin-1: {thing[error.start]!r}") from error
        whole = np.frombuffer(codes.ljust(self.length, b"\0"), np.uint8)
        return np.unpackbits(whole[None], axis=0).reshape(self.shape).astype(np.float32)

    def decode(self, array):
        """Bits to characters, up to the first empty column."""
        bits = np.asarray(array, np.float32).reshape(8, self.length) > 0.5
        return np.packbits(bits, axis=0).tobytes().split(b"\0")[0].decode("latin-1")

    def judge(self, thing, caption):
        """Always empty: what a caption of an arbitrary text asks for is unknown."""
        return {}

    def picture(self, thing):
        """The text, black on white."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (128, 24), "white")
        shown = "".join(character if character.isprintable() else "?" for character in thing)
        ImageDraw.Draw(image).text((4, 6), shown, fill="black")
        return np.asarray(image)

    def write(self, thing, path):
        """`.txt`, UTF-8."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(thing + "\n")


COUNTRIES = {
    "an Italian": "it_IT", "a German": "de_DE", "a French": "fr_FR", "a Spanish": "es_ES", "a Finnish": "fi_FI",
    "a Dutch": "nl_NL", "a Swedish": "sv_SE", "a Portuguese": "pt_PT", "an English": "en_GB", "an Estonian": "et_EE",
}  # fmt: skip
KINDS = {"woman's name": "first_names_female", "man's name": "first_names_male", "surname": "last_names"}


def known_names(country: str, kind: str) -> tuple[str, ...]:
    """The names of a kind that Faker knows and `TextCodec` can hold; see `COUNTRIES` and `KINDS`."""
    try:
        from importlib import import_module

        provider = import_module(f"faker.providers.person.{COUNTRIES[country]}").Provider
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("names need faker: pip install 'sfumato[texts]'") from error
    names = dict.fromkeys(str(name).strip() for name in getattr(provider, KINDS[kind], ()))
    return tuple(name for name in names if re.fullmatch(r"[A-Za-z\xc0-\xff' -]{2,16}", name))


class NameCodec(TextCodec):
    """A name, as asked for by `an Italian woman's name` or `a Finnish surname`."""

    kind = "names"

    def judge(self, thing, caption):
        """`exact`: a name of that country and kind; `near`: one letter from one; `all`: exact."""
        country = next((each for each in COUNTRIES if caption.startswith(each + " ")), None)
        if country is None or caption[len(country) + 1 :] not in KINDS:
            raise ValueError(f"not a caption of this kind: {caption}")
        names = known_names(country, caption[len(country) + 1 :])
        exact = thing in names
        return {"exact": exact, "near": exact or any(_one_apart(thing, name) for name in names), "all": exact}


def _one_apart(a: str, b: str) -> bool:
    """Whether the texts differ by at most one changed, added or removed letter."""
    if abs(len(a) - len(b)) > 1 or a == b:
        return a == b
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return longer[same + 1 :] == (shorter[same + 1 :] if len(a) == len(b) else shorter[same:])
