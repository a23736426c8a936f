"""Records to batches: every source is prepared once into decoded pictures on disk, then read by position.

All randomness of a sample is a function of (seed, epoch, index), so nothing has to be replayed on resume and the same
sample gets the same caption, noise and noise level on any number of processes.
"""

import csv
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from sfumato import __version__
from sfumato.training import openmoji, shapes
from sfumato.training.config import Config, DataConfig

MAX_PIXELS = 32_000_000
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
GOLDEN_RATIO = 0.6180339887498949


@dataclass
class PictureSet:
    """Prepared pictures `(N, H, W, 3)` uint8, memory-mapped, and for each a record {id, captions, split}."""

    pictures: np.ndarray
    records: list[dict]
    skipped: dict[str, list[str]]  # reason -> names

    def select(self, split: str) -> list[int]:
        """Indices of the records of `train`, `held_out` or `held_out_combination`."""
        return [i for i, record in enumerate(self.records) if record["split"] == split]

    def training_captions(self) -> list[str]:
        """All captions of the training split, in order."""
        return [caption for i in self.select("train") for caption in self.records[i]["captions"]]


def read_picture(path: Path, resolution: int) -> np.ndarray:
    """One picture as `(resolution, resolution, 3)` uint8: turned upright, laid on white, centre-cropped to a square.

    Raises:
        ValueError: too many pixels (judged before decoding), or not readable; the reason in a few words.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS // 1_000_000} megapixels")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16") or picture.mode == "I":  # 16 bits: PIL would clip, not scale
            picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        if picture.mode in ("P", "PA", "LA", "RGBA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        picture = picture.convert("RGB")
    except ValueError as error:
        raise error if "megapixels" in str(error) else ValueError("damaged picture") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("not a picture") from error
    except (OSError, SyntaxError, EOFError, MemoryError) as error:
        raise ValueError("damaged picture") from error
    return np.asarray(ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS))


def _folder_records(folder: Path) -> list[tuple[str, str]]:
    """(relative file name, caption) from metadata.csv or .jsonl, caption .txt files, or class sub-folders."""
    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            with open(folder / name, encoding="utf-8-sig", newline="") as lines:
                rows = (
                    list(csv.DictReader(lines))
                    if name.endswith("csv")
                    else [json.loads(line) for line in lines if line.strip()]
                )
            missing = [key for key in ("file_name", "text") if rows and key not in rows[0]]
            if missing:
                raise ValueError(f"{folder / name} has no column {' and '.join(missing)}; it needs file_name and text")
            return [(str(row["file_name"]), str(row["text"] or "")) for row in rows]
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if any(path.with_suffix(".txt").is_file() for path in files):
        return [(str(p.relative_to(folder)), _caption_file(p.with_suffix(".txt"))) for p in files]
    if any(path.parent == folder for path in files):
        raise ValueError(
            f"{folder} has pictures but no captions; add metadata.csv or metadata.jsonl (file_name, text), a .txt beside "
            "each picture, or sort the pictures into sub-folders named like their class"
        )
    return [(str(p.relative_to(folder)), p.relative_to(folder).parts[0].replace("_", " ")) for p in files]


def _caption_file(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def _prepare_folder(config: DataConfig) -> tuple[list[np.ndarray], list[dict], dict[str, list[str]]]:
    folder = Path(config.name).expanduser().resolve()
    pictures, records, skipped = [], [], {}
    entries = _folder_records(folder)
    for name, caption in tqdm(entries, desc="reading pictures"):
        path = (folder / name).resolve()
        try:
            if not path.is_relative_to(folder):
                raise ValueError("outside the folder")
            if not path.is_file():
                raise ValueError("missing")
            if not caption.strip():
                raise ValueError("no caption")
            pictures.append(read_picture(path, config.resolution))
        except ValueError as error:
            skipped.setdefault(str(error), []).append(name)
            continue
        records.append(
            {"id": name, "captions": [caption.strip()], "split": "held_out" if openmoji.share(name) < 0.02 else "train"}
        )
    num_bad = sum(map(len, skipped.values()))
    report = "; ".join(
        f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for reason, names in skipped.items()
    )
    if not any(record["split"] == "train" for record in records):
        raise ValueError(f"{folder} has no usable picture. Skipped: {report or 'none, the folder is empty'}")
    if num_bad > config.max_bad_share * len(entries):
        raise ValueError(
            f"{num_bad} of {len(entries)} pictures in {folder} cannot be used: {report}. "
            f"Mend or remove them, or allow more with data.max_bad_share (now {config.max_bad_share})"
        )
    if skipped:
        warnings.warn(f"skipped {num_bad} of {len(entries)} pictures: {report}", stacklevel=2)
    return pictures, records, skipped


def _prepare_openmoji(config: DataConfig) -> tuple[list[np.ndarray], list[dict], dict]:
    records = openmoji.records(config.languages, config.skin_tones, config.words)
    if not any(record["split"] == "train" for record in records):
        raise ValueError(f"no OpenMoji picture has a name with one of data.words={config.words}")
    pictures = [openmoji.rasterise(r.pop("svg"), config.resolution) for r in tqdm(records, desc="drawing OpenMoji")]
    return pictures, records, {}


def _prepare_shapes(config: DataConfig) -> tuple[list[np.ndarray], list[dict], dict]:
    train, held_out = shapes.scenes(held_out=False), shapes.scenes(held_out=True)
    scenes = [(train[i % len(train)], "train") for i in range(config.num_pictures)] + [(s, "held_out") for s in held_out]
    rng = np.random.default_rng(0)
    pictures = [shapes.draw(scene, config.resolution, rng) for scene, _ in tqdm(scenes, desc="drawing shapes")]
    return pictures, [{"id": str(i), "captions": [s.caption], "split": split} for i, (s, split) in enumerate(scenes)], {}


def _cache_key(config: DataConfig) -> str:
    """Whatever changes the prepared pictures changes this: settings, our version, and the files of a folder."""
    parts = [__version__, config.name, config.resolution, config.max_bad_share]
    if config.name == "shapes":
        parts += [config.num_pictures]
    elif config.name == "openmoji":
        parts += [*config.languages, config.skin_tones, *config.words]
    else:
        folder = Path(config.name).expanduser()
        for path in sorted(folder.rglob("*")):
            parts += [str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def prepare(config: DataConfig) -> PictureSet:
    """Read, check and resize every picture once; later calls with the same settings map the stored result.

    Raises:
        ValueError: no such source, no captions, or too many unusable pictures; each is named.
    """
    kinds = {"openmoji": _prepare_openmoji, "shapes": _prepare_shapes}
    if config.name not in kinds and not Path(config.name).expanduser().is_dir():
        raise ValueError(f"data.name={config.name!r} is neither openmoji nor shapes nor a folder that exists")
    label = Path(config.name).name
    cache = Path(config.cache_dir).expanduser() / f"{label}-{config.resolution}-{_cache_key(config)}"
    if not (cache / "records.json").is_file():
        pictures, records, skipped = kinds.get(config.name, _prepare_folder)(config)
        new = cache.with_name(f".{cache.name}.{os.getpid()}")
        new.mkdir(parents=True)
        np.save(new / "pictures.npy", np.stack(pictures))
        (new / "records.json").write_text(json.dumps({"records": records, "skipped": skipped}), encoding="utf-8")
        try:
            new.rename(cache)
        except OSError:  # another process was first
            shutil.rmtree(new)
    stored = json.loads((cache / "records.json").read_text(encoding="utf-8"))
    return PictureSet(np.load(cache / "pictures.npy", mmap_mode="r"), stored["records"], stored["skipped"])


class CaptionedPictures(Dataset):
    """Training samples by position in an endless stream; epoch = position // length, each in its own shuffled order."""

    def __init__(self, pictures: PictureSet, seed: int, caption_dropout: float):
        self.pictures = pictures
        self.indices = pictures.select("train")
        self.seed = seed
        self.caption_dropout = caption_dropout
        self._epoch, self._order = -1, None
        self._first_u = np.random.default_rng(seed).random()

    def __getitem__(self, position: int) -> tuple[np.ndarray, str, float, int]:
        """Picture `(H, W, 3)` uint8, caption ('' where dropped), uniform number for the noise level, seed of the noise."""
        epoch, place = divmod(position, len(self.indices))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.indices))
        index = self.indices[self._order[place]]
        rng = np.random.default_rng((self.seed, epoch, index))
        captions = self.pictures.records[index]["captions"]
        caption = captions[rng.integers(len(captions))]
        if rng.random() < self.caption_dropout:
            caption = ""
        # Golden-ratio steps spread the noise levels evenly over any run of positions, hence over every batch.
        u = (self._first_u + position * GOLDEN_RATIO) % 1.0
        return self.pictures.pictures[index], caption, u, int(rng.integers(2**63))


