"""WebDataset tar archives."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, cast

from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import (
    ALWAYS_ALLOWED,
    MAX_FILE_BYTES,
    MAX_GROWTH,
    OTHER_NAMES,
    Record,
    captions_of,
    fault_of_kind,
    is_hidden,
    kind_of,
)

CAPTION_ENDINGS = (".txt", ".caption", ".cls", ".json")


@dataclass(frozen=True)
class Member:
    """A file in an archive; `read()` gives its content."""

    name: str
    size: int
    read: Callable[[], bytes]

    @cached_property
    def stem(self) -> str:
        """The name up to its last dot."""
        return str(PurePosixPath(self.name).with_suffix(""))

    @cached_property
    def key(self) -> str:
        """The name up to its first dot, by which WebDataset groups members."""
        path = PurePosixPath(self.name)
        return str(path.parent / path.name.partition(".")[0])

    @cached_property
    def kind(self) -> str:
        """`image`, `unread`, `caption`, `other` or `unknown`."""
        path = PurePosixPath(self.name)
        if path.suffix.lower() in CAPTION_ENDINGS and path.stem.lower() not in OTHER_NAMES:
            return "caption"
        return kind_of(self.name)


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """Records of archives: members that share a name up to its first dot. Nothing is extracted to disk.

    Names with more dots work too: `photo.v1.png` with `photo.v1.txt` is a record of its own, and `c.input.png` goes with
    `c.caption.txt`. If a record has several images or captions, `data.image_column` and `data.caption_column` name the field
    to use (`input.png`, or `input`); the latter also names the key in a `.json` file.
    """
    for path in files:
        try:
            for found in _groups(path):
                if isinstance(found, Record):
                    yield found
                else:
                    yield from _records(path.name, found, config)
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            reason = f"damaged archive, read up to the damage ({type(error).__name__}: {error})"
            yield Record(path.name, fault=reason)


def _open(path: Path) -> tuple[io.BufferedReader, bool]:
    """The uncompressed bytes of an archive, and whether it is compressed, so that seeking back means reading it all again."""
    with open(path, "rb") as file:
        start = file.read(6)
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)):
        if start.startswith(magic):
            return io.BufferedReader(cast(Any, opener(path, "rb")), 1 << 20), True
    return open(path, "rb"), False


def _headers(file: io.BufferedReader, limit: int) -> Iterator[tarfile.TarInfo]:
    """The headers of all members; between two of them, the file may be read up to the end of the current member.

    Raises:
        tarfile.ReadError: the archive is damaged, continues after its end, or unpacks to more than `limit` bytes.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while member := archive.next():
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  (otherwise it keeps every header)
            if member.offset_data + member.size > limit:
                raise tarfile.ReadError(f"{member.name} extends beyond the end, or unpacks to far too much")
            yield member
        file.seek(archive.offset)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):  # tarfile takes a damaged header, or a second archive, for the end
                raise tarfile.ReadError("there is more after its end, such as a damaged header or another archive")
            if file.tell() > limit:
                break


def _groups(path: Path) -> Iterator[Record | list[Member]]:
    """Members grouped by key, and records for those that cannot be used.

    An uncompressed archive can be read in any order, so the members of a record may be apart; in a compressed one they must
    be adjacent.
    """
    file, packed = _open(path)
    size = path.stat().st_size
    groups: dict[str, list[Member]] = {}
    done: set[str] = set()
    error = None

    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    with file:
        try:
            for header in _headers(file, max(ALWAYS_ALLOWED, MAX_GROWTH * size) if packed else size):
                if header.isdir() or is_hidden(PurePosixPath(header.name)):
                    continue
                place = (header.offset_data, header.size)
                member = Member(header.name, header.size, lambda place=place: read(*place))
                fault = _fault(header)
                if packed and not fault:
                    if member.key not in groups and groups:
                        done |= set(groups)
                        yield from groups.values()
                        groups = {}
                    if member.key in done:
                        fault = "apart from the rest of its record: sort the names (tar --sort=name), or do not compress"
                if sum(each.size for each in groups.get(member.key, ())) + member.size > MAX_FILE_BYTES:
                    fault = fault or f"record larger than {MAX_FILE_BYTES // 1_000_000} MB"
                if fault:
                    yield Record(f"{path.name}/{header.name}", fault=fault)
                    continue
                if packed:
                    content = read(*place) if member.kind in ("image", "caption") else b""
                    member = Member(header.name, header.size, lambda content=content: content)
                groups.setdefault(member.key, []).append(member)
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as damage:
            error = damage
        yield from groups.values()
    if error:
        raise error


