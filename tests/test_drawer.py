"""A model that stays warm: engines kept on disk, and pictures that follow what is typed."""

import time

import numpy as np
import pytest
import tiny
import torch

from sfumato import api
from sfumato.pipelines import runtimes
from sfumato.pipelines.export import export_pipeline


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A tiny model in a folder; engines are kept beside it."""
    monkeypatch.setattr(runtimes, "ENGINES", str(tmp_path / "engines"))
    export_pipeline(tiny.pipeline(tmp_path), tmp_path / "model")
    return str(tmp_path / "model")


def test_engines_are_kept_and_made_again_where_they_must_be(model, tmp_path):
    def draw():
        drawer = api.drawer(model, num_inference_steps=2, guidance_scale=1.0)
        return np.asarray(drawer.draw("a red circle", seed=3)), drawer.pipe

    first, pipe = draw()
    files = list((tmp_path / "engines").glob("*.engine"))
    assert len(files) == 1
    made = files[0].stat().st_mtime_ns
    second, _ = draw()
    assert np.array_equal(first, second) and files[0].stat().st_mtime_ns == made, "read, not made again"
    files[0].write_bytes(files[0].read_bytes()[:1000])
    third, _ = draw()
    assert np.array_equal(first, third) and len(files[0].read_bytes()) > 1000, "a torn one is made again"
    with torch.no_grad():
        pipe.unet.unet.conv_out.bias.add_(0.5)
    changed = np.asarray(pipe("a red circle", num_inference_steps=2, guidance_scale=1.0).images[0])
    assert len(list((tmp_path / "engines").glob("*.engine"))) == 2 and not np.array_equal(changed, first)


def test_a_cache_that_cannot_be_written_costs_nothing_else(model, tmp_path):
    (tmp_path / "engines").write_text("a file where a folder should be")
    assert api.drawer(model, num_inference_steps=1).draw("a red circle").size == (16, 16)


def test_it_follows_what_is_typed_and_passes_over_what_is_old(model):
    drawer = api.drawer(model, runtime="torch", num_inference_steps=2)
    texts = ["a", "a r", "a re", "a red", "a red circle"]
    drawn = list(drawer.follow(texts))
    assert 1 <= len(drawn) <= len(texts) and drawn[-1][0] == "a red circle"
    assert np.array_equal(np.asarray(drawn[-1][1]), np.asarray(drawer.draw("a red circle")))

    def slowly():
        for text in texts[-2:]:
            yield text
            time.sleep(1)

    assert [prompt for prompt, _ in drawer.follow(slowly())] == texts[-2:], "with time enough each is drawn"
    assert list(drawer.follow([])) == []
