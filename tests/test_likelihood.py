"""The variational bound: on Gaussian images, whose entropy is known, with the network that is right for them."""

import json

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler

from sfumato.schedulers import SfumatoDDPMScheduler
from sfumato.schedulers.scheduling_sfumato_ddpm import discrete_log_likelihood
from sfumato.training.quality.likelihood import bits_per_dim
from sfumato.training.train import main

STD = 0.25
LEVELS = np.linspace(-1, 1, 256)


def toy(count, seed=0):
    """Images whose pixels are independent, N(0, STD^2) rounded to 256 levels, and their entropy in bits."""
    from scipy import stats

    edges = (LEVELS[1:] + LEVELS[:-1]) / 2
    p = np.diff(np.concatenate([[0], stats.norm(0, STD).cdf(edges), [1]]))
    drawn = np.random.default_rng(seed).choice(256, (count, 3, 8, 8), p=p)
    return torch.from_numpy(LEVELS[drawn]).float(), float(-(p * np.log2(p)).sum())


def right(scheduler, x_t, t):
    """What the ideal network says of N(0, STD^2) pixels: the prediction, and the learned share of the log-variance."""
    abar = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1).double()
    variance = abar * STD**2 + 1 - abar
    x_0 = abar.sqrt() * STD**2 / variance * x_t
    left = STD**2 * (1 - abar) / variance  # of x_0, once x_t is known
    s = (t - 1).clamp(min=0)
    before = torch.where((t > 0).reshape(-1, 1, 1, 1), scheduler.alphas_cumprod[s].reshape(-1, 1, 1, 1).double(), 1.0)
    beta = 1 - abar / before
    small = ((1 - before) / (1 - abar) * beta).clamp(min=1e-30)
    best = (small + (before.sqrt() * beta / (1 - abar)) ** 2 * left).log()
    low = scheduler.log_variance(t, x_t, -torch.ones_like(x_t)).double()
    high = scheduler.log_variance(t, x_t, torch.ones_like(x_t)).double()
    share = ((best - low) / (high - low)) * 2 - 1
    return scheduler.convert(x_0.float(), x_t, t, "sample", scheduler.prediction_type), share.float().expand_as(x_t)


@pytest.mark.parametrize("schedule", ["linear", pytest.param("cosine", marks=pytest.mark.slow)])
def test_the_bound_of_the_right_network_is_the_entropy_within_one_percent(schedule):
    """Summed over all 1,000 steps, with the variance that is right too; with a fixed one it is above."""
    x_0, entropy = toy(24)
    totals = {}
    for kind in ("learned_range", "fixed_small", "fixed_large"):
        scheduler = SfumatoDDPMScheduler(beta_schedule=schedule, variance_type=kind, clip_sample=False)
        generator, total = torch.Generator().manual_seed(0), scheduler.prior_term(x_0).mean().item()
        for step in range(1000):
            t = torch.full((len(x_0),), step)
            x_t = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=generator), t)
            output, share = right(scheduler, x_t, t)
            output = torch.cat([output, share], dim=1) if kind == "learned_range" else output
            total += scheduler.bound_term(output, x_0, x_t, t).mean().item()
        totals[kind] = total
    assert totals["learned_range"] == pytest.approx(entropy, rel=0.01), (totals, entropy)
    assert entropy * 0.99 < totals["learned_range"] < min(totals["fixed_small"], totals["fixed_large"])


def test_discrete_likelihoods_of_all_levels_sum_to_one():
    x = torch.from_numpy(LEVELS)
    for mean, std in ((0.0, 0.2), (0.99, 0.05), (-3.0, 0.5), (0.3, 0.004)):
        log = discrete_log_likelihood(x, torch.tensor(mean), torch.tensor(2 * np.log(std)))
        assert log.exp().sum().item() == pytest.approx(1, abs=1e-3), (mean, std)


def test_the_learned_variance_is_the_one_that_stock_diffusers_samples_with():
    settings = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}
    ours, stock = SfumatoDDPMScheduler(**settings), DDPMScheduler(**settings)
    x, learned = torch.randn(2, 1, 3, 4, 4)
    for step in (1, 10, 500, 998):  # the stock class fails to look up t = 999's beta in the same way
        expected = stock._get_variance(step, learned)
        torch.testing.assert_close(ours.log_variance(torch.tensor([step]), x, learned.clone()), expected, rtol=1e-3, atol=1e-3)


def test_a_trained_model_learns_its_variance_and_tells_its_bits(tmp_path):
    """The hybrid loss through the trainer; the folder opens, draws, and its bound is a sum of its parts."""
    path = tiny.config_file(
        tmp_path,
        scheduler={"variance_type": "learned_range"},
        train={"max_steps": 30, "batch_size": 16},
        optim={"lr": 3e-3},
        checkpoint={"every_steps": None},
    )
    assert main([str(path)]) == 0
    from sfumato.pipelines import SfumatoPipeline
    from sfumato.training.config.load import load_config
    from sfumato.training.data.prepare import prepare

    pipe = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.unet.config.out_channels == 6 and pipe.scheduler.config.variance_type == "learned_range"
    images = prepare(load_config(path).data)
    shown = np.stack([images.image(i) for i in range(3)])
    captions = [images[i]["captions"][0] for i in range(3)]
    told = bits_per_dim(pipe, shown, captions)
    assert told["bits/dim"] == pytest.approx(told["prior"] + told["decoder"] + sum(told["levels"]), rel=1e-5)
    some = bits_per_dim(pipe, shown, captions, num_levels=200)
    assert some["bits/dim"] == pytest.approx(told["bits/dim"], rel=0.1)
    assert np.isnan(some["levels"]).any(), "levels that were left out are not told as 0"
    with pytest.raises(ValueError, match="at least 2"):
        bits_per_dim(pipe, shown, captions, num_levels=1)
    json.dumps(told)
