"""What other programs take of ours: a node as ComfyUI calls it, and images of Docker whose commands exist."""

import importlib.util
import inspect
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from sfumato.cli import main

ROOT = Path(__file__).parents[1]


def node():
    path = ROOT / "integrations" / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("comfyui_node", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_node_draws_what_the_pipeline_draws(tmp_path):
    pipe = tiny.pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "model")
    assert (
        "sfumato"
        not in re.sub(r'""".*?"""', "", inspect.getsource(node()), flags=re.S).replace('"sfumato"', "").lower().split()
    )
    drawer = node().NODE_CLASS_MAPPINGS["SfumatoDraw"]
    asked = drawer.INPUT_TYPES()["required"]
    assert list(inspect.signature(drawer.draw).parameters)[1:] == list(asked)
    settings = {name: options["default"] for name, (_, options) in asked.items()}
    settings |= {
        "model": str(tmp_path / "model"),
        "prompt": "a red circle",
        "steps": 2,
        "batch_size": 2,
        "enlarge": 3,
        "seed": 5,
    }
    (images,) = getattr(drawer(), drawer.FUNCTION)(**settings)
    assert images.shape == (2, 48, 48, 3) and images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    generators = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]
    expected = pipe(["a red circle"] * 2, generator=generators, **call).images
    np.testing.assert_allclose(images[:, ::3, ::3].numpy(), expected, atol=1e-5)


def test_what_the_images_of_docker_install_and_call_exists(capsys):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in (ROOT / "integrations" / "docker").glob("*.Dockerfile"):
        text = path.read_text()
        (names,) = re.findall(r"\.\[([\w,]+)\]", text)
        assert set(names.split(",")) <= set(extras), path
        command = json.loads(re.findall(r"ENTRYPOINT (.+)", text)[0])[-1:] + json.loads(re.findall(r"CMD (.+)", text)[0])
        assert command[0] == "sfumato"
        with pytest.raises(SystemExit) as end:
            main([*command[1:], "--help"])
        assert end.value.code == 0 and "usage" in capsys.readouterr().out