class Positions(Sampler):
    """The positions that one process reads, endlessly: block after block of `batch_size`, dealt out to the processes."""

    def __init__(self, batch_size: int, rank: int, num_processes: int, start: int = 0):
        self.batch_size, self.rank, self.num_processes, self.start = batch_size, rank, num_processes, start

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.num_processes * self.batch_size


def batches(
    pictures: PictureSet, config: Config, tokenizer, rank: int = 0, num_processes: int = 1, start: int = 0
) -> Iterator[dict]:
    """Endless training batches of one process, from global position `start` on.

    Yields:
        `pixel_values` (B, 3, H, W) float32 in [-1, 1], `input_ids` (B, L), `u` (B,) in [0, 1), `noise_seed` (B,).
    """

    def collate(samples):
        images, captions, u, seeds = zip(*samples)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        tokens = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return {
            "pixel_values": pixels.contiguous(),
            "input_ids": tokens.input_ids,
            "u": torch.tensor(u),
            "noise_seed": torch.tensor(seeds),
        }

    return iter(
        DataLoader(
            CaptionedPictures(pictures, config.seed, config.objective.caption_dropout),
            batch_sampler=Positions(config.train.batch_size, rank, num_processes, start),
            collate_fn=collate,
            num_workers=config.train.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
    )


def noise_for(seeds: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal noise `(B, *shape)`, each sample's from its own seed."""
    rows = [torch.randn(shape, generator=torch.Generator(device).manual_seed(int(s)), device=device) for s in seeds]
    return torch.stack(rows)
