"""The model that comes along: small, stock, measured, and it draws what it is asked for."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from stock_process import run_stock

from sfumato import cli
from sfumato.pipelines.locate import PACKAGED
from sfumato.registries import SOURCES

MODELS = Path(__file__).parent.parent / "models"


def test_there_are_those_that_the_package_names_and_they_are_small():
    assert sorted(PACKAGED) == sorted(path.name for path in MODELS.iterdir() if path.is_dir())
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert sum(path.stat().st_size for path in files if "openmoji_128" in str(path)) < 25e6
    assert sum(path.stat().st_size for path in files) < 40e6


@pytest.mark.parametrize("name", PACKAGED)
def test_its_card_tells_figures_licence_and_protocol(name):
    folder = MODELS / name
    card, told = ModelCard.load(folder / "README.md"), json.loads((folder / "evaluation.json").read_text())
    assert card.data.license == "cc-by-sa-4.0" and SOURCES["openmoji"].attribution in card.text
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert {"FD", "KID", "retrieval at 1, training captions"} <= set(figures)
    assert any(re.fullmatch("nearest training (image|picture), features", name) for name in figures)
    for figure, value in figures.items():
        assert abs(value - told["scores"][figure]["value"]) < 1e-4, figure
    assert told["protocol"] in card.text and (folder / "memorisation.png").is_file()


def test_sample_draws_by_it_by_default(tmp_path):
    assert cli.main(["sample", "red heart", "--each", str(tmp_path), "--out", str(tmp_path / "grid.png")]) == 0
    pixels = np.asarray(Image.open(tmp_path / "00000.png").convert("RGB")).astype(int)
    assert pixels.shape == (128, 128, 3)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 130) & (pixels[..., 2] < 130)
    assert 0.15 < red.mean() < 0.7, "a red heart has a lot of red, and white around it"
    assert (pixels[0].min(-1) > 200).mean() > 0.8


@pytest.mark.parametrize("name, side", [("openmoji", 32), ("openmoji_128", 128), ("openmoji_128_few", 128)])
def test_stock_diffusers_opens_it_without_sfumato(name, side):
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(MODELS / name)!r})
image = pipe("pizza", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
print(type(pipe).__name__, image.size)
"""
    done = run_stock(code)
    assert f"StableDiffusionPipeline ({side}, {side})" in done.stdout
