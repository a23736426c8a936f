"""Requests to a run while it trains, as files in its folder: to stop, to save, to draw samples."""

from pathlib import Path

KINDS = ("stop", "save", "sample")


def ask(output_dir: Path, kind: str) -> None:
    """Send a request to the trainer that writes to a run folder; it responds at its next log line.

    Raises:
        ValueError: `kind` is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} cannot be asked of a run; {', '.join(KINDS)} can")
    folder = output_dir / "requests"
    folder.mkdir(exist_ok=True)
    (folder / kind).touch()


def take(output_dir: Path) -> set[str]:
    """What was asked for since the last call."""
    asked = {kind for kind in KINDS if (output_dir / "requests" / kind).exists()}
    for kind in asked:
        (output_dir / "requests" / kind).unlink(missing_ok=True)
    return asked
