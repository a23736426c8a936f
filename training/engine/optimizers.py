"""The optimizer that a config asks for."""

import warnings

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from sfumato.training.config.schema import OptimConfig


def _factor(square: torch.Tensor) -> torch.Tensor:
    """a + b s + c s^2, of Jordan's coefficients, which take all but the smallest singular values to between 0.7 and 1.2."""
    factor = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
    factor.diagonal().add_(3.4445)
    return factor


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of `(M, N)`, roughly: five steps of Newton-Schulz, y <- (a + b yy' + c (yy')^2) y.

    A matrix wider than 1.5 of its height takes the steps on yy' alone and applies them at the end, which is the same for fewer
    products (17 of M x M and 2 of M x N; the plain form 5 and 10). In float32, as yy' needs it (torch's Muon is in bfloat16,
    which a CPU is slower in on matrices as small as ours).
    """
    wide = x.shape[0] <= x.shape[1]
    y = (x if wide else x.T).float()
    y = y / (y.norm() + 1e-7)
    if 2 * y.shape[1] < 3 * y.shape[0]:
        for _ in range(steps):
            y = _factor(y @ y.T) @ y
    else:
        square, whole = y @ y.T, torch.eye(len(y), dtype=y.dtype, device=y.device)
        for step in range(steps):
            factor = _factor(square)
            whole = factor if step == 0 else factor @ whole
            if step < steps - 1:
                square = factor @ square @ factor
        y = whole @ y
    return (y if wide else y.T).to(x.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices and convolution kernels, AdamW for all other parameters, as one optimizer with one `state`.

    Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) makes the momentum of each matrix orthogonal; its updates
    are scaled to AdamW's size, so both follow one learning rate. A kernel `(O, I, H, W)` is taken as a matrix `(O, I H W)`.
    (torch's Muon takes matrices only.)
    """

    momentum = 0.95

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, betas, eps: float, weight_decay: float):
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim < 2]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__(
            [{"params": matrices, "lr": lr, "weight_decay": weight_decay}, {**self.adamw.param_groups[0], "params": others}],
            {},
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both."""
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is None:
                continue
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(average, self.momentum)
            sharded = isinstance(update, DTensor)
            whole = update.full_tensor() if sharded else update  # each process orthogonalises the whole matrix
            size = 0.2 * max(whole.flatten(1).shape) ** 0.5  # the root mean square of AdamW's updates
            update = orthogonal(whole.flatten(1)).view_as(whole)
            if sharded:
                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)  # has it already
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]  # loading a state replaces both
        self.adamw.step()


def build_optimizer(config: OptimConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (fused), AdamW with 8-bit state, or Muon for matrices beside AdamW; AdamW where there are matrices alone.

    Raises:
        ValueError: `adamw_8bit` without bitsandbytes.
    """
    settings = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "muon" and len({p.ndim > 1 for p in parameters}) < 2:
        warnings.warn("optim.name=muon is for whole models: these, as of a LoRA, are trained by adamw", stacklevel=2)
    elif config.name == "muon":
        return MuonAdamW(parameters, **settings)
    if config.name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("optim.name=adamw_8bit needs a package: pip install 'sfumato[8bit]'; or use adamw") from error
        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)
