"""Averages of any length, made afterwards."""

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sfumato.cli import main as cli
from sfumato.pipelines import SfumatoPipeline
from sfumato.training.engine.ema import EMA, TRACKS, coefficients, exponent_of, overlap, post_hoc
from sfumato.training.train import main


def test_the_exponent_gives_the_profile_its_standard_deviation():
    for length in (0.02, 0.05, 0.1, 0.2):
        gamma = exponent_of(length)
        tau = np.linspace(0, 1, 200_001)
        profile = (gamma + 1) * tau**gamma / len(tau)
        centre = (profile * tau).sum()
        assert ((profile * (tau - centre) ** 2).sum()) ** 0.5 == pytest.approx(length, rel=1e-3)


def test_overlaps_are_the_integrals():
    for a, b in (((100, 6.9), (70, 16.9)), ((50, 2.0), (50, 6.9)), ((10, 16.9), (100, 6.9))):
        tau = np.linspace(0, 100, 1_000_001)
        profile = [np.where(tau <= t, (g + 1) * tau**g / t ** (g + 1), 0) for t, g in (a, b)]
        assert overlap(*a, *b) == pytest.approx((profile[0] * profile[1]).mean() * 100, rel=1e-3)


def trajectory(steps, size=50, seed=0):
    """Weights that wander towards somewhere, as those of a run do."""
    rng, x = np.random.default_rng(seed), np.zeros(size)
    for _ in range(steps):
        x = x + 0.02 * (1 - x) + 0.05 * rng.normal(size=size)
        yield torch.tensor(x)


def test_an_average_made_afterwards_is_that_kept_along(tmp_path):
    """Karras et al. 2024: from two tracks, kept 40 times, the average of any length; against one kept at every step."""
    steps, lengths = 2000, (0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
    parameter = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    ema, direct = EMA([parameter], 0.99, post_hoc=True), {length: torch.zeros(50, dtype=torch.float64) for length in lengths}
    for step, value in enumerate(trajectory(steps), 1):
        parameter.data.copy_(value)
        ema.step([parameter])
        for length, average in direct.items():
            average.lerp_(value, 1 - (1 - 1 / step) ** (exponent_of(length) + 1))
        if step % 50 == 0:
            rows = {f"{length}|w": track[0].clone() for length, track in zip(TRACKS, ema.tracks.values())}
            save_file(rows, tmp_path / f"step-{step:08d}.safetensors")
    last = parameter.data.float()
    for length, average in direct.items():
        made = post_hoc(tmp_path, length)["w"]
        apart = (made - average.float()).norm() / (last - average.float()).norm()
        assert apart < (1e-4 if length in TRACKS else 0.05), (length, apart)
    shares, missed = coefficients([(100, 6.9), (200, 6.9), (200, 16.9)], 200, 16.9)
    np.testing.assert_allclose(shares, [0, 0, 1], atol=1e-6)
    assert missed < 1e-5


def test_constant_weights_stay_whatever_the_snapshots():
    """The coefficients sum to 1, however few snapshots there are; what the profile misses is told."""
    for count, length in ((3, 0.15), (10, 0.25), (10, 0.02), (40, 0.1)):
        kept = [((i + 1) * 100 / count, exponent_of(s)) for i in range(count) for s in TRACKS]
        shares, missed = coefficients(kept, 100, exponent_of(length))
        assert shares.sum() == pytest.approx(1, abs=1e-9)
        assert missed < 0.01 if count == 40 else missed > 1e-4


@pytest.mark.parametrize("steps", [6])
def test_a_run_keeps_snapshots_and_another_length_is_exported(tmp_path, capsys, steps):
    path = tiny.config_file(tmp_path, ema={"snapshot_steps": 2}, optim={"lr": 1e-2, "lr_warmup_steps": 0})
    assert main([str(path)]) == 0
    names = [p.name for p in sorted((tmp_path / "run" / "ema").iterdir())]
    assert names == [f"step-0000000{i}.safetensors" for i in (2, 4, 6)]
    # Resumed in the middle, the snapshots are the same, and those of an older, longer run are gone.
    again = tmp_path / "again"
    again.mkdir()
    path = str(tiny.config_file(again, ema={"snapshot_steps": 2}, optim={"lr": 1e-2, "lr_warmup_steps": 0}))
    assert main([path, "train.max_steps=3", "optim.lr_decay=constant"]) == 0
    (again / "run" / "ema" / "step-00000008.safetensors").write_bytes(b"of a run that is no more")
    assert main([path, "checkpoint.resume=auto", "optim.lr_decay=constant"]) == 0
    assert not (again / "run" / "ema" / "step-00000008.safetensors").exists()
    straight = tmp_path / "straight"
    straight.mkdir()
    path = str(tiny.config_file(straight, ema={"snapshot_steps": 2}, optim={"lr": 1e-2, "lr_warmup_steps": 0}))
    assert main([path, "optim.lr_decay=constant"]) == 0
    a, b = (load_file(folder / "run" / "ema" / "step-00000006.safetensors") for folder in (again, straight))
    assert all(torch.equal(a[key], b[key]) for key in b)
    with pytest.warns(UserWarning, match="3 snapshots"):
        assert cli(["ema", str(tmp_path / "run"), str(tmp_path / "longer"), "--length", "0.2"]) == 0
    longer, plain = (SfumatoPipeline.from_pretrained(tmp_path / p) for p in ("longer", "run/pipeline"))
    card = (tmp_path / "longer" / "README.md").read_text()
    assert "averaged afterwards over 0.2 of the run" in card and "widget" not in card
    assert not list((tmp_path / "longer" / "samples").glob("[0-9]*.png")), "drawn by other weights"
    assert (longer.unet.conv_in.weight - plain.unet.conv_in.weight).abs().max() > 1e-5
    assert cli(["ema", str(tmp_path / "run"), str(tmp_path / "x"), "--length", "0.6"]) == 2
    assert "0.25" in capsys.readouterr().err
