"""Nothing is lost on a crash: whatever moment it comes at, what is resumed ends as if nothing had happened."""

import json
import os
import random
import resource
import signal
import time
from types import SimpleNamespace

import crashes
import pytest
import tiny
import torch
from filelock import FileLock
from safetensors.torch import load_file
from test_data import image

from sfumato import files
from sfumato.training.engine import checkpoints, processes, resume
from sfumato.training.train import main


def make_config(folder, **train):
    """Checkpoints at steps 3, 6 and 8, in the middle of epochs, with accumulation."""
    settings = {"max_steps": 8, "gradient_accumulation_steps": 2, **train}
    return tiny.config_file(
        folder, train=settings, checkpoint={"every_steps": 3}, validation={"num_judged": 1}, data={"num_pictures": 30}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The hash of an uninterrupted run, and the moments of its second save."""
    folder = tmp_path_factory.mktemp("whole")
    moments = crashes.list_moments(make_config(folder), nth=2)
    return crashes.result(folder / "run"), moments


def test_a_save_touches_the_disk_at_many_moments(whole):
    _, moments = whole
    assert len(moments) > 40 and moments[-1][0] == "end"
    assert any(where and where.endswith("state.safetensors") for _, where in moments)


@pytest.mark.parametrize("sixth", range(6))
def test_killed_while_saving_and_resumed_equals_uninterrupted(tmp_path, whole, sixth):
    """A short form of `python tests/crashes.py`, which kills at every moment; results in benchmarks/results."""
    expected, moments = whole
    cases = crashes.cases(moments)
    kill_at, cut = cases[random.Random(sixth).randrange(len(cases) * sixth // 6, len(cases) * (sixth + 1) // 6)]
    found = crashes.recovers(tmp_path / "case", make_config, kill_at, cut, nth=2, world=1)
    assert found == expected, (moments[kill_at], cut)


@pytest.mark.slow
def test_two_processes_killed_while_saving(tmp_path):
    (tmp_path / "whole").mkdir()
    assert crashes.train(make_config(tmp_path / "whole", batch_size=2), world=2) == [0, 0]
    expected = crashes.result(tmp_path / "whole" / "run")
    for kill_at, cut in ((5, False), (20, True), (45, False)):
        folder = tmp_path / f"{kill_at}"
        found = crashes.recovers(folder, lambda f: make_config(f, batch_size=2), kill_at, cut, nth=2, world=2)
        assert found == expected, (kill_at, cut)


def test_killed_at_random_times(tmp_path):
    hashes = []
    for kills in (0, 2):
        folder = tmp_path / str(kills)
        folder.mkdir()
        path = tiny.config_file(folder, train={"max_steps": 24}, checkpoint={"every_steps": 2}, validation={"num_judged": 1})
        crashes.random_kills(path, folder / "run", kills, random.Random(0), longest=1.5)
        hashes.append(crashes.result(folder / "run"))
    assert hashes[0] == hashes[1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    path = str(make_config(tmp_path))
    main([path])
    expected = crashes.result(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000008"
    weights = newest / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1  # one bit
    weights.write_bytes(body)
    with pytest.warns(UserWarning, match="step-00000008: pipeline/unet/.*has changed; resuming from step-00000006"):
        assert main([path, "checkpoint.resume=auto"]) == 0
    assert crashes.result(tmp_path / "run") == expected


def test_damaged_newer_checkpoints_do_not_push_out_good_ones(tmp_path):
    path = str(make_config(tmp_path))
    main([path, "train.max_steps=6"])
    for name in ("7", "8"):
        (tmp_path / "run" / "checkpoints" / f"step-0000000{name}").mkdir()
    with pytest.warns(UserWarning, match="resuming from step-00000006"):
        main([path, "checkpoint.resume=auto", "train.max_steps=7"])
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path / "run")] == ["step-00000006", "step-00000007"]
    assert all(checkpoints.find_damage(p) is None for p in checkpoints.list_checkpoints(tmp_path / "run"))


def test_when_no_checkpoint_is_whole_the_run_stops_and_names_each(tmp_path, capsys):
    path = str(make_config(tmp_path))
    main([path])
    for state in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        state.write_text(state.read_text()[:50])
    assert main([path, "checkpoint.resume=auto"]) == 2
    error = capsys.readouterr().err
    assert "no checkpoint" in error and "step-00000006: state.json" in error and "step-00000008: state.json" in error


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    path = make_config(tmp_path)
    assert crashes.train(path, moments=(1, 4, False)) == [-signal.SIGKILL]
    assert resume.last_step(tmp_path / "run" / "metrics.jsonl") == 3
    assert main([str(path), "checkpoint.resume=auto"]) == 0
    assert [json.loads(line)["step"] for line in files.read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_lost_checkpoints_are_not_taken_for_a_young_run(tmp_path, capsys):
    path = str(make_config(tmp_path))
    main([path])
    for folder in checkpoints.list_checkpoints(tmp_path / "run"):
        folder.rename(tmp_path / folder.name)
    assert main([path, "checkpoint.resume=auto"]) == 2
    assert "a run of 8 steps but no checkpoint" in capsys.readouterr().err


def test_no_room_to_save_leaves_the_older_checkpoint_and_says_so(tmp_path, capfd):
    whole = tmp_path / "whole"
    whole.mkdir()
    constant = "optim.lr_decay=constant"
    main([str(make_config(whole)), constant])
    path = str(make_config(tmp_path))
    main([path, constant, "train.max_steps=3"])

    def starved():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a full disk, as far as a large file can tell
        return main([path, constant, "checkpoint.resume=auto"])

    assert crashes.wait([crashes.fork(starved, quiet=False)]) == [4]
    error = capfd.readouterr().err
    assert "could not save" in error and "untouched" in error
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert main([path, constant, "checkpoint.resume=auto"]) == 0
    assert crashes.result(tmp_path / "run", True) == crashes.result(whole / "run", True)


def test_dropout_layers_resume_exactly(tmp_path):
    hashes = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        path = str(tiny.config_file(tmp_path / name, unet={"dropout": 0.3}, optim={"lr_decay": "constant"}))
        if name == "parts":
            main([path, "train.max_steps=3"])
        main([path, *(["checkpoint.resume=auto"] if name == "parts" else [])])
        hashes.append(crashes.result(tmp_path / name / "run", ended_before=True))
    assert hashes[0] == hashes[1]


def test_8_bit_optimizer_state_resumes_exactly(tmp_path):
    pytest.importorskip("bitsandbytes")
    hashes = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        optim = {"name": "adamw_8bit", "lr_decay": "constant"}
        path = str(tiny.config_file(tmp_path / name, optim=optim, text_encoder={"hidden_size": 128}))
        if name == "parts":
            main([path, "train.max_steps=3"])
        main([path, *(["checkpoint.resume=auto"] if name == "parts" else [])])
        hashes.append(crashes.result(tmp_path / name / "run", ended_before=True))
    assert hashes[0] == hashes[1]
    state = load_file(tmp_path / "whole" / "run" / "checkpoints" / "step-00000006" / "state.safetensors")
    assert any(value.dtype == torch.uint8 for value in state.values())


def test_resume_with_other_settings_says_what_is_exact_and_what_is_not(tmp_path, capsys):
    path = str(make_config(tmp_path))
    main([path, "train.max_steps=3"])
    capsys.readouterr()
    main([path, "checkpoint.resume=auto", "optim.lr=5e-4", "train.max_steps=4"])
    out = capsys.readouterr().out
    assert "optim.lr: 0.001 before, 0.0005 now" in out and "Still exact: weights" in out
    main([path, "checkpoint.resume=auto", "optim.lr=2e-4", "train.max_steps=5"])
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "step 3: optim.lr: 0.001 before, 0.0005 now; step 3: train.max_steps: 3 before, 4 now; step 4: " in card
    assert "optim.lr: 0.0005 before, 0.0002 now" in card
    assert main([path, "checkpoint.resume=auto", "optim.name=muon", "train.max_steps=6"]) == 0
    assert main([path, "checkpoint.resume=auto", "train.max_steps=7"]) == 0
    assert capsys.readouterr().out.count("the optimizer's moments begin again") == 2
    main([path, "checkpoint.resume=auto", "data.num_pictures=31", "train.max_steps=8"])
    assert "the images are different" in capsys.readouterr().out


def test_resume_keeps_the_words_of_a_run_whose_data_grew(tmp_path, capsys):
    for name in ("cat", "dog"):
        image(tmp_path / "f" / name / "1.png")
    path = str(tiny.config_file(tmp_path, data={"name": str(tmp_path / "f")}, train={"max_steps": 2}))
    main([path])
    words = (tmp_path / "run" / "pipeline" / "tokenizer" / "vocab.json").read_text()
    image(tmp_path / "f" / "hippopotamus" / "1.png")
    assert main([path, "checkpoint.resume=auto", "train.max_steps=4"]) == 0
    assert "the images are different" in capsys.readouterr().out
    assert (tmp_path / "run" / "pipeline" / "tokenizer" / "vocab.json").read_text() == words


def test_a_changed_number_in_the_state_is_recognised(tmp_path):
    path = str(make_config(tmp_path))
    main([path, "train.max_steps=3"])
    state = tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json"
    assert checkpoints.find_damage(state.parent) is None
    state.write_text(state.read_text().replace('"step": 3', '"step": 2'))
    assert checkpoints.find_damage(state.parent) == "state.json has changed"


def test_two_trainers_do_not_write_to_one_folder(tmp_path, capsys, monkeypatch):
    path = str(make_config(tmp_path))
    ready, tell = os.pipe()

    def hold():
        lock = FileLock(tmp_path / "run" / ".lock")
        lock.acquire()
        os.write(tell, b"x")
        time.sleep(60)

    (tmp_path / "run").mkdir()
    child = crashes.fork(hold)
    os.read(ready, 1)
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    assert main([path]) == 2
    assert "another trainer is writing to" in capsys.readouterr().err
    os.kill(child, signal.SIGKILL)
    crashes.wait([child])
    assert main([path]) == 0


def test_what_may_change_on_resume_is_not_told(tmp_path, capsys):
    path = str(make_config(tmp_path))
    main([path, "optim.lr_decay=constant"])
    capsys.readouterr()
    more = ["data.max_bad_share=0.5", f"data.cache_dir={tmp_path / 'elsewhere'}", "checkpoint.keep=1", "title=Other"]
    more += ["validation.num_judged=2", "train.num_workers=1", "hub.max_shard_size=1GB"]
    assert main([path, "optim.lr_decay=constant", "checkpoint.resume=auto", *more]) == 0
    assert " before, " not in capsys.readouterr().out


def test_a_run_that_is_done_takes_no_other_data_or_settings(tmp_path, capsys):
    """It would train nothing and tell in its card of what the weights never saw."""
    path = str(make_config(tmp_path))
    assert main([path]) == 0
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    for other in ("data.num_pictures=32", "optim.lr=0.5"):
        assert main([path, "checkpoint.resume=auto", other]) == 2
        assert "is done; choose another output_dir" in capsys.readouterr().err
    assert main([path, "checkpoint.resume=auto", "title=Other"]) == 0
    assert (tmp_path / "run" / "pipeline" / "README.md").read_text() != card
    assert main([path, "checkpoint.resume=auto", "optim.lr=1e-4", "train.max_steps=10"]) == 0, "one that goes on takes them"


def test_no_pickle_is_written(tmp_path):
    main([str(make_config(tmp_path))])
    endings = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    assert endings <= {".safetensors", ".json", ".jsonl", ".txt", ".py", ".md", ".png", ".yaml"}


def test_a_validation_that_was_owed_is_made_up_for(tmp_path):
    """A kill right after a save loses neither the grid nor the figures nor the best model of that step."""

    def make(folder):
        folder.mkdir()
        return tiny.config_file(
            folder,
            train={"max_steps": 8},
            checkpoint={"every_steps": 3, "best_by": "held_out_loss"},
            validation={"every_steps": 3, "num_judged": 1},
        )

    assert crashes.train(make(tmp_path / "whole")) == [0]
    end = len(crashes.list_moments(make(tmp_path / "count"), nth=2)) - 1
    path = make(tmp_path / "killed")
    assert crashes.train(path, moments=(2, end, False)) == [-signal.SIGKILL]
    rows = (tmp_path / "killed" / "run" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3]
    assert crashes.train(path, "checkpoint.resume=auto") == [0]
    rows = (tmp_path / "killed" / "run" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3, 6, 8]
    assert crashes.result(tmp_path / "killed" / "run") == crashes.result(tmp_path / "whole" / "run")


def test_a_finished_run_started_again_says_so_and_changes_nothing(tmp_path, capsys):
    path = str(make_config(tmp_path))
    assert main([path]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    assert main([path, "checkpoint.resume=auto"]) == 0
    assert "is finished, at step" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_closed_terminal_saves_unless_it_is_ignored():
    from sfumato.training.engine.processes import StopSignal

    for ignored in (False, True):
        old = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        try:
            stop = StopSignal()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == (0 if ignored else signal.SIGHUP)
            stop.release()
        finally:
            signal.signal(signal.SIGHUP, old)


def test_a_run_outlives_those_who_read_what_it_prints(tmp_path):
    path = str(make_config(tmp_path))

    def unread():
        read, write = os.pipe()
        os.close(read)
        for stream in (1, 2):
            os.dup2(write, stream)
        return main([path])

    assert crashes.wait([crashes.fork(unread, quiet=False)]) == [0]
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_checkpoints_come_by_minutes_too_and_change_nothing(tmp_path, monkeypatch):
    """With four minutes a step and ten at the most between two: after three steps each; the numbers are those without."""
    states = {}
    for name, minutes in (("often", 10), ("never", None)):
        clock = iter(range(0, 100 * 240, 240))
        monkeypatch.setattr("sfumato.training.engine.pulse.time", SimpleNamespace(monotonic=lambda clock=clock: next(clock)))
        (tmp_path / name).mkdir()
        section = {"every_steps": None, "every_minutes": minutes, "keep": 10}
        path = tiny.config_file(tmp_path / name, checkpoint=section, train={"max_steps": 8, "log_every_steps": 1})
        assert main([str(path)]) == 0
        folders = sorted((tmp_path / name / "run" / "checkpoints").glob("step-*"))
        states[name] = ([int(folder.name[5:]) for folder in folders], load_file(folders[-1] / "state.safetensors"))
    assert states["often"][0] == [3, 6, 8] and states["never"][0] == [8]
    assert all(torch.equal(value, states["never"][1][key]) for key, value in states["often"][1].items())
