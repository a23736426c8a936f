"""Every record of a source is read, checked and resized once, and stored decoded as an `ArraySet`."""

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from sfumato.files import printable, sync
from sfumato.pipelines.codecs import Codec, repeat_of
from sfumato.registries import SOURCES, load_object
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.array_set import RECORD, SPLITS, ArraySet, hash_content, image_file
from sfumato.training.data.images import read_image, read_shape
from sfumato.training.data.records import HELD_OUT_SHARE, Record, Unusable, hash_fraction
from sfumato.training.data.sources.keywords import keyword_files
from sfumato.training.data.sources.registry import open_codec, open_source, source_name
from sfumato.training.data.stream import sample_of

# Raise this by hand with every code change that alters prepared bytes of all sources (for a single source: `Source.version`).
# tests/test_identity.py has golden hashes.
FORMAT_VERSION = 2
# Settings that do not affect the prepared images.
NOT_IN_KEY = ("cache_dir", "max_bad_share", "random_flip", "cache_latents", "cache_embeddings", "stream_buffer")
# Settings that affect the prepared images only if the data are read as a stream.
OF_STREAMS = ("stream", "stream_sample")
NUM_NAMED = 3  # names for each reason in a message
# Settings that were added later, with the value that leaves a set as it was before.
LATER = {"recolours": 0, "keywords": None}


def cache_key(config: DataConfig) -> str:
    """A hash of what determines the prepared images: settings, `FORMAT_VERSION`, packages, the source's version and its files.

    It names a folder in the cache, so it only says where to look. What a set contains is identified by `ArraySet.fingerprint`.
    """
    parts = {key: value for key, value in asdict(config).items() if key not in NOT_IN_KEY}
    parts = {key: value for key, value in parts.items() if config.stream or key not in OF_STREAMS}
    parts = {key: value for key, value in parts.items() if key not in LATER or value != LATER[key]}
    parts["format"] = FORMAT_VERSION
    source = None if config.stream else SOURCES[source_name(config.name)]
    if source is not None and source.version > 1:
        parts["source"] = source.version
    for package in ("pillow", *(source.packages if source is not None else ())):
        try:
            parts[package] = version(package)
        except PackageNotFoundError:
            parts[package] = None
    digest = hashlib.sha256(json.dumps(parts).encode())
    named, _, argument = config.name.partition(":")
    path = Path(argument if named in SOURCES and SOURCES[named].named and argument else config.name).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    places = {file: file.relative_to(path) for file in files}
    if config.keywords:
        folder = Path(config.keywords).expanduser()
        places |= {file: file.relative_to(folder) for file in keyword_files(folder, config.languages)}
    for file, place in places.items():
        if file.is_file():
            status = file.stat()
            digest.update(f"{place} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def prepared_folder(config: DataConfig) -> Path:
    """The folder where the prepared set of a config is, or will be."""
    return Path(config.cache_dir).expanduser() / f"{Path(config.name).name}-{config.resolution}-{cache_key(config)}"


def prepare(config: DataConfig) -> ArraySet:
    """Read, check and resize every image once; later calls with the same settings memory-map the stored result.

    Several processes may call this at once: one prepares the set, the others wait for it.

    Raises:
        ValueError: no such source, no captions, or too many unusable images; the message names them.
        ModuleNotFoundError: the source needs a package; the message names it.
    """
    records = sample_of(config) if config.stream else open_source(config)
    folder = prepared_folder(config)
    if not (folder / "report.json").is_file():  # an existing set may be in a read-only folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        _prepare_into(folder, config, records)
    images = ArraySet(folder)
    check_usable(config, images.num_records, len(images.select("train")), images.skipped, skipped_file(folder))
    return images


def _prepare_into(folder: Path, config: DataConfig, records: Iterator[Record]) -> None:
    """Make the set, unless another process has made it in the meantime."""
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not (folder / "report.json").is_file():
            new = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            try:
                _write(config, records, new, skipped_file(folder))
                sync(new)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)