def _fault(member: tarfile.TarInfo) -> str | None:
    """Why a member must not be read, or None."""
    name = PurePosixPath(member.name)
    if not member.isfile() or member.issparse():
        return "link or device in an archive"
    if name.is_absolute() or ".." in name.parts:
        return "outside the archive"
    return f"larger than {MAX_FILE_BYTES // 1_000_000} MB" if member.size > MAX_FILE_BYTES else None


def _records(archive: str, group: list[Member], config: DataConfig) -> Iterator[Record]:
    """The records among members that share a name up to its first dot: one, or one for each name up to its last dot."""
    key = group[0].key
    stems: dict[str, list[Member]] = {}
    for member in group:
        stems.setdefault(member.stem, []).append(member)
    whole = [stem for stem, members in stems.items() if {"image", "caption"} <= {member.kind for member in members}]
    several = sum(member.kind == "image" for member in group) > 1
    if (whole and key not in whole) or (several and not whole and not config.image_column):
        parts = stems
    elif key in whole and not config.image_column and not config.caption_column:
        parts = {key: stems.pop(key)}
        for member in (member for members in stems.values() for member in members):
            if member.kind != "other":
                yield Record(f"{archive}/{member.name}", left_out="another field of a record")
    else:
        parts = {key: group}
    for name, members in parts.items():
        kinds = {member.kind for member in members}
        if kinds & {"image", "unread", "caption"}:
            yield _join(f"{archive}/{name}", key, members, config)
        elif "unknown" in kinds:
            yield Record(f"{archive}/{members[0].name}", left_out="not an image by its name")


def _choose(members: list[Member], key: str, column: str | None) -> list[Member]:
    """The members whose field is `column`, with or without its ending; all members if there is none."""
    fields = {member.name: member.name[len(key) + 1 :] for member in members}
    chosen = [m for m in members if column and column in (fields[m.name], fields[m.name].rpartition(".")[0])]
    return chosen or members


def _join(name: str, key: str, members: list[Member], config: DataConfig) -> Record:
    images = _choose([member for member in members if member.kind == "image"], key, config.image_column)
    texts = _choose([member for member in members if member.kind == "caption"], key, config.caption_column)
    unread = [fault for member in members if (fault := fault_of_kind(member.name))]
    if not images:
        return Record(name, fault=unread[0] if unread else "no image")
    if len(images) > 1:
        return Record(name, fault="several images; choose a field with data.image_column")
    try:
        caption = _caption(texts, config)
    except (ValueError, AttributeError, RecursionError):
        return Record(name, fault="damaged json")
    captions, fault = captions_of(caption)
    return Record(name, images[0].read(), captions, fault=fault)


def _caption(texts: list[Member], config: DataConfig):
    """The caption: the key `data.caption_column` of a `.json` file, or else the content of a text file."""
    for member in texts:
        if member.name.lower().endswith(".json"):
            value = json.loads(member.read()).get(config.caption_column or "text")
            if value is not None:
                return value
    plain = [member for member in texts if not member.name.lower().endswith(".json")]
    plain.sort(key=lambda member: member.name.lower().endswith(".cls"))  # a text says more than a class
    return plain[0].read().decode("utf-8", "surrogateescape") if plain else None
