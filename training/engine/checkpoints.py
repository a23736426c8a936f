"""Checkpoints: `step-00001000/` with the training state (safetensors and JSON, no pickle) and a loadable `pipeline/`.

A checkpoint is written next to its place, synced to the disk and renamed into it. `state.json` is written last and holds
the SHA-256 of every other file, so a torn or damaged folder is recognised. Old ones go only once a newer one is whole.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed

from sfumato.files import CannotSave, sync, sync_entry
from sfumato.training.engine.ema import EMA, TRACKS
from sfumato.training.models.parameters import trained_names, trained_parameters
from sfumato.training.models.state_files import Held, StateFiles, held_by_this_process, write_state


def collect(denoiser: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> dict[str, torch.Tensor]:
    """Raw weights, averaged weights and optimizer state by name: the tensors themselves, not copies; sharded if they are."""
    names, parameters = trained_names(denoiser), trained_parameters(denoiser)
    tensors: dict[str, torch.Tensor] = {f"raw.{name}": parameter for name, parameter in zip(names, parameters)}
    tensors |= {f"ema.{name}": shadow for name, shadow in zip(names, ema.shadow_params)}
    for length, track in zip(TRACKS, ema.tracks.values()):
        tensors |= {f"track.{length}|{name}": value for name, value in zip(names, track)}
    for name, parameter in zip(names, parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}|{key}"] = torch.as_tensor(value)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def save(
    output_dir: Path,
    tensors: dict[str, torch.Tensor],
    write: Callable[[Path, Path], object],
    state: dict,
    keep: int,
    *,
    rank: int = 0,
    world: int = 1,
    saver: "BackgroundSaver | None" = None,
) -> Path:
    """Write one checkpoint, then remove all but the `keep` newest.

    If the tensors are sharded, all processes must call this, with their `rank` of `world`: each writes what it holds, and
    none ever holds the whole; with a `saver` it writes from a copy while training continues. Otherwise only the first
    process calls this.

    Args:
        output_dir: the run folder.
        tensors: from `collect`.
        write: writes the model with its averaged weights into a folder; is given that folder and its final path.
        state: what the loop needs to resume, as JSON; `step` names the folder.
        keep: how many checkpoints to keep.

    Raises:
        CannotSave: the disk is full or not writable; nothing half-written stays, older checkpoints are unchanged. With a
            `saver`, this is about the previous checkpoint.
    """
    place = {"rank": rank, "world": world}
    held = held_by_this_process(tensors)
    if saver is None:
        _save(output_dir, held, write, state, keep, **place)
    else:
        saver.wait()  # before the copy, or there would be two
        held = {name: each._replace(part=each.part.to("cpu", copy=True)) for name, each in held.items()}
        saver.start(lambda group: _save(output_dir, held, write, state, keep, **place, group=group))
    return _folder_of(output_dir, state)


def _folder_of(output_dir: Path, state: dict) -> Path:
    return output_dir / "checkpoints" / f"step-{state['step']:08d}"


class BackgroundSaver:
    """A thread that writes checkpoints of sharded weights; one per process, created by all at once.

    The processes coordinate through a group of their own, so as not to interfere with what training exchanges meanwhile.
    """

    def __init__(self):
        self._group = distributed.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[Any], object]) -> None:
        """Begin, once the previous checkpoint is written.

        Raises:
            CannotSave: the previous checkpoint could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="saver", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Any], object]) -> None:
        try:
            work(self._group)
        except BaseException as error:  # noqa: BLE001  (it is raised again where it is waited for)
            self._error = error

    def wait(self) -> None:
        """Wait until the checkpoint is written.

        Raises:
            CannotSave: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error = self._error
        self._error = None
        if error is not None:
            raise error


def _save(
    output_dir: Path,
    held: dict[str, Held],
    write: Callable[[Path, Path], object],
    state: dict,
    keep: int,
    *,
    rank: int,
    world: int,
    group: Any = None,
) -> None:
    """See `save`."""
    folder = _folder_of(output_dir, state)
    new = folder.with_name(f".{folder.name}.new")
    main = rank == 0
    try:
        with _all_or_none(world, group):
            if main:
                _clear(folder.parent)
                new.mkdir(parents=True)
        with _all_or_none(world, group):
            write_state(new, held, rank=rank, world=world)
        with _all_or_none(world, group):
            if main:
                _finish(new, folder, write, state)
    except (OSError, SafetensorError) as error:
        if main:
            shutil.rmtree(new, ignore_errors=True)
        raise CannotSave(
            f"could not save {folder}: {error}. The checkpoints before it are untouched; "
            "make room and go on with checkpoint.resume=auto"
        ) from error
    if main:
        newer = [path for path in list_checkpoints(output_dir) if path.name > folder.name]  # skipped on resume, so damaged
        for old in newer + [path for path in list_checkpoints(output_dir) if path.name <= folder.name][:-keep]:
            _remove(old)


@contextmanager
def _all_or_none(world: int, group: Any) -> Iterator[None]:
    """Wait for the other processes at the end, and fail in all of them if one has failed."""
    if world == 1:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        failed = error
    reasons: list[str | None] = [None] * world
    distributed.all_gather_object(reasons, None if failed is None else str(failed), group=group)
    if any(reasons):
        raise failed or OSError(next(reason for reason in reasons if reason))


def _finish(new: Path, folder: Path, write: Callable[[Path, Path], object], state: dict) -> None:
    """Add the model and the hashes of all files, and move the folder into place."""
    write(new, folder)
    files = {str(path.relative_to(new)): _sha256(path) for path in sorted(new.rglob("*")) if path.is_file()}
    body = json.dumps({**state, "files": files})
    (new / "state.json").write_text(json.dumps({**json.loads(body), "sha256": _sha256_of(body)}))
    sync(new)
    if folder.exists():  # damaged, or it would have been resumed from
        _remove(folder)
    new.rename(folder)
    sync_entry(folder.parent)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, including damaged ones."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step-*") if path.is_dir())


def _remove(folder: Path) -> None:
    """Hide a checkpoint at once by renaming it, then remove it, so that it is never seen in part."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _clear(folder: Path) -> None:
    """Remove what a crash left half written or half removed."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, according to its hashes; None if it is intact."""
    try:
        state = json.loads((folder / "state.json").read_text())
        expected, files = state.pop("sha256"), dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "state.json is missing, damaged or of an older version"
    if _sha256_of(json.dumps(state)) != expected:
        return "state.json has changed"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            if _sha256(folder / name) != expected:
                return f"{name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def read_state(folder: Path) -> dict:
    """The JSON state of a checkpoint, without the hashes."""
    state = json.loads((folder / "state.json").read_text())
    return {key: value for key, value in state.items() if key not in ("files", "sha256")}


