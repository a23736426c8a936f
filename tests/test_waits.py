"""A training step asks the device for nothing: no number is read between two log lines, by any task or optimizer."""

import json
import traceback
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from test_control_task import config as control_config
from test_distillation import config as distillation_config
from test_distillation import without
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.training.engine import optimizers
from sfumato.training.engine.pulse import Pulse
from sfumato.training.train import main

READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
}


class Waits(TorchDispatchMode):
    """Where a tensor's value is asked for, which on a GPU has to wait until it is computed; by the lines of our code.

    Attributes:
        seen: how often, by those lines.
        during: the same, between the first step that is noted and the last of `steps`.
    """

    def __init__(self, monkeypatch, steps: int = 0):
        super().__init__()
        self.seen, self.during = Counter(), Counter()
        noted = []
        self.inside = lambda: 0 < len(noted) < steps
        for name in ("cpu", "tolist"):  # which a CPU tensor does without a dispatch
            real = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda tensor, *more, real=real: (self.note(), real(tensor, *more))[1])
        monkeypatch.setattr(optimizers, "HOST_DEVICES", set())  # as if this were none
        note = Pulse.note
        monkeypatch.setattr(Pulse, "note", lambda *arguments: (note(*arguments), noted.append(1)))

    def note(self) -> None:
        lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack() if "/sfumato/" in frame.filename]
        where = " < ".join(reversed(lines[-3:]))
        self.seen[where] += 1
        self.during[where] += self.inside()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        masks = [each for each in args[1] if each is not None] if name == "aten::index" else []
        if name in READS or any(mask.dtype == torch.bool for mask in masks):
            self.note()
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    sections = {"scheduler": {"beta_schedule": "cosine", "prediction_type": "sample"}, "train": {"max_steps": 1}}
    assert main([str(tiny.config_file(folder, **sections))]) == 0
    return folder / "run" / "pipeline"


KINDS = {
    "adamw": {},
    "muon": {"optim": {"name": "muon"}, "train": {"gradient_accumulation_steps": 2}},
    "importance": {"objective": {"importance": True, "noise_candidates": 2, "offset_noise": 0.1}},
    "hybrid loss": {"scheduler": {"variance_type": "learned_range", "prediction_type": "epsilon"}},
    "self-conditioning": {"objective": {"self_conditioning": True}, "scheduler": {"prediction_type": "sample"}},
    "flow": {"objective": {"target": "flow", "timesteps": "normal"}, "validation": {"sampler": "euler"}},
    "averages": {"ema": {"snapshot_steps": 1000}},
    "inpainting": {"task": "inpainting"},
    "upscaling": {"task": "upscaling"},
    "autoencoder": {"task": "autoencoder"},
    "control": {"task": "control"},
    "distillation": {"task": "distillation"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch, teacher, kind):
    sections = {"checkpoint": {"every_steps": None}, **KINDS[kind]}
    if kind == "distillation":
        path = Path(distillation_config(tmp_path, teacher, checkpoint={"every_steps": None}))
    elif kind == "control":
        path = Path(control_config(tmp_path / "control", teacher, **sections))
    else:
        path = tiny.config_file(tmp_path, **sections)
        if kind == "flow":
            without(path, "scheduler")
    with monkeypatch.context() as patch, Waits(patch, steps=5) as waits:
        assert main([str(path), "train.max_steps=5", "train.log_every_steps=100"]) == 0
    assert not +waits.during
    assert waits.seen, "those before and after are seen"


def test_losses_are_read_where_they_are_due(tmp_path, monkeypatch):
    """Of 7 steps every third, where a checkpoint is due, and at the end; each has a line, with its own numbers."""
    reads, read = [], Pulse.read
    monkeypatch.setattr(Pulse, "read", lambda pulse, stop: (reads.append(len(pulse)), read(pulse, stop))[1])
    often, rarely = tmp_path / "often", tmp_path / "rarely"
    lines = []
    for folder, every in ((often, 1), (rarely, 3)):
        folder.mkdir()
        sections = {"train": {"max_steps": 7, "log_every_steps": every}, "checkpoint": {"every_steps": 4}}
        reads.clear()
        assert main([str(tiny.config_file(folder, **sections))]) == 0
        lines.append([json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()])
    assert reads == [3, 1, 3]
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    seconds = [line["seconds"] for line in lines[1]]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_what_reads_is_seen(monkeypatch):
    x = torch.tensor([1.0, 2.0])
    with monkeypatch.context() as patch, Waits(patch) as waits:
        for read in (lambda: float(x[0]), lambda: bool((x > 1).any()), lambda: x[x > 1], lambda: x.cpu(), lambda: x.tolist()):
            before = waits.seen.total()
            read()
            assert waits.seen.total() == before + 1
