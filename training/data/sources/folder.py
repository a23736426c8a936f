"""Folders: metadata.csv or .jsonl, caption .txt files, or class sub-folders."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np

from sfumato.registries import IMAGE_ENDINGS
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import (
    MAX_CAPTION_CHARACTERS,
    MAX_FILE_BYTES,
    NAME_THEM,
    OTHER_NAMES,
    SPLIT_WORDS,
    Record,
    captions_of,
    fault_of_kind,
    is_hidden,
    kind_of,
    splits_to_leave_out,
)

TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
MAX_LINE = 10_000_000
OPEN_QUOTE = 'Perhaps a quotation mark is not closed; inside quotes it must be doubled ("""Hello"", she said")'
ROWS_FOR_COLUMNS = 100


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """Records from metadata.csv, .tsv or .jsonl, caption .txt files, or class sub-folders. `files` is the whole folder.

    Raises:
        ValueError: images without captions, several sets of images, or a table that cannot be read.
    """
    given = Path(config.name).expanduser()
    folder = given.resolve()
    names = [str(file.relative_to(given)) for file in files if not is_hidden(file.relative_to(given))]
    images = [name for name in names if kind_of(name) in ("image", "unread")]
    unknown = [name for name in names if kind_of(name) == "unknown"]
    if any((folder / table).is_file() for table in TABLES):
        return described(folder, images + unknown, config)
    captions = {name: str(Path(name).with_suffix(".txt")) for name in images}
    texts = {name for name in names if name.lower().endswith(".txt")}
    if not texts.isdisjoint(captions.values()):
        return _captioned(folder, captions, texts, unknown, config)
    if any("/" not in name for name in images):
        raise ValueError(
            f"{folder} has images but no captions; add metadata.csv or metadata.jsonl (file_name, text), a .txt beside "
            "each image, or sort the images into sub-folders named after their class"
        )
    classes = {Path(name).parts[0] for name in images}
    with_table = {name for name in classes if list((folder / name).glob("metadata.*"))}
    if inner := sorted(with_table or (classes if classes <= {"train", "test", "val", "validation"} else ())):
        raise ValueError(f"{folder} holds separate image sets: {', '.join(inner)}; name one, such as {folder / inner[0]}")
    return _classes(folder, images, unknown, config)


def _captioned(
    folder: Path, captions: dict[str, str], texts: set[str], unknown: list[str], config: DataConfig
) -> Iterator[Record]:
    """Records of images that have a `.txt` file beside them."""
    elsewhere = _other_splits(captions, config)
    for name, text in captions.items():
        if name in elsewhere:
            yield Record(name, left_out=f"of the split {elsewhere[name]}")
        else:
            yield _record(folder, name, _text_file(folder, folder / text), config)
    for name in sorted(texts - set(captions.values())):
        if Path(name).stem.lower() not in OTHER_NAMES:
            yield Record(name, left_out="text without an image")
    yield from _left_out(unknown, "not an image by its name")


def _classes(folder: Path, images: list[str], unknown: list[str], config: DataConfig) -> Iterator[Record]:
    """Records of images in sub-folders, one per class, whose name is the caption."""
    for name in images:
        yield _record(folder, name, Path(name).parts[0].replace("_", " "), config)
    yield from _left_out(unknown, "not an image by its name")


def described(folder: Path, others: list[str], config: DataConfig) -> Iterator[Record]:
    """Records from the table of a folder that has one; `others` are the names of the other files."""
    table = next(name for name in TABLES if (folder / name).is_file())
    if not (folder / table).resolve().is_relative_to(folder):
        raise ValueError(f"{folder / table} is a link out of the folder; put the file itself there")
    return _described(folder, folder / table, others, config)


def _described(folder: Path, path: Path, others: list[str], config: DataConfig) -> Iterator[Record]:
    """Records from a table with a row for each image."""
    image_column, caption_column = config.image_column or "file_name", config.caption_column or "text"
    rows = list(_checked_rows(path, (image_column, caption_column)))  # all: other splits and unnamed files must be known
    named = [row.get(image_column) if isinstance(row, dict) else None for row in rows]
    texts = [name for name in named if isinstance(name, str)]
    elsewhere = _other_splits(texts, config)
    for number, (row, name) in enumerate(zip(rows, named), 1):
        if not isinstance(row, dict):
            yield Record(f"{path.name} line {number}", fault="damaged line")
        elif not isinstance(name, str) or not name:
            yield Record(f"{path.name} line {number}", fault="no file name")
        elif None in row:  # otherwise the caption would end at its first comma
            yield Record(name, fault="more cells than columns; put a caption that has commas in quotes")
        elif name in elsewhere:
            yield Record(name, left_out=f"of the split {elsewhere[name]}")
        else:
            yield _record(folder, name, row.get(caption_column), config)
    told = {str(Path(name)) for name in texts}
    yield from _left_out([name for name in others if name not in told], f"not in {path.name}")


def _left_out(names: Iterable[str], reason: str) -> Iterator[Record]:
    return (Record(name, left_out=reason) for name in names)


