"""Finds the source that `data.name` means in the table `registries.SOURCES`.

Every source is a generator of `Record`; a record that cannot be used says so in `fault` and is counted, not raised.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from sfumato.pipelines.codecs import Codec
from sfumato.registries import SOURCES, load_object
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record, is_hidden, kind_of, splits_to_leave_out
from sfumato.training.data.sources.folder import TABLES


def source_name(name: str) -> str:
    """The name in `SOURCES` of the source that `data.name` means.

    Raises:
        ValueError: it is neither a named source, nor files that a source reads, nor a Hub id.
    """
    return _find(name)[0]


def open_source(config: DataConfig) -> Iterator[Record]:
    """The records of `data.name`.

    Raises:
        ValueError: there is no such source, or it has no captions.
    """
    source, files = _find(config.name)
    found = SOURCES.load(source)
    if source == "folder" or not files:
        return found(config, files)
    root = Path(config.name).expanduser()
    left = splits_to_leave_out([str(file.relative_to(root)) for file in files], config.split) if root.is_dir() else {}
    chosen = [file for file in files if str(file.relative_to(root)) not in left]
    others = (Record(name, left_out=f"of the split {split}") for name, split in left.items())
    return chain(others, found(config, chosen))


def open_codec(config: DataConfig) -> Codec | None:
    """The codec for the records of `data.name`; None if they are images."""
    source, files = _find(config.name)
    codec = SOURCES[source].codec
    return load_object(codec)(config, files) if codec else None


def _find(name: str) -> tuple[str, list[Path]]:
    """The source, and the files in the given place that it claims."""
    named = name.partition(":")[0]
    if named in SOURCES and SOURCES[named].named:
        return named, []
    if "://" in name:
        raise ValueError(f"data.name={name!r} is an address; read it as a stream with data.stream=true")
    path = Path(name).expanduser()
    if path.exists():
        return _find_files(path)
    if name.count("/") == 1 and not name.startswith((".", "~", "/")) and not path.parent.exists():
        return "hub", []
    known = " nor ".join(key for key, entry in SOURCES.items() if entry.named)
    raise ValueError(f"data.name={name!r} is neither {known} nor a folder or a file that exists, nor a Hub id (owner/name)")


def _find_files(path: Path) -> tuple[str, list[Path]]:
    """The source that reads a folder or file, and its files; the top level of a folder decides, or else the levels below."""
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"data.name={str(path)!r} is neither a folder nor a plain file")
        claimed = _claims([path])
        if not claimed:
            endings = ", ".join(known_endings())
            raise ValueError(f"data.name={str(path)!r}: no source reads such a file; they read {endings}. {_advice([path])}")
        return next(iter(claimed.items()))
    files = sorted(file for file in path.rglob("*") if file.is_symlink() or file.is_file())
    shown = [file for file in files if not is_hidden(file.relative_to(path))]
    top = [file for file in shown if file.parent == path]
    claimed = _claims(top) or ({} if any(file.name in TABLES for file in top) else _claims(shown))
    archives = [source for source in claimed if source != "folder"]
    if archives and len(claimed) > 1:
        other = "images" if "folder" in claimed else claimed[archives[1]][0].name
        name = claimed[archives[0]][0].name
        raise ValueError(f"{path} holds both {other} and {name}; name that file in data.name, or move it elsewhere")
    if archives:
        return archives[0], claimed[archives[0]]
    if not claimed and not any(kind_of(file.name) == "unread" for file in shown):
        raise ValueError(f"{path} has no usable image to train on: {_advice(shown)}")
    return "folder", files


def _claims(files: list[Path]) -> dict[str, list[Path]]:
    """Source -> the files that it reads."""
    found = {}
    for source, entry in SOURCES.items():
        if claimed := [file for file in files if file.name.lower().endswith(entry.claims)]:
            found[source] = claimed
    return found


# What is often found instead of images, and what to do about it.
ADVICE = {
    ".arrow": "datasets' save_to_disk wrote it; write it as parquet: load_from_disk(folder).to_parquet('set.parquet')",
    ".zip": "unpack the .zip",
    ".rar": "unpack the .rar",
    ".7z": "unpack the .7z",
    ".zst": "unpack the .zst",
    ".csv": "a table must be named metadata.csv and be in the same folder as the images",
}


def _advice(files: list[Path]) -> str:
    """Which files there are, by their endings, and what to do with them."""
    if not files:
        return "it is empty"
    counts = Counter(file.suffix.lower() or "without an ending" for file in files)
    held = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(8))
    todo = [advice for ending, advice in ADVICE.items() if ending in counts]
    return "; ".join([f"it holds {held}", *todo])


def known_endings() -> list[str]:
    """The file endings that sources read."""
    return [ending for entry in SOURCES.values() for ending in entry.claims]
