"""Where records come from: OpenMoji, drawn shapes, folders, WebDataset tars, parquet files, Hub data sets.

Every source is a generator of `Record`; one that cannot be used says so in `fault` and is counted, never raised.
"""

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np

from sfumato.training.config.schema import DataConfig
from sfumato.training.data.sources import openmoji, shapes

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_FILE_BYTES = 256_000_000
MAX_CAPTION_CHARACTERS = 10_000
NAME_THEM = "Name them with data.image_column and data.caption_column"


@dataclass
class Record:
    """One picture with its captions, not yet read."""

    name: str
    picture: Path | bytes | Callable[[], np.ndarray] | None = None
    captions: list[str] = field(default_factory=list)
    split: str | None = None  # None: decided by the name
    fault: str | None = None  # why it cannot be used


def captions_of(value) -> tuple[list[str], str | None]:
    """The usable captions in a cell (a text, a list of texts, or nothing), and what is wrong if there is none."""
    values = [text for text in (value if isinstance(value, (list, tuple)) else [value]) if text is not None]
    if any(isinstance(text, dict) or text != text for text in values):
        return [], "caption is no text"
    values = [text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text for text in values]
    texts = [str(text).replace("\ufeff", "").strip() for text in values]  # Windows begins text files with that mark
    texts = [text for text in texts if text]
    sound = [text for text in texts if text.encode("utf-8", "ignore").decode() == text]
    short = [text for text in sound if len(text) <= MAX_CAPTION_CHARACTERS]
    if short:
        return short, None
    if sound:
        return [], f"caption longer than {MAX_CAPTION_CHARACTERS:,} characters"
    return [], "caption is not UTF-8" if texts else "no caption"


def open_source(config: DataConfig) -> Iterator[Record]:
    """The records of `data.name`.

    Raises:
        ValueError: no such source, or one without captions.
    """
    if config.name == "openmoji":
        return _openmoji(config)
    if config.name == "shapes":
        return _shapes(config)
    path = Path(config.name).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    loose = [file for file in files if file.suffix.lower() in SUFFIXES]
    tars = [file for file in files if file.name.endswith((".tar", ".tar.gz", ".tgz"))]
    parquets = [file for file in files if file.suffix == ".parquet"]
    if loose and (tars or parquets):
        raise ValueError(f"{path} holds both pictures and {(tars + parquets)[0].name}; name that file, or put it elsewhere")
    if tars:
        return _tars(tars, config)
    if parquets:
        return _parquet(parquets, config)
    if path.is_dir():
        return _folder(path.resolve(), config)
    if config.name.count("/") == 1 and not config.name.startswith((".", "~", "/")) and not path.parent.exists():
        return _hub(config)
    raise ValueError(
        f"data.name={config.name!r} is neither openmoji nor shapes nor a folder, tar or parquet file that exists, "
        "nor a Hub id (owner/name)"
    )


def _openmoji(config: DataConfig) -> Iterator[Record]:
    found = openmoji.records(config.languages, config.skin_tones, config.words)
    if not any(record["split"] == "train" for record in found):
        raise ValueError(f"no OpenMoji picture has a name with one of data.words={config.words}")

    def draw(svg):
        return lambda: openmoji.rasterise(svg, config.resolution)

    def captions(record):
        if not config.colours or "en" not in config.languages:
            return record["captions"]
        return record["captions"] + openmoji.coloured(record["captions"][0], openmoji.rasterise(record["svg"], 32))

    return (Record(r["id"], draw(r["svg"]), captions(r), r["split"]) for r in found)


def _shapes(config: DataConfig) -> Iterator[Record]:
    train, held_out = (shapes.scenes(held_out=held, num_figures=config.num_figures) for held in (False, True))
    scenes = [(train[i % len(train)], "train") for i in range(config.num_pictures)] + [(s, "held_out") for s in held_out]
    rng = np.random.default_rng(0)
    for i, (scene, split) in enumerate(scenes):
        yield Record(str(i), lambda scene=scene: shapes.draw(scene, config.resolution, rng), [scene.caption], split)


