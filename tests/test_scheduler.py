"""Theorems about noise levels, and equality with diffusers wherever both are defined."""

import diffusers
import numpy as np
import pytest
import torch

from sfumato.schedulers import SfumatoDDPMScheduler
from sfumato.schedulers.scheduling_sfumato_ddpm import SCHEDULES, STOCK_SCHEDULES, alpha_bar

SWAPS = ["DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "EulerDiscrete", "HeunDiscrete", "LCM"]
OURS = {"cosine": {}, "chen_sigmoid": {"tau": 0.7}, "hang_laplace": {"mu": 0.5}, "shifted_cosine": {"resolution": 256}}


def swap(name, config):
    return getattr(diffusers, f"{name}Scheduler").from_config(config)


def assert_same_schedule(a, b):
    # The last level of a zero-SNR schedule is 0 here and a guarded 2^-24 or 2e-5 in solvers that divide by it.
    torch.testing.assert_close(a.alphas_cumprod, b.alphas_cumprod, rtol=0, atol=3e-5)
    torch.testing.assert_close(a.alphas_cumprod[:-1], b.alphas_cumprod[:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", STOCK_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_stock_schedules_equal_stock_ddpm(schedule, zero_snr):
    arguments = {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    ours, stock = SfumatoDDPMScheduler(**arguments), diffusers.DDPMScheduler(**arguments)
    assert torch.equal(ours.betas, stock.betas)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [7, 50, 1000])
def test_every_step_equals_stock_ddpm(prediction_type, steps):
    arguments = {"prediction_type": prediction_type, "timestep_spacing": "trailing"}
    ours, stock = SfumatoDDPMScheduler(**arguments), diffusers.DDPMScheduler(**arguments)
    x_ours = x_stock = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps)
    for t in ours.timesteps:
        x_ours = ours.step(torch.tanh(x_ours), t, x_ours, generator=generators[0]).prev_sample
        x_stock = stock.step(torch.tanh(x_stock), t, x_stock, generator=generators[1]).prev_sample
    assert torch.equal(x_ours, x_stock)


def test_clipping_shortcut_equals_thresholding_at_one():
    arguments = {"prediction_type": "sample", "clip_sample": False, "thresholding": True, "sample_max_value": 1.0}
    x = 3 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    results = [
        cls(**arguments).step(x, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
        for cls in (SfumatoDDPMScheduler, diffusers.DDPMScheduler)
    ]
    assert torch.equal(*results)


def test_cosine_equals_stock_cosine():
    ours = SfumatoDDPMScheduler(beta_schedule="cosine")
    stock = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(ours.betas, stock.betas, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedules_fall_from_data_to_noise(schedule, zero_snr):
    scheduler = SfumatoDDPMScheduler(
        beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction", schedule_params=OURS[schedule]
    )
    abar = scheduler.alphas_cumprod
    assert (abar.diff() < 0).all() and abar[0] > 0.95 and 0 <= abar[-1] < 1e-2
    assert torch.isfinite(abar).all() and (scheduler.betas > 0).all()
    assert bool(abar[-1] == 0) == zero_snr


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_levels_are_the_continuous_ones(schedule):
    scheduler = SfumatoDDPMScheduler(beta_schedule=schedule, schedule_params=OURS[schedule])
    wanted = alpha_bar(schedule, np.arange(1, 1001) / 1000, **OURS[schedule])
    # Betas are capped at 0.999 at the very end only.
    np.testing.assert_allclose(scheduler.alphas_cumprod[:990], wanted[:990], rtol=1e-4, atol=1e-7)


def test_closed_forms_of_schedules():
    t = np.array([0.1, 0.5, 0.9])
    shift = np.log(alpha_bar("shifted_cosine", t, resolution=128) / (1 - alpha_bar("shifted_cosine", t, resolution=128)))
    plain = np.log(np.cos(np.pi * t / 2) ** 2 / np.sin(np.pi * t / 2) ** 2)
    np.testing.assert_allclose(shift - plain, 2 * np.log(64 / 128))
    laplace = alpha_bar("hang_laplace", t, mu=1.0, b=0.5)
    np.testing.assert_allclose(np.log(laplace / (1 - laplace)), [1 - 0.5 * np.log(0.2), 1.0, 1 + 0.5 * np.log(0.2)])
    np.testing.assert_allclose(alpha_bar("chen_sigmoid", np.array([0.0, 0.5, 1.0])), [1, 0.5, 0], atol=1e-12)


@pytest.mark.parametrize("schedule", [*SCHEDULES, *STOCK_SCHEDULES])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_keeps_the_trained_schedule(schedule, zero_snr, name, tmp_path):
    ours = SfumatoDDPMScheduler(
        beta_schedule=schedule,
        rescale_betas_zero_snr=zero_snr,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        schedule_params=OURS.get(schedule),
    )
    in_memory = swap(name, ours.config)
    ours.save_pretrained(tmp_path / "ours")
    through_disk = getattr(diffusers, f"{name}Scheduler").from_pretrained(tmp_path / "ours")
    in_memory.save_pretrained(tmp_path / "other")
    back = SfumatoDDPMScheduler.from_pretrained(tmp_path / "other")
    if zero_snr and name in ("DEISMultistep", "HeunDiscrete"):
        ours = SfumatoDDPMScheduler.from_config(ours.config, rescale_betas_zero_snr=False)  # they know no zero-SNR end
    for other in (in_memory, through_disk):
        assert_same_schedule(ours, other)
        assert other.config.prediction_type == "v_prediction"
        assert other.config.timestep_spacing == "trailing" or name == "LCM"
    assert torch.equal(back.betas, SfumatoDDPMScheduler.from_config(ours.config, rescale_betas_zero_snr=zero_snr).betas)
    assert back.config._sfumato == ours.config._sfumato
    assert "trained_betas" not in ours.config._use_default_values
    other = swap(name, ours.config)
    other.set_timesteps(4)
    x = torch.randn(1, 3, 4, 4) * other.init_noise_sigma
    for t in other.timesteps:
        x = other.step(0.1 * other.scale_model_input(x, t), t, x).prev_sample
    assert torch.isfinite(x).all()


def test_stored_config_is_known_to_stock_ddpm(tmp_path):
    ours = SfumatoDDPMScheduler(beta_schedule="chen_sigmoid", schedule_params={"tau": 0.5})
    diffusers.DDPMScheduler.from_config(ours.config).save_pretrained(tmp_path)
    stock = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(stock.betas, ours.betas)
    assert set(stock.config) - set(diffusers.DDPMScheduler().config) <= {"_sfumato", "_class_name", "_diffusers_version"}
    assert stock.config._sfumato == {
        "beta_schedule": "chen_sigmoid",
        "schedule_params": {"start": -3.0, "end": 3.0, "tau": 0.5},
    }


def test_closed_form_marginal_equals_the_markov_chain():
    """Ho et al. 2020, eq. 4: t steps of eq. 2 have the moments of one jump. 200,000 chains, four standard errors."""
    scheduler = SfumatoDDPMScheduler(num_train_timesteps=40, beta_schedule="cosine")
    generator, n, x_0, t = torch.Generator().manual_seed(0), 200_000, 0.7, 25
    x = torch.full((n,), x_0)
    for beta in scheduler.betas[: t + 1]:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(n, generator=generator)
    jump = scheduler.add_noise(torch.tensor([[x_0]]), torch.zeros(1, 1), torch.tensor([t])).item()
    variance = (1 - scheduler.alphas_cumprod[t]).item()
    assert abs(x.mean() - jump) < 4 * (variance / n) ** 0.5
    assert abs(x.var() - variance) < 4 * variance * (2 / n) ** 0.5


def test_posterior_variance_is_equation_7_and_not_the_misprint():
    scheduler = SfumatoDDPMScheduler(beta_schedule="linear")
    x = torch.zeros(999, 1, 1, 1)
    t = torch.arange(1, 1000)
    _, variance = scheduler.posterior(x, x, t - 1, t)
    abar, beta = scheduler.alphas_cumprod.double(), scheduler.betas.double()
    eq_7 = (1 - abar[t - 1]) / (1 - abar[t]) * beta[t]
    torch.testing.assert_close(variance.flatten().double(), eq_7, rtol=5e-3, atol=0)
    misprint = (1 - abar[t]) / (1 - abar[t])
    assert (variance.flatten() < 0.03 * misprint).all()


def test_posterior_is_bayes_rule_for_any_pair():
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): products of Gaussians, computed from scratch."""
    scheduler = SfumatoDDPMScheduler(beta_schedule="cosine")
    abar = scheduler.alphas_cumprod.double()
    x_0, x_t = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), -0.8)
    for s, t in [(10, 11), (100, 400), (3, 950), (700, 701)]:
        ratio = abar[t] / abar[s]
        precision = ratio / (1 - ratio) + 1 / (1 - abar[s])
        mean = (ratio.sqrt() / (1 - ratio) * -0.8 + abar[s].sqrt() / (1 - abar[s]) * 0.3) / precision
        got_mean, got_variance = scheduler.posterior(x_0, x_t, s, t)
        assert got_mean.item() == pytest.approx(mean.item(), rel=2e-3, abs=1e-5)
        assert got_variance.item() == pytest.approx(1 / precision.item(), rel=1e-3)
    mean, variance = scheduler.posterior(x_0, x_t, -1, 10)
    assert mean.item() == pytest.approx(0.3, abs=1e-4) and variance.item() == 0
    with pytest.raises(ValueError, match="s < t"):
        scheduler.posterior(x_0, x_t, 5, 5)


def test_step_draws_from_the_posterior():
    scheduler = SfumatoDDPMScheduler(beta_schedule="cosine", prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(20)
    s, t = scheduler.timesteps[8].item(), scheduler.timesteps[7].item()
    x_0, x_t = torch.randn(2, 100_000, 1, 1, generator=torch.Generator().manual_seed(0)).chunk(2)
    drawn = scheduler.step(x_0, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
    mean, variance = scheduler.posterior(x_0, x_t, s, t)
    assert (drawn - mean).var().item() == pytest.approx(variance.item(), rel=0.02)
    assert (drawn - mean).mean().abs() < 4 * (variance.item() / 100_000) ** 0.5


@pytest.mark.parametrize("source", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
def test_conversions_give_the_truth_and_invert(source, target):
    scheduler = SfumatoDDPMScheduler(beta_schedule="cosine")
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 50, 300, 500, 800, 950])
    x_t = scheduler.add_noise(x_0, noise, t)
    truth = {"epsilon": noise, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, noise, t)}
    there = scheduler.convert(truth[source], x_t, t, source, target)
    torch.testing.assert_close(there, truth[target], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scheduler.convert(there, x_t, t, target, source), truth[source], rtol=1e-6, atol=1e-6)


def test_zero_terminal_snr_ends_in_pure_noise():
    scheduler = SfumatoDDPMScheduler(beta_schedule="linear", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    x_0, noise = torch.randn(2, 1, 3, 4, 4)
    last = torch.tensor([999])
    assert torch.equal(scheduler.add_noise(x_0, noise, last), noise)
    assert scheduler.snr(last) == 0
    assert torch.equal(scheduler.convert(-x_0, noise, last, "v_prediction", "sample"), x_0)
    with pytest.raises(ValueError, match="SNR is zero"):
        scheduler.convert(noise, noise, last, "epsilon", "sample")
    with pytest.raises(ValueError, match="v_prediction"):
        SfumatoDDPMScheduler(rescale_betas_zero_snr=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"beta_schedule": "cosin"}, "cosine"),
        ({"beta_schedule": "cosine", "schedule_params": {"tau": 1}}, "no parameter tau; it takes s"),
        ({"schedule_params": {"s": 1}}, "it takes none"),
        ({"prediction_type": "v"}, "unknown prediction_type 'v'; use one of epsilon, sample, v_prediction"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SfumatoDDPMScheduler(**arguments)


class Mixture:
    """Two Gaussians on a line: the ideal denoiser E[x_0 | x_t] in closed form."""

    weights, means, std = torch.tensor([0.3, 0.7]), torch.tensor([-0.6, 0.5]), 0.1

    def denoise(self, x, abar):
        spread = abar * self.std**2 + 1 - abar
        logits = self.weights.log() - (x[..., None] - abar.sqrt() * self.means) ** 2 / (2 * spread)
        per_mode = self.means + abar.sqrt() * self.std**2 / spread * (x[..., None] - abar.sqrt() * self.means)
        return (logits.softmax(-1) * per_mode).sum(-1)

    def sample(self, scheduler, steps, n, dtype=torch.float64, x=None):
        levels = SfumatoDDPMScheduler.from_config(scheduler.config).alphas_cumprod.to(dtype)
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, 1, 1, 1, generator=generator, dtype=dtype) if x is None else x.clone()
        x = x * scheduler.init_noise_sigma
        kwargs = {"generator": generator} if isinstance(scheduler, diffusers.DDPMScheduler) else {}
        for t in scheduler.timesteps:
            inside = scheduler.scale_model_input(x, t)
            x_0 = self.denoise(inside, levels[int(t)])
            x = scheduler.step(x_0, t, x, **kwargs).prev_sample
        return x

    def check(self, x):
        left = x < 0
        assert left.double().mean().item() == pytest.approx(0.3, abs=0.02)
        for mode, mean in zip((x[left], x[~left]), self.means):
            assert mode.mean().item() == pytest.approx(mean.item(), abs=0.01)
            assert mode.std().item() == pytest.approx(self.std, abs=0.01)


def ideal(**arguments):
    defaults = {"beta_schedule": "cosine", "prediction_type": "sample", "clip_sample": False, "timestep_spacing": "trailing"}
    return SfumatoDDPMScheduler(**{**defaults, **arguments})


@pytest.mark.parametrize("arguments", [{}, {"beta_schedule": "chen_sigmoid"}, {"rescale_betas_zero_snr": True}])
def test_ancestral_sampling_reproduces_a_mixture(arguments):
    Mixture().check(Mixture().sample(ideal(**arguments), 1000, 10_000))


@pytest.mark.parametrize(
    "name", ["DDIM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "EulerDiscrete", "HeunDiscrete"]
)
def test_stock_samplers_reproduce_the_mixture_too(name):
    Mixture().check(Mixture().sample(swap(name, ideal().config), 100, 20_000))


def error_of(name, steps, std=0.5):
    """Largest error against the exact solution of the probability-flow ODE for data N(0, std^2)."""
    base = ideal(beta_schedule="linear")
    scheduler, levels = swap(name, base.config), base.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1) * scheduler.init_noise_sigma
    start = scheduler.scale_model_input(x, scheduler.timesteps[0])
    abar = levels[int(scheduler.timesteps[0])]
    exact = start * std / (abar * std**2 + 1 - abar).sqrt()
    scheduler = swap(name, base.config)  # afresh: some count the calls of scale_model_input
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        inside, abar = scheduler.scale_model_input(x, t), levels[int(t)]
        x = scheduler.step(abar.sqrt() * std**2 / (abar * std**2 + 1 - abar) * inside, t, x).prev_sample
    return (x - exact).abs().max().item()


@pytest.mark.parametrize(
    "name, lowest, highest",
    [
        ("DDIM", 0.8, 1.2),
        ("EulerDiscrete", 0.8, 1.2),
        ("HeunDiscrete", 1.5, 2.5),
        ("DPMSolverMultistep", 1.7, 4),
        ("UniPCMultistep", 1.7, 4),
        ("DEISMultistep", 1.7, 4),
    ],
)
def test_order_of_convergence_of_swapped_solvers(name, lowest, highest):
    order = np.log(error_of(name, 10) / error_of(name, 40)) / np.log(4)
    assert lowest < order < highest
