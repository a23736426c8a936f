"""The tensors of a checkpoint as safetensors: each process writes the rows that it holds, and reads those that it needs."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.tensor import DTensor

from sfumato.training.models.parameters import local_part

PIECE = (
    256_000_000  # maximum size of a file in bytes, if the state is sharded: a copy of a piece is in memory while it is written
)


def first_row(tensor: torch.Tensor) -> tuple[int, bool]:
    """Where the rows that this process holds begin, and whether it is the first process that holds them.

    Raises:
        ValueError: it is sharded in a way other than that of fully_shard, by rows.
    """
    if not isinstance(tensor, DTensor):
        return 0, not distributed.is_initialized() or distributed.get_rank() == 0
    first, is_first = 0, True
    for dim, placement in enumerate(tensor.placements):
        place, count = tensor.device_mesh.get_local_rank(dim), tensor.device_mesh.size(dim)
        if placement.is_shard(0):
            first = min(place * -(-tensor.shape[0] // count), tensor.shape[0])
        elif placement.is_replicate():
            is_first = is_first and place == 0
        else:
            raise ValueError(f"a weight is sharded as {placement}; only by rows is supported")
    return first, is_first


class Held(NamedTuple):
    """What this process holds of a tensor.

    Attributes:
        part: its rows.
        first: where they begin in the whole.
        shape: that of the whole.
    """

    part: torch.Tensor
    first: int
    shape: list[int]


def held_by_this_process(tensors: dict[str, torch.Tensor]) -> dict[str, Held]:
    """What this process is to write of some tensors; rows that several processes hold are written by the first of them."""
    held = {}
    for name, tensor in tensors.items():
        first, is_first = first_row(tensor)
        part = local_part(tensor)
        if is_first and part.numel():
            held[name] = Held(part, first, list(tensor.shape))
    return held


def write_state(folder: Path, held: dict[str, Held], *, rank: int = 0, world: int = 1) -> None:
    """Write what this process holds, in one file if there is one process, else in pieces of `PIECE` bytes."""
    if world == 1:
        save_file({name: each.part.contiguous() for name, each in held.items()}, folder / "state.safetensors")
        return
    piece: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[int, list[int]]] = {}
    number = 0

    def finish() -> None:
        path = folder / f"state-{rank:05d}-of-{world:05d}-{number:04d}.safetensors"
        save_file(piece, path, metadata={"rows": json.dumps(rows)})
        piece.clear()
        rows.clear()

    for name, (part, first, shape) in held.items():
        if piece and sum(each.nbytes for each in piece.values()) + part.nbytes > PIECE:
            finish()
            number += 1
        piece[name] = part.contiguous()
        rows[name] = (first, shape)
    finish()


class StateFiles:
    """The tensors of a checkpoint, read by rows, whoever wrote them; a context manager.

    Attributes:
        shapes: of the whole tensors, by name.
    """

    def __init__(self, folder: Path):
        self.shapes: dict[str, list[int]] = {}
        self._stack = ExitStack()
        self._parts: dict[str, list[tuple[int, int, object]]] = {}
        for path in sorted(folder.glob("state*.safetensors")):
            file = self._stack.enter_context(safe_open(path, "pt"))
            rows = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():
                shape = file.get_slice(name).get_shape()
                first, whole = rows.get(name, (0, shape))
                self.shapes[name] = whole
                self._parts.setdefault(name, []).append((first, shape[0] if shape else 1, file))

    def __enter__(self) -> "StateFiles":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def read(self, name: str, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Rows of a tensor from `first` on; all of it by default.

        Raises:
            ValueError: some rows are in no file.
        """
        shape = self.shapes[name]
        if not shape:
            return self._parts[name][0][2].get_tensor(name)  # pyright: ignore[reportAttributeAccessIssue]
        last = shape[0] if count is None else first + count
        pieces = []
        reached = first
        for begins, length, file in sorted(self._parts[name], key=lambda part: part[0]):
            low, high = max(first, begins), min(last, begins + length)
            if low < high:
                pieces.append(file.get_slice(name)[low - begins : high - begins])  # pyright: ignore[reportAttributeAccessIssue]
                reached = high if low == reached else reached
        if reached < last:
            raise ValueError(f"rows {reached} to {last} of {name} are in no file of the checkpoint")
        if not pieces:
            return torch.empty(0, *shape[1:])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def fill(self, target: torch.Tensor, name: str) -> None:
        """Read into a tensor what this process holds of it."""
        part = local_part(target)
        part.copy_(self.read(name, first_row(target)[0], part.shape[0]) if part.ndim else self.read(name))


def has_state(folder: Path) -> bool:
    """Whether a folder holds the tensors of a checkpoint."""
    return any(folder.glob("state*.safetensors"))


def raw_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights before averaging, by name, of a checkpoint."""
    with StateFiles(folder) as files:
        return {name.removeprefix("raw."): files.read(name) for name in files if name.startswith("raw.")}
