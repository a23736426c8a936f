"""The held-out loss: one yardstick for all recipes, batch sizes and processes; and the best model by it or another score."""

import json

import numpy as np
import pytest
import tiny
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.engine.best import is_better, load_best
from sfumato.training.quality import drawing, held_out
from sfumato.training.train import main


def task(folder, count=16, **sections):
    config = load_config(tiny.config_file(folder, validation={"num_held_out": count}, **sections))
    return tiny.task(config)


def told(folder):
    return [json.loads(line) for line in (folder / "run" / "validation.jsonl").read_text().splitlines()]


@torch.no_grad()
def test_the_loss_does_not_depend_on_batch_size_and_recipe(tmp_path):
    mine = task(tmp_path)
    losses = held_out.held_out_loss(mine)
    assert list(losses)[1] == "held_out_loss -8 to -6" and len(losses) == 9
    assert losses["held_out_loss"] == pytest.approx(sum(list(losses.values())[1:]) / 8)
    for size in (1, 7):
        assert held_out.held_out_loss(mine, batch_size=size) == pytest.approx(losses, rel=1e-5)
    other = task(
        tmp_path,
        objective={"weight": "min_snr", "timesteps": "laplace", "noise_candidates": 4, "offset_noise": 0.1},
        train={"batch_size": 3},
    )
    assert held_out.held_out_loss(other) == pytest.approx(losses, rel=1e-6), "the weights are the same, so is the loss"


@torch.no_grad()
def test_the_loss_of_a_known_network_is_the_formula(tmp_path):
    """A network that says v = 0 means x_0 = alpha x_t: its error on v is |v|^2, about 1 + small for unit images."""
    mine = task(tmp_path, count=64)
    for parameter in mine.pipe.unet.conv_out.parameters():
        parameter.zero_()
    got = held_out.held_out_loss(mine)
    shown = [mine.images.image(i) for i in drawing.sample_indices(mine.images, 64)]
    power = sum(float(((p / 127.5 - 1) ** 2).mean()) for p in shown) / len(shown)
    # v = sqrt(abar) eps - sqrt(1 - abar) x_0, so |v|^2 = abar + (1 - abar) power, on average over the noise.
    abar = [torch.sigmoid(torch.tensor(e + 1.0)).item() for e in held_out.EDGES[:-1]]
    for (name, loss), a in zip(list(got.items())[1:], abar):
        assert loss == pytest.approx(a + (1 - a) * power, rel=0.12), name


