"""Arrays and what they stand for: clips, volumes, molecules, any measurements.

A model draws arrays `(H, W, C)` in [0, 1], as `output_type="np"` has them. A codec turns objects into such arrays and back:

    encode(thing)          the array of an object; raises ValueError where it has none
    decode(array)          the object
    judge(thing, caption)  name -> whether the object is what the caption asks for
    picture(thing)         `(h, w, 3)` uint8, to look at
    write(thing, path)     a file, in the format that `endings` and the path's ending say
    describe()             the facts that travel: kind, version, settings, shape and what the numbers mean

Each codec is one file that needs numpy alone to decode, so that it travels as `codec.py` inside a shared folder, beside
`codec.json` with its facts. sfumato never runs a folder's `codec.py`: it reads the facts and uses its own.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sfumato.registries import CODECS

LOADER = '''

def open_codec(folder=None):
    """The codec that `codec.json` in `folder`, or beside this file, describes."""
    import json
    from pathlib import Path

    facts = json.loads((Path(folder or Path(__file__).parent) / "codec.json").read_text(encoding="utf-8"))
    return {name}(**facts["settings"])
'''


class Codec(Protocol):
    """What every codec has.

    Attributes:
        kind, version: its name in `registries.CODECS`, and a number that changes with the meaning of its arrays.
        shape: height, width and channels of its arrays.
        stored: `uint8` or `float16`, how finely a prepared set keeps them.
        endings: of the files that `write` makes; the first is the usual one.
        repeat: where each value of its arrays covers a square of pixels, how many a side; see `repeat_of`.
    """

    kind: str
    version: int
    shape: tuple[int, int, int]
    stored: str
    endings: tuple[str, ...]

    def encode(self, thing: Any) -> np.ndarray:
        """The array `(H, W, C)` in [0, 1] of an object."""
        ...

    def decode(self, array: np.ndarray) -> Any:
        """The object of an array."""
        ...

    def judge(self, thing: Any, caption: str) -> dict[str, bool]:
        """Whether an object is what its caption asks for, word by word and as a whole (`all`)."""
        ...

    def picture(self, thing: Any) -> np.ndarray:
        """What people look at, `(h, w, 3)` uint8."""
        ...

    def write(self, thing: Any, path: str) -> None:
        """Keep an object in a file."""
        ...

    def describe(self) -> dict[str, Any]:
        """The facts that travel, fit for JSON."""
        ...


def open_codec(facts: Any) -> Codec:
    """The codec that facts describe, which may be a stranger's.

    Raises:
        ValueError: no such kind, another version of it, or settings that it does not take.
    """
    try:
        codec = CODECS.load(facts["kind"])
        if facts.get("version", codec.version) != codec.version:
            raise ValueError(f"its arrays of {codec.kind} are of version {facts['version']}, and here it is {codec.version}")
        return codec(**facts["settings"])
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the codec of this model cannot be used: {type(error).__name__}: {error}") from error


def repeat_of(codec: Codec) -> int:
    """How many pixels a side each value of its arrays covers; 1 where it does not say."""
    return getattr(codec, "repeat", 1)


def object_endings() -> tuple[str, ...]:
    """The endings of all files that codecs write."""
    return tuple(dict.fromkeys(ending for name in CODECS for ending in CODECS.load(name).endings))


def set_codec(unet, facts: dict | None) -> None:
    """Put the facts into a UNet's config, where every save keeps them."""
    if facts is not None:
        unet.register_to_config(_sfumato={**(unet.config.get("_sfumato") or {}), "codec": facts})


def write_codec(facts: dict, folder: Path) -> None:
    """Put `codec.json` and `codec.py` into a folder that is shared."""
    codec = type(open_codec(facts))
    (folder / "codec.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    source = Path(inspect.getfile(codec)).read_text(encoding="utf-8")
    (folder / "codec.py").write_text(source + LOADER.format(name=codec.__name__), encoding="utf-8")


def to_pictures(codec: Codec | None, drawn: Sequence) -> list:
    """What a model draws, to look at: of a model with a codec the pictures of its arrays, else the images themselves."""
    return list(drawn) if codec is None else [Image.fromarray(codec.picture(codec.decode(array))) for array in drawn]
