"""A record: one image with its captions, not yet read."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_FILE_BYTES = 256_000_000
MAX_CAPTION_CHARACTERS = 10_000
NAME_THEM = "Name them with data.image_column and data.caption_column"


class Unusable(ValueError):
    """A record that cannot be used; it is skipped, counted and named.

    Args:
        reason: in a few words, such as `damaged image`.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Record:
    """One image with its captions, not yet read."""

    name: str
    image: Path | bytes | Callable[[], np.ndarray] | None = None
    captions: list[str] = field(default_factory=list)
    split: str | None = None  # None: decided by the name
    fault: str | None = None  # why it cannot be used


def captions_of(value) -> tuple[list[str], str | None]:
    """The usable captions in a cell (a text, a list of texts, or nothing), and what is wrong if there is none."""
    values = [text for text in (value if isinstance(value, (list, tuple)) else [value]) if text is not None]
    if any(isinstance(text, dict) or text != text for text in values):
        return [], "caption is no text"
    values = [text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text for text in values]
    texts = [str(text).replace("\ufeff", "").strip() for text in values]  # Windows begins text files with that mark
    texts = [text for text in texts if text]
    sound = [text for text in texts if text.encode("utf-8", "ignore").decode() == text]
    short = [text for text in sound if len(text) <= MAX_CAPTION_CHARACTERS]
    if short:
        return short, None
    if sound:
        return [], f"caption longer than {MAX_CAPTION_CHARACTERS:,} characters"
    return [], "caption is not UTF-8" if texts else "no caption"


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone; used to hold out records."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()[:4], "big") / 2**32
