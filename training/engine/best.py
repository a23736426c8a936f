"""The best model of a run so far, by a score on held-out data: the folder `best/`."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sfumato.files import CannotSave, read_lines, replace_folder
from sfumato.registries import lower_is_better


def is_better(name: str, value: float, than: float | None) -> bool:
    """Whether a score is better than another, according to the registry's entry for its metric.

    A value that is not finite is never better.
    """
    if not math.isfinite(value):
        return False
    return than is None or (value < than if lower_is_better(name) else value > than)


def load_best(output_dir: Path, name: str | None, step: int) -> float | None:
    """The score of the model in `best/`, if it has the same name; a model of a step later than `step` is removed, since those
    steps are about to be repeated.
    """
    folder = output_dir / "best"
    if not (folder / "best.json").is_file():
        return None
    record = json.loads((folder / "best.json").read_text())
    if record["step"] > step:
        shutil.rmtree(folder)
        return None
    return record["value"] if record["name"] == name else None


def validations_since(output_dir: Path, name: str, step: int) -> int:
    """How many validations up to `step` came after the one with the best score of this name; 0 if none has it."""
    lines = [json.loads(line) for line in read_lines(output_dir / "validation.jsonl")]
    values = [line[name] for line in lines if line["step"] <= step and line.get(name) is not None]
    since, found = 0, None
    for value in values:
        since += 1
        if is_better(name, value, found):
            found, since = value, 0
    return since


def save_best(write: Callable[[Path, Path], object], folder: Path, *, name: str, value: float, step: int) -> None:
    """Write a model and its score into a folder that is moved into place when complete; `write` as for `checkpoints.save`.

    Raises:
        CannotSave: the disk is full or not writable.
    """
    new = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        write(new, folder)
        (new / "best.json").write_text(json.dumps({"name": name, "value": value, "step": step}) + "\n")
        replace_folder(new, folder)
    except (OSError, SafetensorError) as error:
        raise CannotSave(f"could not save {folder}: {error}; make room and go on with checkpoint.resume=auto") from error
