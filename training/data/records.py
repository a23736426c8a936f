"""A record: one image with its captions, not yet read; and which files and members are images, captions or neither.

What a source finds is used, or skipped for a fault, or left out on purpose; all three are counted and named.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from sfumato.registries import IMAGE_ENDINGS

HELD_OUT_SHARE = 0.02  # of a data set that has no splits of its own; chosen by the records' names
MAX_FILE_BYTES = 256_000_000
MAX_GROWTH = 200  # a compressed archive may unpack to this many times its own size; images hardly compress
ALWAYS_ALLOWED = 1_000_000_000  # bytes that any archive may unpack to, whatever its size
MAX_CAPTION_CHARACTERS = 10_000
# Image formats that are not read here: such files are counted and named rather than silently ignored.
UNREAD_ENDINGS = (
    *(".svg", ".jxl", ".psd", ".xcf", ".eps", ".pdf", ".ai", ".tga", ".ico", ".exr", ".hdr", ".wmf", ".emf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef", ".srw", ".raw"),
)
# Files that describe a data set or belong to the file system; nobody would expect an image in them.
OTHER_ENDINGS = (
    *(".txt", ".cls", ".caption", ".csv", ".tsv", ".json", ".jsonl", ".md", ".rst", ".yaml", ".yml", ".toml", ".xml"),
    *(".html", ".py", ".ipynb", ".log", ".ini", ".db", ".lock", ".parquet", ".arrow", ".sha256", ".md5", ".license"),
)
OTHER_NAMES = ("license", "licence", "readme", "thumbs.db", "desktop.ini", "checksums")
NAME_THEM = "Name them with data.image_column and data.caption_column"


class Unusable(ValueError):
    """A record that cannot be used; it is skipped, counted and named.

    Args:
        reason: the reason in a few words, such as `damaged image`.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Record:
    """One image with its captions, not yet read."""

    name: str
    image: Path | bytes | Callable[[], Any] | None = None  # a file, its content, or a function that makes the image or object
    captions: list[str] = field(default_factory=list)
    split: str | None = None  # None: decided by a hash of the name
    fault: str | None = None  # why the record cannot be used
    left_out: str | None = None  # why it is not part of the set, such as another split; reported, but not as a fault


def captions_of(value) -> tuple[list[str], str | None]:
    """The usable captions in a cell (a text, a list of texts, or nothing), and what is wrong if there is none."""
    values = [text for text in (value if isinstance(value, (list, tuple)) else [value]) if text is not None]
    if any(isinstance(text, dict) or text != text for text in values):
        return [], "caption is not text"
    values = [text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text for text in values]
    texts = [str(text).replace("\ufeff", "").strip() for text in values]  # Windows starts text files with this mark
    texts = [text for text in texts if text]
    sound = [text for text in texts if text.encode("utf-8", "ignore").decode() == text]
    short = [text for text in sound if len(text) <= MAX_CAPTION_CHARACTERS]
    if short:
        return short, None
    if sound:
        return [], f"caption longer than {MAX_CAPTION_CHARACTERS:,} characters"
    return [], "caption is not UTF-8" if texts else "no caption"


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends only on the text; used to choose the held-out records."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()[:4], "big") / 2**32


def is_hidden(name: PurePath) -> bool:
    """Whether a relative path is hidden, or is metadata that a file system keeps beside the files (`._x`, `__MACOSX`)."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.parts)


def kind_of(name: str) -> str:
    """`image`, `unread` (an image in a format that is not read here), `other` or `unknown`, judged by the name alone."""
    lower = PurePath(name).name.lower()
    if lower.endswith(IMAGE_ENDINGS):
        return "image"
    if lower.endswith(UNREAD_ENDINGS):
        return "unread"
    return "other" if lower.endswith(OTHER_ENDINGS) or lower in OTHER_NAMES else "unknown"


def fault_of_kind(name: str) -> str | None:
    """Why an image with this name cannot be read, or None if it can."""
    ending = PurePath(name).suffix.lower()
    return f"{ending} files are not read; convert to PNG or JPEG" if kind_of(name) == "unread" else None


SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_of(name: str) -> str | None:
    """The split that a path names, such as `test` in `data/test-00000-of-00001.parquet`; if it names several, the last one."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)


def splits_to_leave_out(names: Iterable[str], wanted: str) -> dict[str, str]:
    """Name -> split for the names that belong to a split other than `wanted`; empty if all belong to the same split.

    If some names contain a split, those that contain none count as `train`.

    Raises:
        ValueError: no name belongs to the wanted split.
    """
    splits = {name: split_of(name) for name in names}
    present = {split or "train" for split in splits.values()}
    if len(present) < 2:
        return {}
    wanted = SPLIT_WORDS.get(wanted, wanted)
    if wanted not in present:
        raise ValueError(f"there is no split {wanted!r}, only {' and '.join(sorted(present))}; choose one with data.split")
    return {name: split or "train" for name, split in splits.items() if (split or "train") != wanted}