class _Writer:
    """The files of a set under construction; see `ArraySet` for what is in them."""

    def __init__(self, folder: Path, buckets: list[tuple[int, int]]):
        self.folder = folder
        self.images = [open(folder / image_file(size), "wb") for size in buckets]
        self.texts = {name: open(folder / f"{name}.bin", "wb") for name in ("captions", "names")}
        self.ends = {name: open(folder / f"{name}-ends.bin", "wb") for name in self.texts}
        self.table = open(folder / "records.bin", "wb")
        self.rows = [0] * len(buckets)
        self.num_captions = 0
        self.num_train = 0

    def add(self, record: Record, bucket: int, image: np.ndarray) -> None:
        """Append a record and its image, `(H, W, C)` uint8 of the bucket's size."""
        split = record.split or ("held_out" if hash_fraction(record.name) < HELD_OUT_SHARE else "train")
        entry = (bucket, self.rows[bucket], SPLITS.index(split), self.num_captions, len(record.captions))
        self.table.write(np.array(entry, RECORD).tobytes())
        self.images[bucket].write(image.tobytes())
        self._add_texts("captions", record.captions)
        self._add_texts("names", [record.name])
        self.rows[bucket] += 1
        self.num_captions += len(record.captions)
        self.num_train += split == "train"

    def _add_texts(self, name: str, values: list[str]) -> None:
        for value in values:
            self.texts[name].write(value.encode("utf-8", "replace"))
            self.ends[name].write(np.uint64(self.texts[name].tell()).tobytes())

    def close(self) -> None:
        """Close all files."""
        files: list[BinaryIO] = [*self.images, *self.texts.values(), *self.ends.values(), self.table]
        for file in files:
            file.close()

    def finish(self, report: dict) -> None:
        """Write the tables as `.npy` and then, as the last file, the report with the hash of all others."""
        self.close()
        tables = {"records": RECORD, **{f"{name}-ends": np.dtype("u8") for name in self.texts}}
        for name, dtype in tables.items():
            raw = self.folder / f"{name}.bin"
            np.save(self.folder / f"{name}.npy", np.fromfile(raw, dtype))
            raw.unlink()
        report = {**report, "content": hash_content(self.folder)}
        (self.folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")


def _write(config: DataConfig, records: Iterator[Record], folder: Path, list_file: Path) -> None:
    buckets = [(size[0], size[1]) for size in config.buckets] or [(config.resolution, config.resolution)]
    codec = None if config.stream else open_codec(config)
    if codec is None and config.channels not in (1, 3, 4):
        raise ValueError(f"data.channels={config.channels}: images have 1, 3 or 4 channels")
    writer, num_records = _Writer(folder, buckets), 0
    skipped: dict[str, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    noted: dict[str, int] = {}
    try:
        for record in tqdm(records, desc="preparing images", unit=""):
            if record.left_out:
                left_out.setdefault(record.left_out, []).append(_utf8(record.name))
                continue
            if num_records == config.max_records:
                break
            num_records += 1
            notes: set[str] = set()
            try:
                if record.fault:
                    raise Unusable(record.fault)
                bucket, image = _fit(record, buckets, config, notes) if codec is None else (0, _encode(record, codec))
            except Unusable as error:
                skipped.setdefault(error.reason, []).append(_utf8(record.name))
                continue
            for note in sorted(notes):
                noted[note] = noted.get(note, 0) + 1
            writer.add(record, bucket, image)
    finally:
        writer.close()
    _list_skipped(list_file, skipped)
    if message := check_usable(config, num_records, writer.num_train, skipped, list_file):
        warnings.warn(message, stacklevel=4)
    if left_out:
        warnings.warn(f"left out of {config.name}: {_count(left_out)}", stacklevel=4)
    source = SOURCES[source_name(config.name)] if not config.stream else None
    report = {
        **({"credits": load_object(source.credits)(config)} if source is not None and source.credits else {}),
        "buckets": buckets,
        "channels": config.channels,
        "records": num_records,
        "skipped": skipped,
        "left_out": left_out,
        "noted": noted,
        "codec": codec.describe() if codec is not None else None,
    }
    writer.finish(report)


def _utf8(name: str) -> str:
    return printable(name.encode("utf-8", "replace").decode())


def skipped_file(folder: Path) -> Path:
    """The file beside a prepared set that lists all its skipped records, if a message names some only."""
    return folder.with_name(f"{folder.name}-skipped.txt")


def _list_skipped(file: Path, skipped: dict[str, list[str]]) -> None:
    """Write a line for each skipped record: its name, a tab, the reason."""
    if _is_cut_short(skipped):
        plain = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
        lines = [f"{name.translate(plain)}\t{reason}\n" for reason, names in skipped.items() for name in names]
        file.write_text("".join(lines), encoding="utf-8")


def _is_cut_short(skipped: dict[str, list[str]]) -> bool:
    """Whether a message has no room for all the names."""
    return any(len(names) > NUM_NAMED for names in skipped.values())


def _count(names_by_reason: dict[str, list[str]]) -> str:
    """The number of names for each reason, with the first few names."""
    return "; ".join(
        f"{len(names)} {reason} ({', '.join(names[:NUM_NAMED])}{', ...' if len(names) > NUM_NAMED else ''})"
        for reason, names in names_by_reason.items()
    )


def _fit(record: Record, buckets: list[tuple[int, int]], config: DataConfig, notes: set[str]) -> tuple[int, np.ndarray]:
    """The index of the bucket with the nearest aspect ratio, and the image in its size."""
    if callable(record.image):  # generated, already in the wanted size
        try:
            return 0, record.image()
        except ValueError as error:
            raise Unusable(str(error)) from error
    if record.image is None:
        raise Unusable("no image")
    bucket = 0
    if len(buckets) > 1:
        height, width = read_shape(record.image)
        aspect = math.log(width / height)
        bucket = min(range(len(buckets)), key=lambda k: abs(math.log(buckets[k][1] / buckets[k][0]) - aspect))
    return bucket, read_image(record.image, buckets[bucket], config.channels, config.resize, notes)


def _encode(record: Record, codec: Codec) -> np.ndarray:
    """The array of an object, `(H, W, C)`, as the set stores it: of repeated values only the first."""
    try:
        thing = record.image() if callable(record.image) else record.image
        array = codec.encode(thing)
    except ValueError as error:
        raise Unusable(str(error)) from error
    if array.shape != codec.shape or not np.isfinite(array).all():
        raise Unusable(f"an array of shape {array.shape} instead of {codec.shape}, or with values that are not finite")
    array = array[:: repeat_of(codec), :: repeat_of(codec)]
    return np.round(array * 255).astype(np.uint8) if codec.stored == "uint8" else (array * 2 - 1).astype(np.float16)


def check_usable(
    config: DataConfig, num_records: int, num_train: int, skipped: dict[str, list[str]], list_file: Path
) -> str | None:
    """One line about the records that cannot be used, and the file that lists them if there is one; None if all can.

    Raises:
        ValueError: nothing is left to train on, or more than `data.max_bad_share` cannot be used.
    """
    num_skipped = sum(map(len, skipped.values()))
    report = _count(skipped)
    if _is_cut_short(skipped) and list_file.is_file():
        report += f"; all of them are listed in {list_file}"
    if not num_train:
        raise ValueError(f"{config.name} has no usable image to train on. Skipped: {report or 'none, it is empty'}")
    if num_skipped > config.max_bad_share * num_records:
        raise ValueError(
            f"{num_skipped} of {num_records} images in {config.name} cannot be used: {report}. "
            f"Repair or remove them, or allow more with data.max_bad_share (now {config.max_bad_share})"
        )
    return f"skipped {num_skipped} of {num_records} images: {report}" if skipped else None
