"""Files that are either complete or absent: synced, moved into place in one step, read line by line. Standard library only."""

import ctypes
import os
import shutil
import sys
from pathlib import Path


def sync_entry(path: Path) -> None:
    """Force a file, or the list of a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Force a file, or a folder and everything in it, to disk, so that renaming it into place never exposes unwritten data."""
    for part in [*path.rglob("*"), path]:
        sync_entry(part)


def replace_folder(new: Path, folder: Path) -> None:
    """Sync a fully written folder to disk and move it into place; a crash leaves either the old one or the new one."""
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
    """Swap two folders in one step, so that one is always in place; False where the system cannot (other than Linux)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


class Unbroken:
    """A text stream that goes silent when its reader is gone, as with `| head`, instead of ending the run."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Like the stream's own."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        """Like the stream's own."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._silence()

    def _silence(self) -> None:
        self._stream = open(os.devnull, "w")  # noqa: SIM115  (stays open as long as the process)


def go_on_without_readers() -> None:
    """Let this process outlive the readers of its output."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Unbroken):
            setattr(sys, name, Unbroken(getattr(sys, name)))


def refresh_bars_slowly_in_files() -> None:
    """Where standard error is not a terminal, such as in a Slurm log, let progress bars write every five seconds instead of
    ten times a second. Call it before tqdm is imported; `TQDM_MININTERVAL`, in seconds, overrides it.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "5")


def printable(text: object) -> str:
    """Make a text safe for the terminal: characters that could move the cursor or change colours are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))


class CannotSave(Exception):
    """A checkpoint could not be written; the earlier ones are untouched."""


def read_lines(path: Path) -> list[str]:
    """The complete lines of a JSON-lines file; none if there is no file."""
    return path.read_text().split("\n")[:-1] if path.is_file() else []
