"""Choosing a sampler for a model: what is tried, what is best, and that a stock folder keeps it."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

from sfumato import api
from sfumato.cli import main as cli
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.tune import _draw, tune
from sfumato.training.train import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    scheduler = {"beta_schedule": "cosine", "prediction_type": "sample"}
    assert main([str(tiny.config_file(folder, scheduler=scheduler, train={"max_steps": 2}))]) == 0
    return folder / "run"


def test_the_best_one_is_kept_by_a_stock_folder(run, tmp_path, capsys):
    out = tmp_path / "tuned"
    assert cli(["tune", "--model", str(run), "--steps", "3", "--prompts", "a red circle", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "best first" in said and "in 3 steps" in said
    assert recommended_settings(str(out))["num_inference_steps"] == 3
    assert "num_inference_steps=3" in (out / "README.md").read_text()
    stock, ours = DiffusionPipeline.from_pretrained(out), SfumatoPipeline.from_pretrained(out)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    images = []
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images)
    assert np.abs(images[0] - images[1]).max() <= 1e-5


def test_trials_are_sorted_by_what_they_measure(run):
    pipe = SfumatoPipeline.from_pretrained(run / "pipeline")
    trials = tune(pipe, ["a red circle", "a blue square"], 4, 2.0)
    errors = [trial.error for trial in trials]
    assert len(trials) > 15 and errors == sorted(errors) and {t.sampler for t in trials} >= {"dpm++", "unipc", "ddim", "euler"}
    many = tune(pipe, ["a red circle"], 12, 2.0)
    assert many[0].error < trials[0].error, "more steps come nearer"
    assert pipe.scheduler is not trials[0].scheduler and _draw(pipe, ["a red circle"], 2, 1.0).shape == (1, 16, 16, 3)


def test_in_place_the_card_keeps_its_facts(run):
    before = (run / "pipeline" / "README.md").read_text()
    trials, folder = api.tune(run, steps=2, prompts=["a red circle"])
    after = (folder / "README.md").read_text()
    assert folder == run / "pipeline" and trials[0].scheduler.__class__.__name__ in (folder / "model_index.json").read_text()
    assert before.split("## How it was trained")[1] == after.split("## How it was trained")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "openmoji"], "--out"),
        (["--model", "somebody/model"], "on the Hub"),
        (["--model", "{run}", "--steps", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_is_told(run, capsys, arguments, said):
    assert cli(["tune", *(each.format(run=run) for each in arguments)]) == 2
    assert said in capsys.readouterr().err