def _folder(folder: Path, config: DataConfig) -> Iterator[Record]:
    """Records of metadata.csv or .jsonl, caption .txt files, or class sub-folders."""
    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return _metadata(folder, folder / name, config)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if any(path.with_suffix(".txt").is_file() for path in files):
        return (_in_folder(folder, str(p.relative_to(folder)), _text_file(folder, p.with_suffix(".txt"))) for p in files)
    if any(path.parent == folder for path in files):
        raise ValueError(
            f"{folder} has pictures but no captions; add metadata.csv or metadata.jsonl (file_name, text), a .txt beside "
            "each picture, or sort the pictures into sub-folders named like their class"
        )
    names = [str(p.relative_to(folder)) for p in files]
    classes = {Path(name).parts[0] for name in names}
    described = {name for name in classes if list((folder / name).glob("metadata.*"))}
    if inner := sorted(described or (classes if classes <= {"train", "test", "val", "validation"} else ())):
        raise ValueError(
            f"{folder} holds picture sets of their own: {', '.join(inner)}; name one, such as {folder / inner[0]}"
        )
    return (_in_folder(folder, name, Path(name).parts[0].replace("_", " ")) for name in names)


def _metadata(folder: Path, path: Path, config: DataConfig) -> Iterator[Record]:
    columns = (config.image_column or "file_name", config.caption_column or "text")
    first, rows = None, _rows(path)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            yield Record(f"{path.name} line {number + 1}", fault="damaged line")
            continue
        if first is None:
            first = row
            if missing := [key for key in columns if key not in row]:
                has = f"it has {', '.join(map(str, row))}. {NAME_THEM}"
                raise ValueError(f"{path} has no column {' and '.join(missing)}; {has}")
        name = row.get(columns[0])
        if not isinstance(name, str) or not name:
            yield Record(f"{path.name} line {number + 1}", fault="no file name")
        elif None in row:  # or a caption would end at its first comma
            yield Record(name, fault="more cells than columns; put a caption that has commas in quotes")
        else:
            yield _in_folder(folder, name, row.get(columns[1]))


def _rows(path: Path) -> Iterator[dict | None]:
    # Bytes that are not UTF-8 pass as surrogates, so that one bad caption is one bad record.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        if path.suffix == ".csv":
            csv.field_size_limit(10_000_000)
            try:
                yield from csv.DictReader(lines)
            except csv.Error:  # no line after it can be trusted
                yield None
            return
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None


def _in_folder(folder: Path, name: str, caption) -> Record:
    captions, fault = captions_of(caption)
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            fault = "outside the folder"
        elif not path.is_file():
            fault = "missing"
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, characters that no file name has
        return Record(name, fault="not a file name")
    return Record(name, path, captions, fault=fault)


def _text_file(folder: Path, path: Path) -> str:
    if not path.is_file() or not path.resolve().is_relative_to(folder):
        return ""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read(MAX_CAPTION_CHARACTERS + 1)


def _tars(paths: list[Path], config: DataConfig) -> Iterator[Record]:
    """WebDataset archives: members that share a name up to the first dot are one record. Nothing is extracted."""
    for path in paths:
        key, parts = None, {}
        try:
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    name = PurePosixPath(member.name)
                    if member.isdir():
                        continue
                    fault = None
                    if not member.isfile():
                        fault = "link or device in an archive"
                    elif name.is_absolute() or ".." in name.parts:
                        fault = "outside the archive"
                    elif member.size > MAX_FILE_BYTES:
                        fault = f"larger than {MAX_FILE_BYTES // 1_000_000} MB"
                    if fault:
                        yield Record(f"{path.name}/{member.name}", fault=fault)
                        continue
                    stem, _, ending = name.name.partition(".")
                    if (here := str(name.parent / stem)) != key:
                        if parts:
                            yield _joined(f"{path.name}/{key}", parts, config)
                        key, parts = here, {}
                    if sum(map(len, parts.values())) + member.size > MAX_FILE_BYTES:
                        continue  # a flood of members under one name
                    if (ending := ending.lower()) in ("txt", "cls", "json") or f".{ending}" in SUFFIXES:
                        parts.setdefault(ending, archive.extractfile(member).read())
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            yield Record(path.name, fault=f"damaged archive, read up to the damage ({type(error).__name__})")
        if parts:
            yield _joined(f"{path.name}/{key}", parts, config)


