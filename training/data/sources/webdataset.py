"""WebDataset tar archives."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sfumato.registries import IMAGE_ENDINGS
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import MAX_FILE_BYTES, Record, captions_of


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """WebDataset archives: members that share a name up to the first dot are one record. Nothing is extracted."""
    for path in files:
        key, parts = None, {}
        try:
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    name = PurePosixPath(member.name)
                    if member.isdir():
                        continue
                    fault = None
                    if not member.isfile():
                        fault = "link or device in an archive"
                    elif name.is_absolute() or ".." in name.parts:
                        fault = "outside the archive"
                    elif member.size > MAX_FILE_BYTES:
                        fault = f"larger than {MAX_FILE_BYTES // 1_000_000} MB"
                    if fault:
                        yield Record(f"{path.name}/{member.name}", fault=fault)
                        continue
                    stem, _, ending = name.name.partition(".")
                    if (here := str(name.parent / stem)) != key:
                        if parts:
                            yield _join_members(f"{path.name}/{key}", parts, config)
                        key, parts = here, {}
                    if sum(map(len, parts.values())) + member.size > MAX_FILE_BYTES:
                        continue  # a flood of members under one name
                    if (ending := ending.lower()) in ("txt", "cls", "json") or f".{ending}" in IMAGE_ENDINGS:
                        body = archive.extractfile(member)
                        parts.setdefault(ending, b"" if body is None else body.read())
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            yield Record(path.name, fault=f"damaged archive, read up to the damage ({type(error).__name__})")
        if parts:
            yield _join_members(f"{path.name}/{key}", parts, config)


def _join_members(name: str, parts: dict[str, bytes], config: DataConfig) -> Record:
    image = next((body for ending, body in parts.items() if f".{ending}" in IMAGE_ENDINGS), None)
    caption = None
    try:
        if "json" in parts:
            caption = json.loads(parts["json"]).get(config.caption_column or "text")
        if caption is None and (text := parts.get("txt", parts.get("cls"))) is not None:
            caption = text.decode("utf-8", "surrogateescape")
    except (ValueError, AttributeError, RecursionError):
        return Record(name, fault="damaged json")
    captions, fault = captions_of(caption)
    return Record(name, image, captions, fault="no image" if image is None else fault)