def test_validation_is_written_down_and_the_best_model_kept(tmp_path):
    path = tiny.config_file(
        tmp_path,
        train={"max_steps": 12},
        optim={"lr": 1e-2, "lr_warmup_steps": 0, "lr_decay": "constant"},
        validation={"every_steps": 3, "num_held_out": 8},
        checkpoint={"every_steps": 6, "best_by": "held_out_loss"},
    )
    assert main([str(path)]) == 0
    rows = told(tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    best = min(rows, key=lambda row: row["held_out_loss"])
    pipe = SfumatoPipeline.from_pretrained(tmp_path / "run" / "best" / "pipeline")
    assert pipe.scheduler.config["_sfumato"]["run"]["step"] == best["step"]
    # A resumed run measures what it does again once, and knows what was best before.
    assert load_best(tmp_path / "run", "held_out_loss", 12) == best["held_out_loss"]
    assert load_best(tmp_path / "run", "FD", 12) is None
    assert main([str(path), "checkpoint.resume=auto", "train.max_steps=15"]) == 0
    assert [row["step"] for row in told(tmp_path)] == [3, 6, 9, 12, 15]
    assert told(tmp_path)[:4] == rows
    assert main([str(path), "checkpoint.resume=auto", "train.max_steps=15"]) == 0, "done already: it tells the end again"
    assert [row["step"] for row in told(tmp_path)] == [3, 6, 9, 12, 15]
    kept = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert load_best(tmp_path / "run", "held_out_loss", kept["step"] - 1) is None
    assert not (tmp_path / "run" / "best").exists(), "of steps that are about to be done again"


def test_a_run_whose_score_no_longer_gets_better_ends_by_itself(tmp_path, capsys):
    """At no learning rate no validation is better than the first. Resumed it is done; without patience it goes on."""
    path = tiny.config_file(
        tmp_path,
        train={"max_steps": 30, "patience": 2},
        optim={"lr": 1e-12, "weight_decay": 0.0},
        validation={"every_steps": 2, "num_held_out": 4},
        checkpoint={"every_steps": 2, "best_by": "held_out_loss"},
    )
    assert main([str(path)]) == 0
    assert "did not improve in 2 validations" in "".join(capsys.readouterr())
    steps = [row["step"] for row in told(tmp_path)]
    kept = json.loads((tmp_path / "run" / "best" / "best.json").read_text())["step"]
    assert steps[-1] < 30 and sum(step > kept for step in sorted(set(steps))) == 2
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    assert main([str(path), "checkpoint.resume=auto"]) == 0 and "is finished" in "".join(capsys.readouterr())
    assert main([str(path), "checkpoint.resume=auto", "train.patience=null", "train.max_steps=12"]) == 0
    assert told(tmp_path)[-1]["step"] == 12
    assert main([str(path), "checkpoint.best_by=null"]) == 2 and "set checkpoint.best_by" in "".join(capsys.readouterr())


def test_the_best_by_a_score_of_the_task(tmp_path):
    path = tiny.config_file(tmp_path, checkpoint={"best_by": "all"}, validation={"every_steps": 3})
    assert main([str(path)]) == 0
    assert all("unreadable" in row for row in told(tmp_path)) and (tmp_path / "run" / "best" / "pipeline").is_dir()


def test_the_best_by_features(tmp_path):
    data = {"name": "openmoji", "words": ["moon"]}
    path = tiny.config_file(tmp_path, data=data, checkpoint={"best_by": "FD"}, validation={"every_steps": 6})
    assert main([str(path)]) == 0
    assert told(tmp_path)[-1]["FD"] > 0 and "KID" in told(tmp_path)[-1]


def test_what_is_better():
    assert is_better("FD", 1, 2) and not is_better("all", 1, 2)
    assert is_better("PSNR of model", 30, 20) and is_better("KID", 0.1, None)
    assert not is_better("FD", float("nan"), None) and not is_better("all", float("nan"), 0.1)


def test_an_unknown_score_is_an_error_that_names_the_known_ones(tmp_path, capsys):
    assert main([str(tiny.config_file(tmp_path, checkpoint={"best_by": "beauty"}))]) == 2
    assert "held_out_loss" in capsys.readouterr().err


def test_prompts_of_grids_are_different_captions_where_there_are_such(tmp_path):
    """Of the recordings of fourteen numbers twelve, evenly chosen, were three numbers four times."""
    (tmp_path / "set").mkdir()
    for k in range(1200):
        np.save(tmp_path / "set" / f"{k:04d}.npy", np.full((1, 8, 8), k % 256, np.uint8))
    rows = [f"{k:04d}.npy,says {k % 5}" for k in range(1200)]
    (tmp_path / "set" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    data = {"name": str(tmp_path / "set"), "resolution": 8, "channels": 1}
    images = prepare(load_config(tiny.config_file(tmp_path, data=data)).data)
    held_out = [images[int(i)]["captions"][0] for i in images.select("held_out")]
    assert len(held_out) > len(set(held_out)) > 2
    assert sorted(drawing.sample_captions(images)) == sorted(set(held_out))


def test_prompts_of_grids_follow_no_rhythm_of_the_captions(tmp_path, monkeypatch):
    """Of spoken words held out with each of three paces, every sixth was slow."""
    (tmp_path / "set").mkdir()
    paces = ("slowly", "calmly", "quickly")
    rows = ["file_name,text"]
    for k in range(144):
        np.save(tmp_path / "set" / f"{k:04d}.npy", np.full((1, 8, 8), k, np.uint8))
        rows.append(f"{k:04d}.npy,says {k % 72 // 3} {paces[k % 3]}")
    (tmp_path / "set" / "metadata.csv").write_text("\n".join(rows))
    images = prepare(
        load_config(tiny.config_file(tmp_path, data={"name": str(tmp_path / "set"), "resolution": 8, "channels": 1})).data
    )
    monkeypatch.setattr(images, "select", lambda split: np.arange(144))
    captions = drawing.sample_captions(images)
    assert len(set(captions)) == 12 and {caption.split()[-1] for caption in captions} == set(paces)
