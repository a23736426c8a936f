"""A prepared data set: a folder of flat files, memory-mapped, so that a run keeps only a few bytes per record in memory.

`pictures-HxW.bin` holds the images of one size, `(N, H, W, C)` uint8; arrays that repeat each value over a square are stored
with one value per square. Captions and names are stored as text with the offsets of their ends, and a table holds the bucket,
row, split and captions of each record.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs import open_codec, repeat_of

SPLITS = ("train", "held_out", "held_out_combination", "held_out_pair")


RECORD = np.dtype([("bucket", "u2"), ("row", "u4"), ("split", "u1"), ("first_caption", "u8"), ("num_captions", "u4")])


class Texts(Sequence):
    """A sequence of strings in one memory-mapped file."""

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


class ArraySet(Sequence):
    """Prepared images and their records. Item i is a dict: `id`, `captions`, `split`.

    Attributes:
        buckets: the image sizes, (height, width).
        table: an array of `RECORD`, one row per record.
        skipped: reason -> names of the records that could not be used.
        credits: who made the images, and the licence; None unless the source states them.
        left_out: reason -> names of what was found but is not part of the set, such as other splits.
        num_records: the number of records, including those that could not be used.
        noted: what was unusual about images that could be used -> how many.
        codec: the description of the codec, see `pipelines.codecs`; None: plain images.
        repeat: each stored value covers `repeat` x `repeat` pixels.
        fingerprint: a hash of all bytes of the set: the same images, captions and splits have the same fingerprint, however
            they were made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._open(folder)
            self._check_sizes()
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"the prepared set {folder} is damaged ({error}); remove this folder, and it will be prepared again"
            ) from error

    def _open(self, folder: Path) -> None:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        self.skipped = report["skipped"]
        self.left_out: dict[str, list[str]] = report.get("left_out", {})
        self.noted = report["noted"]
        self.codec: dict | None = report.get("codec")
        self.credits: tuple[str, str | None] | None = tuple(report["credits"]) if "credits" in report else None
        codec = None if self.codec is None else open_codec(self.codec)
        self.dtype = np.dtype(np.uint8) if codec is None else np.dtype(codec.stored)
        self.repeat = 1 if codec is None else repeat_of(codec)
        self.channels = report["channels"]
        self.num_records = report["records"]
        self.buckets = [tuple(size) for size in report["buckets"]]
        self.fingerprint: str = report["content"]
        self.table = np.load(folder / "records.npy", mmap_mode="r")
        self.captions, self.names = Texts(folder, "captions"), Texts(folder, "names")
        self._maps = []
        for height, width in self.buckets:
            path = folder / image_file((height, width))
            shape = (-1, height // self.repeat, width // self.repeat, self.channels)
            self._maps.append(np.memmap(path, self.dtype, "r").reshape(shape) if path.stat().st_size else None)

    def _check_sizes(self) -> None:
        """Raise ValueError if a file does not hold what the table says."""
        rows = np.bincount(self.table["bucket"], minlength=len(self.buckets))
        held = [0 if images is None else len(images) for images in self._maps]
        if rows.tolist() != held:
            raise ValueError(f"it holds {held} images, but its table says {rows.tolist()}")
        texts = int(self.table["num_captions"].sum(dtype=np.int64))
        for name, store, count in (("captions", self.captions, texts), ("names", self.names, len(self.table))):
            end = int(store.ends[-1]) if len(store.ends) else 0
            if len(store.ends) != count or len(store.body) != end:
                raise ValueError(f"its {name} are cut off")

    def verify(self) -> bool:
        """Whether all bytes are still as they were prepared; reads every file."""
        return hash_content(self.folder) == self.fingerprint

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
    def has_several_sizes(self) -> bool:
        """Whether training images are of more than one size."""
        return len(np.unique(self.table["bucket"][self.select("train")])) > 1

    def picture(self, i: int) -> np.ndarray:
        """Image i, or the image that its codec draws of it, `(h, w, C)` uint8."""
        if self.codec is None:
            return self.image(i)
        codec = open_codec(self.codec)
        return codec.picture(codec.decode(to_unit(self.image(i))))

    def image(self, i: int) -> np.ndarray:
        """Image i, `(H, W, C)` uint8; for a set with a codec, the encoded array, which may be float16 in [-1, 1]."""
        image = self.stored(i)
        return image if self.repeat == 1 else image.repeat(self.repeat, axis=0).repeat(self.repeat, axis=1)

    def stored(self, i: int) -> np.ndarray:
        """Image i as it is stored, one value for each `repeat` x `repeat` pixels."""
        row = self.table[i]
        return self._maps[row["bucket"]][row["row"]]

    def select(self, split: str) -> np.ndarray:
        """Indices of the records of one of `SPLITS`, `(N,)` int64."""
        return np.flatnonzero(self.table["split"] == SPLITS.index(split))

    def training_captions(self, limit: int = 200_000) -> list[str]:
        """All captions of the training split, in order; for a larger set, those of at most `limit` evenly spaced records."""
        chosen = self.select("train")
        return [text for i in chosen[:: -(-len(chosen) // limit) or 1] for text in self[int(i)]["captions"]]


def to_unit(array: np.ndarray) -> np.ndarray:
    """A stored array as float32 in [0, 1]."""
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array.astype(np.float32) / 2 + 0.5


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` evenly spaced integers from 0 to near `total`, or all below `total` if there are fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def image_file(size: tuple[int, int]) -> str:
    """The name of the file that holds the images of one size, (height, width)."""
    return f"pictures-{size[0]}x{size[1]}.bin"


def hash_content(folder: Path) -> str:
    """A hash of the bytes of a prepared set, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.npy")):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
