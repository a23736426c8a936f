"""Signals at each phase of a run: what was lost is made up for, and the end is that of a run that nobody disturbed."""

import importlib
import os
import signal

import crashes
import pytest
import tiny
from loopback_hub import Hub
from test_hub import forked

from sfumato.training.train import main

# Phase -> what begins it or lies within it, and at which of its calls the signal comes.
PHASES = {
    "preparation": ("sfumato.training.data.prepare", "_Writer.add", 20),
    "training": ("sfumato.training.engine.ema", "EMA.step", 4),
    "validation": ("sfumato.training.loop", "validate", 1),
    "export": (
        "sfumato.training.tasks.text_to_image",
        "export_pipeline",
        7,
    ),  # after three checkpoints and three that were the best
    "push": ("sfumato.training.publish.hub", "push", 1),
}
# Within the loop a run saves and leaves by itself; elsewhere there is nothing to save that is not on the disk.
LEAVES_BY_ITSELF = ("training", "validation")


def send_at(phase: str, number: int) -> None:
    """From now on this process gets signal `number` once, at `phase`."""
    module, name, call = PHASES[phase]
    place, calls = importlib.import_module(module), [0]
    *owners, name = name.split(".")
    for owner in owners:
        place = getattr(place, owner)
    real = getattr(place, name)

    def signalled(*arguments, **named):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return real(*arguments, **named)

    setattr(place, name, signalled)


def make_config(folder):
    folder.mkdir()
    return tiny.config_file(
        folder,
        train={"max_steps": 8},
        data={"num_pictures": 30},
        checkpoint={"every_steps": 3, "best_by": "held_out_loss"},
        validation={"every_steps": 3, "num_judged": 1},
        hub={"push": True, "repo_id": "tiny"},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run leaves that gets no signal."""
    folder = tmp_path_factory.mktemp("whole")
    path = make_config(folder / "run")
    with Hub() as hub:
        ran = forked(hub, folder / "home", lambda: main([str(path)]), "writer")
        assert ran.returncode == 0, ran.stderr
        return crashes.result(folder / "run" / "run"), set(files_of(hub))


def files_of(hub):
    repository = hub.repositories["ada/tiny"]
    return repository.commits[repository.resolve("main")]


QUICK = [("preparation", "SIGTERM"), ("validation", "SIGHUP")]
ALL = [(phase, name) for phase in PHASES for name in ("SIGTERM", "SIGHUP", "SIGPIPE")]


@pytest.mark.parametrize("phase, name", [pytest.param(*c, marks=[] if c in QUICK else pytest.mark.slow) for c in ALL])
def test_a_signal_costs_nothing(tmp_path, undisturbed, phase, name):
    number, path = getattr(signal, name), make_config(tmp_path / "run")

    def disturbed():
        if name == "SIGHUP":  # or these tests under nohup would pass it on as ignored
            signal.signal(number, signal.SIG_DFL)
        send_at(phase, number)
        return main([str(path)])

    with Hub() as hub:
        code = forked(hub, tmp_path / "home", disturbed, "writer").returncode
        if name == "SIGPIPE":  # of a pipe whose reader has gone; the disk and the run are well
            assert code == 0
        else:
            assert code == (128 + number if phase in LEAVES_BY_ITSELF else -number)
            again = forked(hub, tmp_path / "home", lambda: main([str(path), "checkpoint.resume=auto"]), "writer")
            assert again.returncode == 0, again.stderr
        assert set(files_of(hub)) == undisturbed[1]
    assert crashes.result(tmp_path / "run" / "run") == undisturbed[0]
    assert not [path for path in (tmp_path / "run" / "cache").rglob("*") if path.name.endswith(".new")]
