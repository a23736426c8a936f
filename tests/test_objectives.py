"""Noise-level sampling, weights and learning rate against their formulas."""

import json
import math

import pytest
import tiny
import torch
from diffusers import DDPMScheduler

from sfumato.schedulers import SfumatoDDPMScheduler, SfumatoFlowScheduler
from sfumato.training.config.load import load_config
from sfumato.training.data.loader import batches
from sfumato.training.objectives import (
    LossMoments,
    add_offset,
    loss_weight,
    lr_scale,
    nearest_noise,
    sample_timesteps,
    weighted_mse,
)

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


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_log_snr_has_the_quantiles_of_its_distribution_cut_to_the_schedule(kind):
    from scipy import stats

    mean, std = -1.0, 2.0
    whole = {"normal": stats.norm(mean, std), "laplace": stats.laplace(mean, std / 2**0.5)}[kind]
    ends = SNR.log()
    low, high = whole.cdf(ends[-1]), whole.cdf(ends[0])
    p = torch.linspace(0.02, 0.98, 25)
    got = SNR[sample_timesteps(p, SNR, kind, mean, std)].log()
    torch.testing.assert_close(got, torch.tensor(whole.ppf(low + (high - low) * p.numpy())).float(), atol=0.06, rtol=0)


def test_normal_log_snr_is_the_logit_normal_of_flow_matching():
    """Esser et al. 2024: sigma = sigmoid(N(m, s)), whose log-SNR is -2 N(m, s)."""
    scheduler, m, s = SfumatoFlowScheduler(), 0.3, 0.8
    t = sample_timesteps(U, scheduler.snr(scheduler.training_levels()), "normal", -2 * m, 2 * s)
    z = torch.logit(t[(t > 0) & (t < 1000)] / 1000)
    assert z.mean().item() == pytest.approx(m, abs=0.01) and z.std().item() == pytest.approx(s, rel=0.01)


def test_every_timestep_drawn_exists_even_at_zero_snr():
    snr = SfumatoDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").snr(torch.arange(1000))
    for kind in ("uniform", "normal", "laplace"):
        t = sample_timesteps(torch.tensor([0.0, 0.5, 1 - 1e-7]), snr, kind, -30.0, 5.0)
        assert (t >= 0).all() and (t < 1000).all()


ON_X_0 = {
    "min_snr": lambda snr: snr.clamp(max=5),
    "soft_min_snr": lambda snr: snr * 5 / (snr + 5),
    "p2": lambda snr: snr / (1 + snr),
    "edm": lambda snr: snr + 4,
    "debiased": lambda snr: snr.sqrt(),
}


