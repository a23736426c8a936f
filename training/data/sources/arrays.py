"""Folders of `.npy` or `.npz` files, `(C, H, W)` each, with their captions in metadata.csv, .tsv or .jsonl."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.arrays import ArrayCodec
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import MAX_FILE_BYTES, Record
from sfumato.training.data.sources import folder

ENDINGS = (".npy", ".npz")


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """A record for each row of the table.

    Raises:
        ValueError: there is no table.
    """
    return folder.described_objects(config, files, "arrays", {ending: read_array for ending in ENDINGS})


def open_codec(config: DataConfig, files: list[Path]) -> ArrayCodec:
    """A codec with the range of each channel over all files of the right shape.

    Raises:
        ValueError: no file has that shape; the message says which shapes there are.
    """
    (height, width), channels = config.size, config.channels
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    shapes, integer = set(), True
    for record in open_source(config, files):
        try:
            field = record.image() if callable(record.image) and not record.fault else None
        except ValueError:
            continue
        if field is None:
            continue
        shapes.add(field.shape)
        if field.shape == (channels, height, width) and np.isfinite(field).all():
            low = np.minimum(low, field.min((1, 2)))
            high = np.maximum(high, field.max((1, 2)))
            integer = integer and field.dtype == np.uint8
    if not np.isfinite(low).all():
        found = ", ".join(map(str, sorted(shapes)[:5])) or "none that can be read"
        raise ValueError(
            f"no array in {config.name} is {(channels, height, width)}, as data.channels and data.resolution (or "
            f"data.buckets=[[height,width]]) require; there are {found}"
        )
    if integer:
        low, high = np.zeros(channels), np.full(channels, 255.0)
    scale = np.where(high > low, high - low, 1.0)
    return ArrayCodec((height, width, channels), low.tolist(), scale.tolist(), integer)


def read_array(path: Path) -> np.ndarray:
    """The array in a file; in an `.npz`, the only one or the one named `array`.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            field = opened
        else:
            with opened:
                names = opened.files
                name = names[0] if len(names) == 1 else "array"
                if name not in names:
                    raise ValueError(f"several arrays, none named `array`: {', '.join(names[:5])}")
                if opened.zip.getinfo(f"{name}.npy").file_size > MAX_FILE_BYTES:
                    raise ValueError(f"larger than {MAX_FILE_BYTES // 1_000_000} MB")
                field = opened[name]
    except ValueError as error:
        raise ValueError("pickled objects, which are not opened" if "pickle" in str(error) else str(error)) from error
    except Exception as error:  # numpy and zipfile raise almost anything on a damaged file
        raise ValueError("damaged array") from error
    if field.dtype.kind not in "uifb":
        raise ValueError(f"{field.dtype} are not real numbers")
    if field.ndim == 2:
        field = field[None]
    return field
