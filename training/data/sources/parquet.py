"""Parquet files."""

from collections.abc import Iterator
from pathlib import Path

from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import ALWAYS_ALLOWED, MAX_GROWTH, Record
from sfumato.training.data.sources.tables import cell_bytes, find_columns, import_datasets, row_record


def _unpacks_to_too_much(file, size: int) -> bool:
    groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    return sum(groups) > max(ALWAYS_ALLOWED, MAX_GROWTH * size)


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """Rows of parquet files, read 16 at a time: `datasets` would hold a whole row group, which may be the entire file."""
    features_of = import_datasets().Features.from_arrow_schema
    import pyarrow.parquet  # comes with datasets

    try:
        features = features_of(pyarrow.parquet.read_schema(files[0]))
    except (OSError, ValueError) as error:
        raise ValueError(f"data.name={config.name!r} cannot be read: {error}") from error
    image, caption, label_name = find_columns(features, config)
    number = 0
    for path in files:
        try:
            file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
            columns = file.schema_arrow.names
            if _unpacks_to_too_much(file, path.stat().st_size):
                yield Record(
                    path.name, fault=f"damaged parquet file, not read (it would unpack to over {MAX_GROWTH} times its size)"
                )
                continue
        except (OSError, pyarrow.ArrowException) as error:
            yield Record(path.name, fault=f"damaged parquet file, not read ({type(error).__name__})")
            continue
        if odd := [name for name in (image, caption) if columns.count(name) != 1]:
            raise ValueError(f"{path} must have one column {' and '.join(odd)}; it has {', '.join(columns)}")
        try:
            for batch in file.iter_batches(16, columns=[image, caption], use_threads=False):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        cell, value = batch[image][i].as_py(), batch[caption][i].as_py()
                    except UnicodeDecodeError:
                        yield Record(f"row {number - 1}", fault="caption is not UTF-8")
                        continue
                    body, fault = cell_bytes(cell)
                    yield row_record(number - 1, body, value, label_name, fault)
        except (OSError, pyarrow.ArrowException) as error:
            yield Record(path.name, fault=f"damaged parquet file, read up to the damage ({type(error).__name__})")