@pytest.mark.parametrize("weight", ON_X_0)
def test_a_weight_is_the_same_loss_on_x_0_whatever_is_predicted(weight):
    """A fixed error on x_0 weighs the same, whichever prediction it is written in; min-SNR: min(SNR, 5)."""
    scheduler = SfumatoDDPMScheduler(beta_schedule="cosine")
    generator = torch.Generator().manual_seed(0)
    x_0, guess, noise = torch.randn(3, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([100, 300, 500, 700, 900])
    x_t, snr = scheduler.add_noise(x_0, noise, t), SNR[t]
    expected = ON_X_0[weight](snr) * (guess - x_0).square().mean((1, 2, 3))
    for kind in ("epsilon", "sample", "v_prediction"):
        error = scheduler.convert(guess, x_t, t, "sample", kind) - scheduler.convert(x_0, x_t, t, "sample", kind)
        got = loss_weight(snr, kind, weight, gamma=5.0) * error.square().mean((1, 2, 3))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    assert torch.isfinite(loss_weight(torch.tensor([0.0, torch.inf]), "v_prediction", weight)).all()


def test_a_weight_on_the_velocity_of_flow_matching_is_the_same_loss_on_x_0():
    scheduler = SfumatoFlowScheduler()
    x_0, guess, noise = torch.randn(3, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([100, 300, 500, 700, 900])
    x_t, snr = scheduler.add_noise(x_0, noise, t), scheduler.snr(t)
    sigma = (t / 1000).reshape(-1, 1, 1, 1)
    error = (x_t - guess) / sigma - scheduler.training_target(x_0, noise, t)
    torch.testing.assert_close(scheduler.denoised((x_t - guess) / sigma, x_t, t), guess)
    for weight, on_x_0 in ON_X_0.items():
        got = loss_weight(snr, "flow_prediction", weight) * error.square().mean((1, 2, 3))
        torch.testing.assert_close(got, on_x_0(snr) * (guess - x_0).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-6)


def test_weighted_mse_is_of_each_sample():
    prediction, target = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert weighted_mse(prediction, target, torch.tensor([1.0, 3.0])).tolist() == [1, 3]


def test_importance_sampling_leaves_the_expected_loss_and_has_less_variance():
    """Losses that differ a lot by noise level: the mean is kept, its spread shrinks (Nichol and Dhariwal 2021, eq. 18)."""
    generator = torch.Generator().manual_seed(0)
    loss = lambda u: 100 * torch.exp(-12 * u)  # noqa: E731
    moments = LossMoments()
    assert torch.equal(moments.density(), torch.ones(64, dtype=torch.float64))
    for _ in range(200):
        u, _ = moments.warp(torch.rand(64, generator=generator))
        moments.update(u, loss(u))
    density = moments.density()
    assert density.mean().item() == pytest.approx(1) and density[0] > 4 and density[-1] < 0.05
    u = torch.rand(100_000, generator=generator)
    warped, share = moments.warp(u)
    plain, weighted = loss(u), share * loss(warped)
    assert (warped >= 0).all() and (warped < 1).all()
    assert weighted.mean().item() == pytest.approx(100 / 12, rel=0.02)
    assert weighted.std() < 0.3 * plain.std()
    again = LossMoments()
    again.restore(json.loads(json.dumps(moments.state())))
    assert torch.equal(again.density(), density)


def test_offset_noise_moves_whole_channels():
    noise, draws = torch.randn(2, 3, 8, 8), torch.randn(2, 3)
    moved = add_offset(noise, 0.1, draws) - noise
    torch.testing.assert_close(moved, 0.1 * draws[..., None, None].expand(-1, -1, 8, 8))


def test_nearest_noise_is_nearer_and_still_noise():
    generator = torch.Generator().manual_seed(0)
    x_0, candidates = torch.randn(256, 3, 4, 4, generator=generator), torch.randn(256, 8, 3, 4, 4, generator=generator)
    chosen = nearest_noise(x_0, candidates)
    apart = (candidates - x_0[:, None]).flatten(2).norm(dim=-1)
    torch.testing.assert_close((chosen - x_0).flatten(1).norm(dim=-1), apart.min(1).values)
    assert abs(chosen.mean().item()) < 0.03 and 0.9 < chosen.std().item() < 1.02


def test_learning_rate_warms_up_then_follows_the_fraction_done():
    assert lr_scale(0, 0.0, 9, "cosine") == pytest.approx(0.1)
    assert lr_scale(100, 0.0, 9, "linear") == 1
    assert lr_scale(100, 0.25, 9, "linear") == pytest.approx(0.75)
    assert lr_scale(100, 0.5, 9, "cosine") == pytest.approx(0.5)
    assert lr_scale(100, 1.0, 9, "cosine") == pytest.approx(0, abs=1e-6)
    assert lr_scale(100, 0.9, 0, "constant") == 1
    assert lr_scale(100, 0.7, 9, "trapezoid") == 1 and lr_scale(100, 0.9, 9, "trapezoid") == pytest.approx(0.5)
    assert lr_scale(0, 0.0, 9, "trapezoid") == pytest.approx(0.1) and lr_scale(100, 1.0, 9, "trapezoid") == 0


def test_with_noise_for_the_empty_caption_guidance_raises_the_density_to_a_power():
    """v is zero for pure noise, so guidance by s multiplies v by s, whose score is s grad log p - (s - 1) grad log N(0, 1)."""
    scheduler = SfumatoDDPMScheduler(beta_schedule="cosine", prediction_type="v_prediction")
    mean = 0.7
    deviation = 0.3
    scale = 2.5
    x_t = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([1, 50, 200, 500, 800, 990])
    signal, noise = scheduler.signal_and_noise(t, x_t)
    variance = (signal * deviation) ** 2 + noise**2
    x_0 = mean + signal * deviation**2 / variance * (x_t - signal * mean)  # the best estimate for N(mean, deviation^2)
    guided = scheduler.convert(
        scale * scheduler.convert(x_0, x_t, t, "sample", "v_prediction"), x_t, t, "v_prediction", "sample"
    )
    score = (signal * guided - x_t) / noise**2
    torch.testing.assert_close(score, -scale * (x_t - signal * mean) / variance + (scale - 1) * x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale, least, most", [(1.0, 0.78, 0.82), (1.5, 0.86, 0.96), (2.0, 0.9, 0.99)])
def test_guidance_away_from_noise_draws_what_is_likelier(scale, least, most):
    """Of two values, one of them in 80% of the data: the stock sampler draws it more often, and no other values."""
    scheduler = DDPMScheduler.from_config(SfumatoDDPMScheduler(beta_schedule="cosine", prediction_type="v_prediction").config)
    scheduler.register_to_config(thresholding=False, clip_sample=False)
    scheduler.set_timesteps(50)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=rng, dtype=torch.float64)
    for t in scheduler.timesteps:
        abar = scheduler.alphas_cumprod[t].double()
        odds = math.log(0.8 / 0.2) + 2 * abar.sqrt() * x / (1 - abar)
        v = (abar.sqrt() * x - torch.tanh(odds / 2)) / (1 - abar).sqrt()  # of E[x_0 | x_t], by its definition
        x = scheduler.step(scale * v, int(t), x, generator=rng).prev_sample
    assert least <= (x > 0).double().mean() <= most
    assert ((x.abs() - 1).abs() < 0.1).double().mean() > 0.99


def test_dropped_captions_go_with_noise(tmp_path):
    config = load_config(
        tiny.config_file(tmp_path, objective={"empty_caption": "noise", "caption_dropout": 0.5}, train={"batch_size": 64})
    )
    task = tiny.task(config)
    batch, seen = next(batches(task.data, config)), []
    predict = task.predict
    task.predict = lambda model, x_t, *rest: (seen.append(x_t), predict(model, x_t, *rest))[1]
    task._losses(task.module, {**batch, "t": torch.zeros(64, dtype=torch.long)})  # of next to no noise
    is_empty = batch["is_empty"]
    error = (seen[0] - batch["pixel_values"]).square().mean((1, 2, 3)).sqrt()
    assert 10 < is_empty.sum() < 54
    assert (error[~is_empty] < 0.1).all() and (error[is_empty] > 0.5).all()
    assert abs(seen[0][is_empty].mean()) < 0.05 and abs(seen[0][is_empty].std() - 1) < 0.05
    batch["t"] = torch.full((64,), 500)
    noise = task.noise(batch["sample_key"], batch["pixel_values"])
    x_0, noise = task.with_noise_alone(batch["pixel_values"], noise, batch)
    v = task.pipe.scheduler.training_target(x_0, noise, batch["t"])
    assert v[is_empty].abs().max() < 1e-6 < v[~is_empty].abs().max()
    assert not task.pipe.scheduler.config.thresholding  # what guidance asks for lies beyond what is clipped
    with pytest.raises(ValueError, match="caption_dropout=0.0: must be above 0"):
        load_config(tiny.config_file(tmp_path, objective={"empty_caption": "noise", "caption_dropout": 0.0}))
    with pytest.raises(ValueError, match="empty_caption"):
        load_config(tiny.config_file(tmp_path, objective={"empty_caption": "noise", "self_conditioning": True}))
    tuned = tiny.config_file(tmp_path, objective={"empty_caption": "noise"}, init_from="openmoji")
    tuned = load_config(tuned, ["unet={}", "scheduler={}", "data.resolution=32"])
    assert not tiny.task(tuned).pipe.scheduler.config.thresholding
