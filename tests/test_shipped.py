"""The model that comes along: small, stock, measured, and it draws what it is asked for."""

import json
from pathlib import Path

import numpy as np
from huggingface_hub import ModelCard
from PIL import Image
from stock_process import run_stock

from sfumato import cli
from sfumato.registries import SOURCES

FOLDER = Path(__file__).parent.parent / "models" / "openmoji"


def test_it_is_small_and_its_card_tells_figures_licence_and_protocol():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    card, told = ModelCard.load(FOLDER / "README.md"), json.loads((FOLDER / "evaluation.json").read_text())
    assert card.data.license == "cc-by-sa-4.0" and SOURCES["openmoji"].attribution in card.text
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    for name in ("FD", "KID", "retrieval at 1, training captions", "nearest training picture, features"):
        assert abs(figures[name] - told["scores"][name]["value"]) < 1e-4, name
    assert told["protocol"] in card.text and (FOLDER / "memorisation.png").is_file()


def test_sample_draws_by_it_by_default(tmp_path):
    assert cli.main(["sample", "red heart", "--each", str(tmp_path), "--out", str(tmp_path / "grid.png")]) == 0
    pixels = np.asarray(Image.open(tmp_path / "00000.png").convert("RGB")).astype(int)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 130) & (pixels[..., 2] < 130)
    assert 0.15 < red.mean() < 0.7, "a red heart has a lot of red, and white around it"
    assert (pixels[0].min(-1) > 200).mean() > 0.8


def test_stock_diffusers_opens_it_without_sfumato(tmp_path):
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(FOLDER)!r})
image = pipe("pizza", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
print(type(pipe).__name__, image.size)
"""
    done = run_stock(code)
    assert "StableDiffusionPipeline (32, 32)" in done.stdout
