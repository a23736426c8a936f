"""Arrays and what they stand for: clips, volumes, molecules, any measurements.

A model draws arrays `(H, W, C)` in [0, 1], as with `output_type="np"`. A codec turns objects into such arrays and back:

    encode(thing)          the array of an object; raises ValueError if there is none
    decode(array)          the object
    judge(thing, caption)  name -> whether the object is what the caption asks for
    picture(thing)         an image of it for people to look at, `(h, w, 3)` uint8
    write(thing, path)     writes a file in the format of the path's ending, one of `endings`
    describe()             the facts that travel: kind, version, settings, shape and the meaning of the values

Each codec is one file that needs only numpy to decode, so that it can travel as `codec.py` inside a shared folder, beside
`codec.json` with its facts. sfumato never runs a folder's `codec.py`: it reads the facts and uses its own code.
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
    """The interface of every codec.

    Attributes:
        kind, version: its name in `registries.CODECS`, and a number that changes with the meaning of its arrays.
        shape: height, width and channels of its arrays.
        stored: `uint8` or `float16`, the precision in which a prepared set keeps them.
        endings: file name endings that `write` supports; the first is the default.
        repeat: if each value of its arrays covers a square of pixels, the side of that square; see `repeat_of`.
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
        """An image of it for people to look at, `(h, w, 3)` uint8."""
        ...

    def write(self, thing: Any, path: str) -> None:
        """Write an object to a file."""
        ...

    def describe(self) -> dict[str, Any]:
        """The facts that travel, serialisable as JSON."""
        ...


def open_codec(facts: Any) -> Codec:
    """The codec described by facts, which may come from a stranger.

    Raises:
        ValueError: no such kind, another version of it, or settings that it does not accept.
    """
    try:
        codec = CODECS.load(facts["kind"])
        if facts.get("version", codec.version) != codec.version:
            raise ValueError(f"its {codec.kind} arrays are version {facts['version']}; this sfumato has {codec.version}")
        return codec(**facts["settings"])
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the codec of this model cannot be used: {type(error).__name__}: {error}") from error


def repeat_of(codec: Codec) -> int:
    """Side in pixels of the square that each value of its arrays covers; 1 if it does not say."""
    return getattr(codec, "repeat", 1)


def object_endings() -> tuple[str, ...]:
    """The file name endings that codecs write."""
    return tuple(dict.fromkeys(ending for name in CODECS for ending in CODECS.load(name).endings))


def set_codec(unet, facts: dict | None) -> None:
    """Put the facts into a UNet's config, so that every save keeps them."""
    if facts is not None:
        unet.register_to_config(_sfumato={**(unet.config.get("_sfumato") or {}), "codec": facts})


def write_codec(facts: dict, folder: Path) -> None:
    """Write `codec.json` and `codec.py` into a folder to be shared."""
    codec = type(open_codec(facts))
    (folder / "codec.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    source = Path(inspect.getfile(codec)).read_text(encoding="utf-8")
    (folder / "codec.py").write_text(source + LOADER.format(name=codec.__name__), encoding="utf-8")


def to_pictures(codec: Codec | None, drawn: Sequence) -> list:
    """What a model drew, as images to look at: with a codec the pictures of the arrays, otherwise the images themselves."""
    return list(drawn) if codec is None else [Image.fromarray(codec.picture(codec.decode(array))) for array in drawn]
