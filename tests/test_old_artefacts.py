"""What version 0.1.0 left is still good: its runs resume, its folders open, its drawings come out as they were."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.training.train import main

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
import make  # noqa: E402

VERSION = FIXTURES / "v0.1.0"
EXACT = json.loads((VERSION / "exact.json").read_text())


@pytest.mark.filterwarnings("ignore::UserWarning")  # settings without effect, and data that are prepared anew
@pytest.mark.parametrize("name", list(make.CASES))
def test_a_run_of_0_1_0_is_drawn_and_resumed_as_by_0_1_0(tmp_path, monkeypatch, name):
    """Bit for bit on the kinds of processor that `exact.json` knows, to rounding on others."""
    monkeypatch.chdir(make.unpack(VERSION, name, tmp_path))
    torch.set_num_threads(1)
    expected, run = json.loads(Path("expected.json").read_text()), Path("run")
    np.testing.assert_allclose(make.drawing(run), np.load("drawing.npy"), atol=1e-4)
    assert main(["config.yaml"]) == 0
    np.testing.assert_allclose(make.losses(run), expected["losses"], rtol=1e-3)
    np.testing.assert_allclose(make.drawing(run), np.load("drawing-whole.npy"), atol=2e-3)
    if make.machine() in EXACT:
        exact = EXACT[make.machine()][name]
        assert make.losses(run) == exact["losses"]
        assert make.weights_hash(run) == exact["weights"]