def _joined(name: str, parts: dict[str, bytes], config: DataConfig) -> Record:
    picture = next((body for ending, body in parts.items() if f".{ending}" in SUFFIXES), None)
    caption = None
    try:
        if "json" in parts:
            caption = json.loads(parts["json"]).get(config.caption_column or "text")
        if caption is None and (text := parts.get("txt", parts.get("cls"))) is not None:
            caption = text.decode("utf-8", "surrogateescape")
    except (ValueError, AttributeError, RecursionError):
        return Record(name, fault="damaged json")
    captions, fault = captions_of(caption)
    return Record(name, picture, captions, fault="no picture" if picture is None else fault)


def _datasets():
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("parquet files and Hub data sets need a package: pip install 'sfumato[datasets]'") from error
    return datasets


def _columns(features: dict, config: DataConfig) -> tuple[str, str, Callable[[int], str] | None]:
    """The names of the picture and caption columns, and what turns labels into names if captions are labels."""
    image, caption = config.image_column or "image", config.caption_column or "text"
    if features and (missing := [key for key in (image, caption) if key not in features]):
        raise ValueError(f"{config.name} has no column {' and '.join(missing)}; it has {', '.join(features)}. {NAME_THEM}")
    return image, caption, getattr(features.get(caption), "int2str", None)


def _parquet(paths: list[Path], config: DataConfig) -> Iterator[Record]:
    """Rows of parquet files, 16 at a time: `datasets` would hold a whole row group, which may be the file."""
    features_of = _datasets().Features.from_arrow_schema
    import pyarrow.parquet  # comes with datasets

    try:
        features = features_of(pyarrow.parquet.read_schema(paths[0]))
    except (OSError, ValueError) as error:
        raise ValueError(f"data.name={config.name!r} cannot be read: {error}") from error
    image, caption, label_name = _columns(features, config)
    number = 0
    for path in paths:
        try:
            file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
            columns = file.schema_arrow.names
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
                    body = cell if isinstance(cell, bytes) else cell.get("bytes") if isinstance(cell, dict) else None
                    # No path inside a stranger's table is followed: it may name a file of this machine, or any address.
                    yield _row(number - 1, body, value, label_name)
        except (OSError, pyarrow.ArrowException) as error:
            yield Record(path.name, fault=f"damaged parquet file, read up to the damage ({type(error).__name__})")


def _hub(config: DataConfig) -> Iterator[Record]:
    """Rows of a Hub data set, read as a stream: nothing but the prepared pictures is stored."""
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(config.name, split=config.split, revision=config.revision, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data.name={config.name!r} cannot be read: {error}") from error
    image, caption, label_name = _columns(rows.features or {}, config)
    for number, row in enumerate(rows.cast_column(image, datasets.Image(decode=False))):
        cell, fault = row[image] or {}, None
        body, path = cell.get("bytes"), str(cell.get("path"))
        # Of paths in a stranger's table only those into the data set itself are followed.
        if body is None and path.split("::")[-1].startswith(f"hf://datasets/{config.name}@"):
            try:
                with fsspec.open(path) as file:
                    body = file.read(MAX_FILE_BYTES)
            except (OSError, ValueError) as error:
                fault = f"cannot be fetched ({type(error).__name__})"
        yield _row(number, body, row[caption], label_name, fault)


def _row(number: int, body: bytes | None, value, label_name, fault: str | None = None) -> Record:
    if label_name and value is not None:
        try:
            value = label_name(value).replace("_", " ") if value >= 0 else None
        except (ValueError, TypeError):
            return Record(f"row {number}", fault="unknown label")
    if body is not None and len(body) > MAX_FILE_BYTES:
        body, fault = None, f"larger than {MAX_FILE_BYTES // 1_000_000} MB"
    captions, wrong = captions_of(value)
    return Record(f"row {number}", body, captions, fault=fault or wrong or ("no picture" if body is None else None))
