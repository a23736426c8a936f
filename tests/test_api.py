"""The Python interface, as a notebook uses it."""

import numpy as np
import pytest
import tiny
from PIL import Image

from sfumato import api


def test_from_config_to_model(tmp_path):
    """`api.evaluate` is what the command calls: see tests/test_quality.py."""
    config = api.load_config(tiny.config_file(tmp_path), ["train.max_steps=2", "checkpoint.every_steps=null"])
    images = api.prepare_data(config.data)
    assert len(images.select("train")) == 64 and images.image(0).shape == (16, 16, 3)
    pipe = api.build_pipeline(config, images.training_captions())
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (16, 16)
    findings = api.doctor(config)
    assert {finding.severity for finding in findings} <= {"fine", "note", "warning"}
    assert api.train(config) == 0
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_errors_are_raised_not_printed(tmp_path):
    with pytest.raises(ValueError, match="train.batch_size=0: must be from 1"):
        api.load_config(tiny.config_file(tmp_path), ["train.batch_size=0"])
    with pytest.raises(ValueError, match="--images must be at least 2"):
        api.evaluate("openmoji", images=1, out=str(tmp_path / "out"))
    with pytest.raises(TypeError):
        api.evaluate("openmoji", no_such_option=1)


def test_an_image_is_read_as_training_reads_it(tmp_path):
    Image.new("RGBA", (8, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    notes = set()
    image = api.read_image(tmp_path / "clear.png", (8, 8), notes=notes)
    assert image.shape == (8, 8, 3) and (image == 255).all() and notes == {"converted from RGBA"}
    assert np.array_equal(api.read_image((tmp_path / "clear.png").read_bytes(), (8, 8)), image)
    with pytest.raises(ValueError, match="not an image"):
        api.read_image(b"nothing", (8, 8))
