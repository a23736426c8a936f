"""Muon against its formula, against torch's, and on convolution kernels."""

import copy

import pytest
import torch

from sfumato.training.config.schema import OptimConfig
from sfumato.training.engine.optimizers import MuonAdamW, build_optimizer, orthogonal


@pytest.mark.parametrize("shape", [(16, 16), (16, 20), (16, 100), (100, 16), (1, 8)])
def test_orthogonal_is_five_steps_of_newton_schulz(shape):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(0, -3, shape[1])
    y = x / x.norm()
    for _ in range(5):
        y = 3.4445 * y - 4.7750 * y @ y.T @ y + 2.0315 * y @ y.T @ y @ y.T @ y
    torch.testing.assert_close(orthogonal(x), y, rtol=0, atol=1e-3)
    values = torch.linalg.svdvals(orthogonal(torch.linalg.qr(torch.randn(shape))[0] if min(shape) > 1 else x))
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
