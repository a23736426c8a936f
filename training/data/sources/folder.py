"""Folders: metadata.csv or .jsonl, caption .txt files, or class sub-folders."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from sfumato.registries import IMAGE_ENDINGS
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import MAX_CAPTION_CHARACTERS, NAME_THEM, Record, captions_of


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """Records of metadata.csv or .jsonl, caption .txt files, or class sub-folders.

    Raises:
        ValueError: images without captions, or several sets of images.
    """
    folder = Path(config.name).expanduser().resolve()
    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return _described(folder, folder / name, config)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if any(path.with_suffix(".txt").is_file() for path in files):
        return (_record(folder, str(p.relative_to(folder)), _text_file(folder, p.with_suffix(".txt"))) for p in files)
    if any(path.parent == folder for path in files):
        raise ValueError(
            f"{folder} has images but no captions; add metadata.csv or metadata.jsonl (file_name, text), a .txt beside "
            "each image, or sort the images into sub-folders named like their class"
        )
    names = [str(p.relative_to(folder)) for p in files]
    classes = {Path(name).parts[0] for name in names}
    described = {name for name in classes if list((folder / name).glob("metadata.*"))}
    if inner := sorted(described or (classes if classes <= {"train", "test", "val", "validation"} else ())):
        raise ValueError(f"{folder} holds image sets of their own: {', '.join(inner)}; name one, such as {folder / inner[0]}")
    return (_record(folder, name, Path(name).parts[0].replace("_", " ")) for name in names)


def _described(folder: Path, path: Path, config: DataConfig) -> Iterator[Record]:
    columns = (config.image_column or "file_name", config.caption_column or "text")
    first, rows = None, _rows(path)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            yield Record(f"{path.name} line {number + 1}", fault="damaged line")
            continue
        if first is None:
            first = row
            if missing := [key for key in columns if key not in row]:
                has = f"it has {', '.join(map(str, row))}. {NAME_THEM}"
                raise ValueError(f"{path} has no column {' and '.join(missing)}; {has}")
        name = row.get(columns[0])
        if not isinstance(name, str) or not name:
            yield Record(f"{path.name} line {number + 1}", fault="no file name")
        elif None in row:  # or a caption would end at its first comma
            yield Record(name, fault="more cells than columns; put a caption that has commas in quotes")
        else:
            yield _record(folder, name, row.get(columns[1]))


def _rows(path: Path) -> Iterator[dict | None]:
    # Bytes that are not UTF-8 pass as surrogates, so that one bad caption is one bad record.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        if path.suffix == ".csv":
            csv.field_size_limit(10_000_000)
            try:
                yield from csv.DictReader(lines)
            except csv.Error:  # no line after it can be trusted
                yield None
            return
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None


def _record(folder: Path, name: str, caption) -> Record:
    captions, fault = captions_of(caption)
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            fault = "outside the folder"
        elif not path.is_file():
            fault = "missing"
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, characters that no file name has
        return Record(name, fault="not a file name")
    return Record(name, path, captions, fault=fault)


def _text_file(folder: Path, path: Path) -> str:
    if not path.is_file() or not path.resolve().is_relative_to(folder):
        return ""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read(MAX_CAPTION_CHARACTERS + 1)