def restore(
    folder: Path, denoiser: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, with_moments: bool = True
) -> None:
    """Restore a checkpoint's tensors; without `with_moments`, as for another optimizer, not those of the optimizer.

    Each process reads what it holds, however many processes wrote.

    Raises:
        ValueError: the checkpoint is of a model with other parameters.
    """
    names, parameters = trained_names(denoiser), trained_parameters(denoiser)
    with StateFiles(folder) as files, torch.no_grad():
        if ema.tracks and not any(key.startswith("track.") for key in files):
            raise ValueError(f"{folder} has no tracks for ema.snapshot_steps, which must be set from the first step on")
        expected = {f"raw.{name}": list(parameter.shape) for name, parameter in zip(names, parameters)}
        stored = {key: shape for key, shape in files.shapes.items() if key.startswith("raw.")}
        if expected != stored:
            odd = sorted(k for k in expected.keys() | stored.keys() if expected.get(k) != stored.get(k))
            raise ValueError(f"{folder} is of another model: {len(odd)} parameters differ, such as {', '.join(odd[:3])}")
        moments: dict[str, list[str]] = {}
        for key in files:
            if key.startswith("optimizer.") and with_moments:
                name, entry = key.removeprefix("optimizer.").split("|")
                moments.setdefault(name, []).append(entry)
        for number, (name, parameter, shadow) in enumerate(zip(names, parameters, ema.shadow_params)):
            files.fill(parameter, f"raw.{name}")
            files.fill(shadow, f"ema.{name}")
            for length, track in zip(TRACKS, ema.tracks.values()):
                files.fill(track[number], f"track.{length}|{name}")
            for entry in moments.get(name, []):
                key = f"optimizer.{name}|{entry}"
                if files.shapes[key] == list(parameter.shape):
                    optimizer.state[parameter][entry] = torch.empty_like(parameter)
                    files.fill(optimizer.state[parameter][entry], key)
                else:
                    optimizer.state[parameter][entry] = files.read(key).to(parameter.device)
