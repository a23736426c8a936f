"""Data sets on the Hub."""

from collections.abc import Iterator
from pathlib import Path

import fsspec

from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import MAX_FILE_BYTES, Record
from sfumato.training.data.sources.tables import cell_bytes, find_columns, import_datasets, row_record


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """Rows of a Hub data set, read as a stream: nothing but the prepared images is stored."""
    datasets = import_datasets()
    from datasets import exceptions as datasets_errors

    try:
        rows = datasets.load_dataset(config.name, split=config.split, revision=config.revision, streaming=True)
    except (OSError, ValueError, datasets_errors.DatasetsError) as error:
        raise ValueError(f"data.name={config.name!r} cannot be read: {error}") from error
    image, caption, label_name = find_columns(rows.features or {}, config)
    if isinstance((rows.features or {}).get(image), datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    for number, row in enumerate(rows):
        cell = row.get(image)
        body, fault = cell_bytes(cell)
        path = str(cell.get("path")) if isinstance(cell, dict) else ""
        # In an untrusted table, only paths that point into the data set itself are followed.
        if body is None and path.split("::")[-1].startswith(f"hf://datasets/{config.name}@"):
            try:
                with fsspec.open(path) as file:
                    body, fault = file.read(MAX_FILE_BYTES), None  # pyright: ignore[reportAttributeAccessIssue]
            except (OSError, ValueError) as error:
                fault = f"cannot be fetched ({type(error).__name__})"
        yield row_record(number, body, row.get(caption), label_name, fault)