def _other_splits(names: Iterable[str], config: DataConfig) -> dict[str, str]:
    """Name -> split for the names that are in a top-level folder of another split."""
    tops = {name: Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names}
    if not any(top.lower() in SPLIT_WORDS for top in tops.values()):
        return {}
    left = splits_to_leave_out(set(tops.values()), config.split)
    return {name: left[top] for name, top in tops.items() if top in left}


def _checked_rows(path: Path, columns: tuple[str, str]) -> Iterator[dict | None]:
    """The rows of a table; each column must occur in the first hundred rows, since any single row may lack a key."""
    rows = _csv_rows(path, columns) if path.suffix in (".csv", ".tsv") else _json_rows(path)
    first, found = [], {}
    for row in rows:
        first.append(row)
        found |= dict.fromkeys(key for key in row if isinstance(key, str)) if isinstance(row, dict) else {}
        if len(first) == ROWS_FOR_COLUMNS or set(columns) <= found.keys():
            break
    if found and (missing := [key for key in columns if key not in found]):
        has = f"it has {', '.join(found)}. {NAME_THEM}"
        raise ValueError(f"{path} has no column {' and '.join(missing)}; {has}")
    yield from first
    yield from rows


def _json_rows(path: Path) -> Iterator[dict | None]:
    with _open_text(path) as lines:
        while line := lines.readline(MAX_LINE):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None


def _csv_rows(path: Path, columns: tuple[str, str]) -> Iterator[dict]:
    csv.field_size_limit(MAX_LINE)
    with _open_text(path) as lines:
        header = lines.readline(MAX_LINE)
        lines.seek(0)
        # The delimiter that yields most of the wanted columns; a comma if none does.
        delimiter = max(",;\t|", key=lambda mark: sum(cell.strip('" \r\n') in columns for cell in header.split(mark)))
        rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
        while True:
            begin = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise ValueError(f"{path}, from line {begin}: {error}. {OPEN_QUOTE}") from error
            if row is None:
                return
            if rows.line_num > begin and _swallows_rows(row, delimiter):
                raise ValueError(f"{path}, from line {begin}: a cell spans several rows. {OPEN_QUOTE}")
            yield {key.strip() if isinstance(key, str) else key: value for key, value in row.items()}


def _swallows_rows(row: dict, delimiter: str) -> bool:
    """Whether a cell contains what look like further rows: lines that begin with the name of an image."""
    later = [line for cell in row.values() if isinstance(cell, str) for line in cell.splitlines()[1:]]
    return any(line.partition(delimiter)[0].strip(' "').lower().endswith(IMAGE_ENDINGS) for line in later)


def _open_text(path: Path) -> TextIO:
    """Open a table as text. Bytes that are not UTF-8 become surrogates, so that one bad caption spoils only one record."""
    with open(path, "rb") as file:
        start = file.read(2)
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return open(path, encoding=encoding, errors="replace" if encoding == "utf-16" else "surrogateescape", newline="")


def _record(folder: Path, name: str, caption, config: DataConfig) -> Record:
    captions, fault = captions_of(caption)
    try:
        path = (folder / name).resolve()
        allowed = Path(config.links_into).expanduser().resolve() if config.links_into else folder
        if not path.is_relative_to(folder) and not path.is_relative_to(allowed):
            linked = (folder / name).is_symlink() or not Path(name).is_absolute() and ".." not in Path(name).parts
            cure = "; copy the files (cp -RL), or name the folder of your own that they are in as data.links_into"
            fault = f"a link out of the folder{cure}" if linked else "outside the folder"
        elif not path.exists():
            fault = "missing"
        elif not path.is_file():
            fault = "not a plain file"
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, or characters that a file name cannot have
        return Record(name, fault="not a file name")
    return Record(name, path, captions, fault=fault or fault_of_kind(name))


def _text_file(folder: Path, path: Path) -> str:
    if not path.is_file() or not path.resolve().is_relative_to(folder):
        return ""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read(MAX_CAPTION_CHARACTERS + 1)


def described_objects(
    config: DataConfig, files: list[Path], what: str, readers: Mapping[str, Callable[[Path], np.ndarray]]
) -> Iterator[Record]:
    """A record for each row of a folder's table, for files that are not images.

    Args:
        what: what the files are, in the plural, for the error message.
        readers: file ending -> the function that reads such a file.

    Raises:
        ValueError: there is no table.
    """
    root = Path(config.name).expanduser()
    if not any((root / table).is_file() for table in TABLES):
        raise ValueError(f"{root} has {what} but no captions; add metadata.csv or metadata.jsonl (file_name, text)")
    others = [str(file.relative_to(root)) for file in files]
    for record in described(root.resolve(), others, config):
        path = record.image
        if isinstance(path, Path) and not record.fault:
            read = readers.get(path.suffix.lower())
            odd = None if read is not None else f"not one of {', '.join(readers)}"
            odd = f"larger than {MAX_FILE_BYTES // 1_000_000} MB" if path.stat().st_size > MAX_FILE_BYTES else odd
            record = replace(record, image=path if read is None else partial(read, path), fault=odd)
        yield record
