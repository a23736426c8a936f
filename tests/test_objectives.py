"""Noise-level sampling, weights and learning rate against their formulas."""

import pytest
import torch

from sfumato.schedulers import SfumatoDDPMScheduler
from sfumato.training.objectives import loss_weight, lr_scale, sample_timesteps, weighted_mse

SNR = SfumatoDDPMScheduler(beta_schedule="cosine").snr(torch.arange(1000))
U = (torch.arange(100_000) + 0.5) / 100_000


def test_uniform_timesteps_are_uniform():
    t = sample_timesteps(U, SNR, "uniform")
    assert torch.equal(torch.bincount(t), torch.full((1000,), 100))


@pytest.mark.parametrize("mean, std", [(0.0, 2.0), (-2.5, 1.5)])
def test_normal_timesteps_have_normal_log_snr(mean, std):
    log_snr = SNR[sample_timesteps(U, SNR, "normal", mean, std)].log()
    assert log_snr.mean().item() == pytest.approx(mean, abs=0.05)
    assert log_snr.std().item() == pytest.approx(std, rel=0.05)


def test_every_timestep_drawn_exists_even_at_zero_snr():
    snr = SfumatoDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").snr(torch.arange(1000))
    for kind in ("uniform", "normal"):
        t = sample_timesteps(torch.tensor([0.0, 0.5, 1 - 1e-7]), snr, kind, -30.0, 5.0)
        assert (t >= 0).all() and (t < 1000).all()


def test_min_snr_is_the_same_loss_on_x_0_whatever_is_predicted():
    """Hang et al. 2023: a fixed error on x_0 weighs min(SNR, 5), whichever prediction it is written in."""
    scheduler = SfumatoDDPMScheduler(beta_schedule="cosine")
    generator = torch.Generator().manual_seed(0)
    x_0, guess, noise = torch.randn(3, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([100, 300, 500, 700, 900])
    x_t, snr = scheduler.add_noise(x_0, noise, t), SNR[t]
    for kind in ("epsilon", "sample", "v_prediction"):
        error = scheduler.convert(guess - x_0 + x_0, x_t, t, "sample", kind) - scheduler.convert(x_0, x_t, t, "sample", kind)
        got = loss_weight(snr, kind, "min_snr", 5.0) * error.square().mean((1, 2, 3))
        torch.testing.assert_close(got, snr.clamp(max=5) * (guess - x_0).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-6)
    assert torch.isfinite(loss_weight(torch.zeros(1), "v_prediction", "min_snr")).all()


def test_weighted_mse_is_a_mean_over_samples():
    prediction, target = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert weighted_mse(prediction, target, torch.tensor([1.0, 3.0])).item() == 2


def test_learning_rate_warms_up_then_follows_the_fraction_done():
    assert lr_scale(0, 0.0, 9, "cosine") == pytest.approx(0.1)
    assert lr_scale(100, 0.0, 9, "linear") == 1
    assert lr_scale(100, 0.25, 9, "linear") == pytest.approx(0.75)
    assert lr_scale(100, 0.5, 9, "cosine") == pytest.approx(0.5)
    assert lr_scale(100, 1.0, 9, "cosine") == pytest.approx(0, abs=1e-6)
    assert lr_scale(100, 0.9, 0, "constant") == 1
