"""The shared folder in other people's environments: diffusers 0.35 with transformers 4.57, and ONNX by way of optimum."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tiny
import torch
from loopback_hub import Hub
from stock_process import NO_SFUMATO
from test_hub import LOAD, run

from sfumato.pipelines import export_pipeline

pytestmark = pytest.mark.slow
OLD = ("diffusers==0.35.2", "transformers==4.57.1", "huggingface_hub==0.36.2", "tokenizers==0.22.1", "requests")
ONNX = ("optimum==2.3.0", "optimum-onnx==0.1.0", "onnx", "onnxruntime", "protobuf", "flatbuffers", "sympy", "ml_dtypes")

DRAW_ONNX = """
    import sys, numpy as np, torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline
    pipe = ORTStableDiffusionPipeline.from_pretrained(sys.argv[1], export=True)
    np.save(sys.argv[2], pipe("a red circle", guidance_scale=3.0, num_inference_steps=3, output_type="np",
                              generator=torch.Generator().manual_seed(0)).images)
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A folder of old packages, which PYTHONPATH puts before the installed ones."""
    folder = tmp_path_factory.mktemp("old")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLD, *ONNX]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"needs a package index: {done.stderr[-200:]}")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny.pipeline(folder)
    export_pipeline(pipe, folder / "model")
    generator = torch.Generator().manual_seed(0)
    images = pipe("a red circle", guidance_scale=3.0, num_inference_steps=3, output_type="np", generator=generator).images
    return folder / "model", images


def run_child(code, *arguments, **more):
    """Run code without sfumato in a process of its own, with `more` in its environment."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
    child = subprocess.run(
        [sys.executable, "-c", NO_SFUMATO + textwrap.dedent(code), *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    return child


def test_old_diffusers_and_transformers_draw_the_same_image(old, model, tmp_path):
    folder, expected = model
    with Hub() as hub:
        run(hub, tmp_path / "writer", "push", folder, "tiny")
        doors = [
            (name, "ada/tiny", {}) for name in ("DiffusionPipeline", "StableDiffusionPipeline", "AutoPipelineForText2Image")
        ]
        env = {"PYTHONPATH": str(old), **hub.env(tmp_path / "reader", None)}
        said = run_child(LOAD, tmp_path / "stock", json.dumps(doors), **env).stderr
        code = {"custom_pipeline": "ada/tiny", "trust_remote_code": True}
        run_child(LOAD, tmp_path / "ours", json.dumps([("DiffusionPipeline", "ada/tiny", code)]), **env)
    for trouble in ("newly initialized", "not expected", "Expected types"):
        assert trouble not in said
    images = {**np.load(tmp_path / "stock.npz"), **np.load(tmp_path / "ours.npz")}
    assert {name.split()[1] for name in images} == {"StableDiffusionPipeline", "SfumatoPipeline"}
    for name, got in images.items():
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)


def test_onnx_draws_the_same_image(old, model, tmp_path):
    folder, expected = model
    run_child(DRAW_ONNX, folder, tmp_path / "images.npy", PYTHONPATH=str(old))
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, atol=1e-3)
