"""Muon against its formula, against torch's, and on convolution kernels."""

import copy

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from sfumato.training.config.schema import OptimConfig
from sfumato.training.engine import optimizers
from sfumato.training.engine.ema import EMA
from sfumato.training.engine.optimizers import MuonAdamW, build_optimizer, orthogonal, take_step


@pytest.mark.parametrize("shape", [(16, 16), (16, 20), (16, 100), (100, 16), (1, 8)])
def test_orthogonal_is_five_steps_of_newton_schulz(shape):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(0, -3, shape[1])
    y = x / x.norm()
    for _ in range(5):
        y = 3.4445 * y - 4.7750 * y @ y.T @ y + 2.0315 * y @ y.T @ y @ y.T @ y
    torch.testing.assert_close(orthogonal(x[None])[0], y, rtol=0, atol=1e-3)
    values = torch.linalg.svdvals(orthogonal((torch.linalg.qr(torch.randn(shape))[0] if min(shape) > 1 else x)[None]))
    assert ((values > 0.65) & (values < 1.25)).all()


def steps(optimizer, parameters, count=4):
    rng = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def test_matrices_move_as_by_torchs_muon_and_vectors_as_by_adamw():
    """To the precision of bfloat16, in which torch's works."""
    torch.manual_seed(0)
    start = [torch.nn.Parameter(torch.randn(12, 40)), torch.nn.Parameter(torch.randn(12))]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    mine, theirs = copy.deepcopy(start), copy.deepcopy(start)
    got = steps(build_optimizer(OptimConfig(name="muon", **settings), mine), mine)
    muon = torch.optim.Muon([theirs[0]], adjust_lr_fn="match_rms_adamw", **settings)
    adamw = torch.optim.AdamW([theirs[1]], betas=tuple(OptimConfig().betas), eps=OptimConfig().eps, **settings)

    class Both:
        def step(self):
            muon.step()
            adamw.step()

    expected = steps(Both(), theirs)
    moved, told = got[0] - start[0].detach(), expected[0] - start[0].detach()
    assert (moved - told).norm() < 0.02 * told.norm()
    torch.testing.assert_close(got[1], expected[1])


def test_a_kernel_moves_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    kernel, bias = torch.randn(8, 3, 3, 3), torch.randn(8)
    found = []
    for shape in (kernel.shape, (8, 27)):
        parameters = [torch.nn.Parameter(kernel.reshape(shape).clone()), torch.nn.Parameter(bias.clone())]
        rng = torch.Generator().manual_seed(1)
        optimizer = MuonAdamW(parameters, 0.01, (0.9, 0.99), 1e-8, 0.1)
        for _ in range(3):
            parameters[0].grad = torch.randn(8, 27, generator=rng).reshape(shape)
            parameters[1].grad = torch.randn(8, generator=rng)
            optimizer.step()
        found.append(parameters[0].detach().reshape(8, 27))
    torch.testing.assert_close(*found)


def test_matrices_alone_as_of_a_lora_are_trained_by_adamw():
    with pytest.warns(UserWarning, match="trained by adamw"):
        optimizer = build_optimizer(OptimConfig(name="muon"), [torch.nn.Parameter(torch.zeros(3, 3))])
    assert type(optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_all_as_it_was_and_one_after_it_goes_on(name, bad, monkeypatch):
    """To the bit: as if that step had not been, whether the host looks or the device decides."""
    accelerator = Accelerator(cpu=True)

    def run(gradients: list[float]) -> tuple[list[torch.Tensor], dict]:
        rng = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((6, 9), (6, 9), (4, 3, 2, 2), (7,))]
        optimizer = accelerator.prepare(build_optimizer(OptimConfig(name=name), parameters))
        ema = EMA(parameters, 0.9, post_hoc=True)
        finite = []
        for scale in gradients:
            for k, p in enumerate(parameters):
                p.grad = torch.sin(torch.arange(p.numel()) * 0.7 + k).view(p.shape)
            parameters[2].grad.view(-1)[3] *= scale
            _, is_finite = take_step(accelerator, optimizer, parameters, 1.0)
            ema.step(parameters, is_finite)
            finite.append(bool(is_finite))
        state = [value for p in parameters for _, value in sorted(optimizer.state[p].items())]
        averages = [*ema.shadow_params, *(value for track in ema.tracks.values() for value in track)]
        return [*(p.detach() for p in parameters), *state, *averages], {"finite": finite, "count": ema.optimization_step}

    expected, _ = run([1.0, 2.0, 3.0])
    found, told = run([1.0, 2.0, bad, bad, 3.0])
    assert told == {"finite": [True, True, False, False, True], "count": 3}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    first, told = run([bad, 1.0])
    assert told["count"] == 1 and all(torch.equal(a, b) for a, b in zip(first, run([1.0])[0], strict=True))
    monkeypatch.setattr(optimizers, "HOST_DEVICES", set())
    without_a_look, told = run([1.0, 2.0, bad, bad, 3.0])
    assert told == {"finite": [True, True, False, False, True], "count": 3}
    assert all(torch.equal(a, b) for a, b in zip(without_a_look, expected, strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_large_gradient_is_scaled_down(name):
    accelerator = Accelerator(cpu=True)
    moved = []
    for clip in (None, 0.5):
        parameters = [torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(4))]
        for k, p in enumerate(parameters):
            p.grad = torch.cos(torch.arange(p.numel()) * 1.3 + k).view(p.shape)
        if clip is None:
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer = accelerator.prepare(build_optimizer(OptimConfig(name=name, eps=0.1), parameters))
        norm, _ = take_step(accelerator, optimizer, parameters, clip or 1e9)
        moved.append((norm, [p.detach() for p in parameters]))
    assert moved[0][0] == pytest.approx(0.5, rel=1e-4) and moved[1][0] > 2
    torch.testing.assert_close(moved[0][1], moved[1][1], rtol=1e-5, atol=1e-7)


def test_the_average_is_that_of_diffusers():
    """With the decay that rises by the number of steps; on the device, but the same to the bit."""
    parameters = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(2))]
    mine, theirs = EMA(parameters, 0.8), EMAModel(parameters, decay=0.8, foreach=True)
    for step in range(30):
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.sin(p + step))
        mine.step(parameters)
        theirs.step(parameters)
    torch.testing.assert_close(mine.shadow_params, theirs.shadow_params, rtol=1e-6, atol=1e-6)
