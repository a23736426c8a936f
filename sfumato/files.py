"""Files that are whole or not there: synced, put into place in one step, read line by line. Standard library only."""

import ctypes
import os
import shutil
import sys
from pathlib import Path


def sync_entry(path: Path) -> None:
    """Force a file, or the list of what a folder holds, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Force a file, or a folder and all in it, to the disk, so that renaming it into place never shows it unwritten."""
    for part in [*path.rglob("*"), path]:
        sync_entry(part)


def replace_folder(new: Path, folder: Path) -> None:
    """Sync a folder that is written in full to the disk and put it into place: a crash leaves the old one or the new one."""
    old = folder.with_name(f".{folder.name}.old")
    for path in new.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600
    sync(new)
    if folder.exists() and not _exchange(new, folder):
        folder.rename(old)
    if not folder.exists():
        new.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    sync_entry(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that there is never none; False where the system cannot (other than Linux)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


class Unbroken:
    """A text stream that goes silent when nobody reads it any more, as `| head` does, rather than end the run."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        """As of the stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._silence()

    def _silence(self) -> None:
        self._stream = open(os.devnull, "w")  # noqa: SIM115  (open for as long as the process is)


def go_on_without_readers() -> None:
    """Let this process outlive those who read what it prints."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Unbroken):
            setattr(sys, name, Unbroken(getattr(sys, name)))


def printable(text: object) -> str:
    """A text for the terminal: what a stranger's name may hold to move the cursor or change colours is spelt out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))


class CannotSave(Exception):
    """A checkpoint could not be written; those before it are untouched."""


def read_lines(path: Path) -> list[str]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    return path.read_text().split("\n")[:-1] if path.is_file() else []
