"""Nothing is lost on a crash: whatever moment it comes at, what is resumed ends as if nothing had happened."""

import json
import random
import resource
import signal

import crashes
import pytest
import tiny

from sfumato.training import checkpoints
from sfumato.training.train import main


def make_config(folder, **train):
    """Checkpoints at steps 3, 6 and 8, in the middle of epochs, with accumulation."""
    settings = {"max_steps": 8, "gradient_accumulation_steps": 2, **train}
    return tiny.config_file(
        folder, train=settings, checkpoint={"every_steps": 3}, validation={"num_shapes": 1}, data={"num_pictures": 30}
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
    for kills in (0, 4):
        folder = tmp_path / str(kills)
        folder.mkdir()
        path = tiny.config_file(folder, train={"max_steps": 40}, checkpoint={"every_steps": 2}, validation={"num_shapes": 1})
        crashes.random_kills(path, folder / "run", kills, random.Random(0), longest=3.0)
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
    with pytest.warns(UserWarning, match="step-00000008: pipeline/unet/.*has changed; goes on from step-00000006"):
        assert main([path, "checkpoint.resume=auto"]) == 0
    assert crashes.result(tmp_path / "run") == expected


def test_damaged_newer_checkpoints_do_not_push_out_good_ones(tmp_path):
    path = str(make_config(tmp_path))
    main([path, "train.max_steps=6"])
    for name in ("7", "8"):
        (tmp_path / "run" / "checkpoints" / f"step-0000000{name}").mkdir()
    with pytest.warns(UserWarning, match="goes on from step-00000006"):
        main([path, "checkpoint.resume=auto", "train.max_steps=7"])
    assert [p.name for p in checkpoints.folders(tmp_path / "run")] == ["step-00000006", "step-00000007"]
    assert all(checkpoints.damage(p) is None for p in checkpoints.folders(tmp_path / "run"))


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
    assert checkpoints.last_step(tmp_path / "run" / "metrics.jsonl") == 3
    assert main([str(path), "checkpoint.resume=auto"]) == 0
    assert [json.loads(line)["step"] for line in checkpoints.lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_lost_checkpoints_are_not_taken_for_a_young_run(tmp_path, capsys):
    path = str(make_config(tmp_path))
    main([path])
    for folder in checkpoints.folders(tmp_path / "run"):
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
    assert crashes.result(tmp_path / "run") == crashes.result(whole / "run")


def test_dropout_layers_resume_exactly(tmp_path):
    hashes = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        path = str(tiny.config_file(tmp_path / name, unet={"dropout": 0.3}, optim={"lr_decay": "constant"}))
        if name == "parts":
            main([path, "train.max_steps=3"])
        main([path, *(["checkpoint.resume=auto"] if name == "parts" else [])])
        hashes.append(crashes.result(tmp_path / name / "run"))
    assert hashes[0] == hashes[1]


def test_resume_with_other_settings_says_what_is_exact_and_what_is_not(tmp_path, capsys):
    path = str(make_config(tmp_path))
    main([path, "train.max_steps=3"])
    capsys.readouterr()
    main([path, "checkpoint.resume=auto", "optim.lr=5e-4", "train.max_steps=4"])
    out = capsys.readouterr().out
    assert "optim.lr: 0.001 before, 0.0005 now" in out and "Still exact: weights" in out
    main([path, "checkpoint.resume=auto", "data.num_pictures=31", "train.max_steps=5"])
    assert "the pictures are others" in capsys.readouterr().out


def test_no_pickle_is_written(tmp_path):
    main([str(make_config(tmp_path))])
    endings = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert endings <= {".safetensors", ".json", ".jsonl", ".txt", ".py", ".md", ".png", ".yaml"}
