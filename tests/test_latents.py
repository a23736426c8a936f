"""What frozen models make of the data is computed once, is what they would say again, and trains the same."""

import json
import os
import signal
import time

import crashes
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL

from sfumato.training.data import cached
from sfumato.training.data.prepare import prepare
from sfumato.training.models import latent_space
from sfumato.training.train import main


@pytest.fixture
def base(tmp_path):
    """A text encoder, tokenizer and a VAE that is not the identity."""
    pipe = tiny.pipeline(tmp_path)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    pipe.register_modules(vae=vae)
    pipe.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def latent_config(folder, base, **data):
    return tiny.config_file(
        folder, vae={"pretrained": str(base)}, text_encoder={"pretrained": str(base)}, data=data, validation={"num_judged": 1}
    )


@pytest.mark.filterwarnings("ignore:.*captions are longer", "ignore:.*has no effect")
def test_cached_training_equals_uncached(tmp_path, base):
    losses = []
    for keep in (False, True):
        folder = tmp_path / str(keep)
        folder.mkdir()
        path = latent_config(folder, base, num_pictures=40, cache_latents=keep, cache_embeddings=keep)
        assert main([str(path)]) == 0
        losses.append([json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_keys_follow_the_content(tmp_path, base):
    config = tiny.load_config(latent_config(tmp_path, base, num_pictures=4)).data
    images = prepare(config)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    first = cached.cached_latents(images, vae, tmp_path / "kept")
    assert first.shape == (260, 4, 8, 8)
    expected = latent_space.encode(vae, latent_space.to_pixel_values(images.image(3)[None]))[0]
    np.testing.assert_allclose(first[3], expected.numpy(), atol=1e-5)
    cached.cached_latents(images, vae, tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("latents-*.npy"))) == 1
    with torch.no_grad():
        vae.encoder.conv_in.bias += 1
    cached.cached_latents(images, vae, tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("latents-*.npy"))) == 2


def squares(log, die_after=None):
    """Computes the squares of some numbers and notes which; ends the process after so many batches."""
    done = []

    def compute(numbers):
        if die_after is not None and len(done) > die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        done.append(numbers)
        with open(log, "a") as file:
            file.write(f"{numbers.start} {numbers.stop}\n")
        return np.array(numbers)[:, None] ** 2

    return compute


def noted(log) -> list[str]:
    """The batches that were computed."""
    return log.read_text().splitlines()


def test_processes_share_what_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "BATCHES_A_PART", 2)
    path, logs = tmp_path / "squares.npy", [tmp_path / "a", tmp_path / "b"]
    work = [lambda log=log: cached.cached_array(path, 77, squares(log), "squares", 4) is None for log in logs]
    assert crashes.wait([crashes.fork(each, quiet=False) for each in work]) == [0, 0]
    assert (np.load(path)[:, 0] == np.arange(77) ** 2).all()
    parts = [noted(log) for log in logs]
    assert all(len(part) > 4 for part in parts)
    assert sorted(sum(parts, [])) == sorted(f"{start} {min(start + 4, 77)}" for start in range(0, 77, 4))
    assert sorted(left.name for left in tmp_path.iterdir()) == ["a", "b", "squares.npy", "squares.npy.lock"]


def test_what_was_computed_before_a_crash_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "BATCHES_A_PART", 2)
    path, first, second = (tmp_path / name for name in ("squares.npy", "first", "second"))
    killed = crashes.fork(lambda: cached.cached_array(path, 40, squares(first, die_after=4), "squares", 4) is None)
    assert crashes.wait([killed]) == [-signal.SIGKILL] and not path.exists()
    assert (cached.cached_array(path, 40, squares(second), "squares", 4)[:, 0] == np.arange(40) ** 2).all()
    assert noted(first) == [f"{start} {start + 4}" for start in range(0, 20, 4)] and noted(second)[0] == "16 20"


def test_what_cannot_be_cached_is_told(tmp_path, capsys):
    path = str(tiny.config_file(tmp_path))
    assert main([path, "data.cache_latents=true"]) == 2
    assert "a pixel model has no latents" in capsys.readouterr().err
    assert main([path, "data.cache_embeddings=true"]) == 2
    assert "frozen text encoder" in capsys.readouterr().err
