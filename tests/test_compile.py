"""The whole loss, noise and text encoder with it, is one graph for torch.compile."""

import pytest
import tiny
import torch

from sfumato.training.config.load import load_config
from sfumato.training.data.loader import batches
from sfumato.training.data.prepare import prepare

KINDS = {
    "hybrid loss": {"scheduler": {"variance_type": "learned_range", "prediction_type": "epsilon"}},
    "self-conditioning": {"objective": {"self_conditioning": True, "noise_candidates": 2, "offset_noise": 0.1}},
    "upscaling": {"task": "upscaling"},
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "hybrid loss" else pytest.mark.slow) for k in KINDS])
def test_the_loss_has_no_graph_break(tmp_path, kind):
    config = load_config(tiny.config_file(tmp_path, **KINDS[kind]))
    images = prepare(config.data)
    task = tiny.task(config, images)
    batch = {**next(batches(task.data, config)), "t": torch.tensor([3, 20, 500, 700])}
    expected = task._losses(task.module, batch)
    torch._dynamo.reset()
    compiled = torch.compile(task._losses, backend="eager", fullgraph=True)  # which fails at a break
    torch.testing.assert_close(compiled(task.module, batch), expected)
