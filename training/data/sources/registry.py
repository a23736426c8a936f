"""Which source `data.name` means, by the table `registries.SOURCES`.

Every source is a generator of `Record`; one that cannot be used says so in `fault` and is counted, never raised.
"""

from collections.abc import Iterator
from pathlib import Path

from sfumato.registries import SOURCES
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record


def source_name(name: str) -> str:
    """The name in `SOURCES` of the source that `data.name` means.

    Raises:
        ValueError: it is neither a named source nor files that a source reads nor a Hub id.
    """
    return _find(name)[0]


def open_source(config: DataConfig) -> Iterator[Record]:
    """The records of `data.name`.

    Raises:
        ValueError: no such source, or one without captions.
    """
    source, files = _find(config.name)
    return SOURCES.load(source)(config, files)


def _find(name: str) -> tuple[str, list[Path]]:
    """The source, and the files in the named place that it claims."""
    named = name.partition(":")[0]
    if named in SOURCES and SOURCES[named].named:
        return named, []
    path = Path(name).expanduser()
    if path.exists():
        return _find_files(path)
    if name.count("/") == 1 and not name.startswith((".", "~", "/")) and not path.parent.exists():
        return "hub", []
    known = " nor ".join(key for key, entry in SOURCES.items() if entry.named)
    raise ValueError(f"data.name={name!r} is neither {known} nor a folder or a file that exists, nor a Hub id (owner/name)")


def _find_files(path: Path) -> tuple[str, list[Path]]:
    inside = sorted(path.glob("*")) if path.is_dir() else [path]
    claimed: dict[str, list[Path]] = {}
    for source, entry in SOURCES.items():
        if files := [file for file in inside if file.name.lower().endswith(entry.claims)]:
            claimed[source] = files
    archives = [source for source in claimed if source != "folder"]
    if archives and len(claimed) > 1:
        other = "images" if "folder" in claimed else claimed[archives[1]][0].name
        name = claimed[archives[0]][0].name
        raise ValueError(f"{path} holds both {other} and {name}; name that file, or put it elsewhere")
    if archives:
        return archives[0], claimed[archives[0]]
    if path.is_dir():
        return "folder", claimed.get("folder", [])
    raise ValueError(f"data.name={str(path)!r}: no source reads such a file; there are {', '.join(known_endings())}")


def known_endings() -> list[str]:
    """The endings of files that sources read."""
    return [ending for entry in SOURCES.values() for ending in entry.claims]
