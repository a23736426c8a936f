"""The golden loss curve: a change that should not move numbers moves none. `python tests/test_golden.py` remakes it."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import tiny

from sfumato.training.train import main

CURVE = Path(__file__).parent / "golden_losses.txt"


def losses(folder: Path) -> list[float]:
    """Losses of thirty steps of the tiny model with everything on that a run usually has."""
    path = tiny.config_file(
        folder,
        train={"max_steps": 30, "gradient_accumulation_steps": 2},
        objective={"timesteps": "normal", "weight": "min_snr", "min_snr_floor": 0.2},
        checkpoint={"every_steps": None},
        validation={"num_judged": 1},
    )
    assert main([str(path)]) == 0
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_curve_is_the_golden_one(tmp_path):
    """To a tolerance that another processor's rounding stays within, and no change of the method does."""
    golden = [float(line) for line in CURVE.read_text().splitlines()]
    np.testing.assert_allclose(losses(tmp_path), golden, rtol=2e-3)


if __name__ == "__main__":
    CURVE.write_text("".join(f"{loss:.6g}\n" for loss in losses(Path(tempfile.mkdtemp()))))
    print(CURVE.read_text(), file=sys.stderr)
