"""Rows of tables with an image column and a caption column."""

from collections.abc import Callable

from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import MAX_FILE_BYTES, NAME_THEM, Record, captions_of


def import_datasets():
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("parquet files and Hub data sets need a package: pip install datasets") from error
    return datasets


def find_columns(features: dict, config: DataConfig) -> tuple[str, str, Callable[[int], str] | None]:
    """The names of the image and caption columns, and a function that turns labels into names if captions are labels."""
    image, caption = config.image_column or "image", config.caption_column or "text"
    if features and (missing := [key for key in (image, caption) if key not in features]):
        raise ValueError(f"{config.name} has no column {' and '.join(missing)}; it has {', '.join(features)}. {NAME_THEM}")
    return image, caption, getattr(features.get(caption), "int2str", None)


def cell_bytes(cell) -> tuple[bytes | None, str | None]:
    """The encoded image in a cell, which holds bytes or a struct with bytes, and if there is none, the reason.

    No path or address in an untrusted table is followed: it may point to a file on this machine or to any server.
    """
    if isinstance(cell, dict):
        if isinstance(cell.get("bytes"), bytes):
            return cell["bytes"], None
        cell = cell.get("path")
        return None, None if cell is None else NO_BYTES
    if cell is None or isinstance(cell, bytes):
        return cell, None
    if isinstance(cell, str):
        return None, NO_BYTES
    if isinstance(cell, list) and len(cell) == 1:
        return cell_bytes(cell[0])
    if isinstance(cell, list) and cell and isinstance(cell[0], (dict, bytes)):
        return None, "several images in a cell"
    return None, f"image is a {type(cell).__name__}, not an encoded file (bytes)"


NO_BYTES = "image is a path, not its content; write the table with datasets' Image(), which embeds the files"


def row_record(number: int, body: bytes | None, value, label_name, fault: str | None = None) -> Record:
    if label_name and value is not None:
        try:
            value = label_name(value).replace("_", " ") if value >= 0 else None
        except (ValueError, TypeError):
            return Record(f"row {number}", fault="unknown label")
    if body is not None and len(body) > MAX_FILE_BYTES:
        body, fault = None, f"larger than {MAX_FILE_BYTES // 1_000_000} MB"
    captions, wrong = captions_of(value)
    return Record(f"row {number}", body, captions, fault=fault or wrong or ("no image" if body is None else None))
