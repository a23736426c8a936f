"""The optimizer that a config asks for, and the step it takes."""

import warnings
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from sfumato.training.config.schema import OptimConfig
from sfumato.training.models.parameters import local_part

# Devices whose values the host can read at once, since they are its own.
HOST_DEVICES = {"cpu"}


def _factor(square: torch.Tensor) -> torch.Tensor:
    """a + b s + c s^2, with Jordan's coefficients, which take all but the smallest singular values to between 0.7 and 1.2."""
    factor = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
    factor.diagonal(dim1=-2, dim2=-1).add_(3.4445)
    return factor


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices of `(n, M, N)`, roughly: five steps of Newton-Schulz each,
    y <- (a + b yy' + c (yy')^2) y.

    For matrices wider than 1.5 times their height, the steps are taken on yy' alone and applied at the end, which gives the
    same with fewer products (17 of M x M and 2 of M x N; the plain form has 5 and 10). Computed in float32, as yy' needs
    (torch's Muon uses bfloat16, in which a CPU is slower on matrices as small as ours).
    """
    wide = x.shape[1] <= x.shape[2]
    y = (x if wide else x.mT).float()
    y = y / (torch.linalg.matrix_norm(y, keepdim=True) + 1e-7)
    if 2 * y.shape[2] < 3 * y.shape[1]:
        for _ in range(steps):
            y = _factor(y @ y.mT) @ y
    else:
        square = y @ y.mT
        whole = factor = _factor(square)
        for _ in range(steps - 1):
            square = factor @ square @ factor
            factor = _factor(square)
            whole = factor @ whole
        y = whole @ y
    return (y if wide else y.mT).to(x.dtype)


def orthogonal_by_all(x: torch.Tensor) -> torch.Tensor:
    """`orthogonal` for matrices `(n, M, N)` that all processes hold; each process computes its share of them."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if world == 1 or len(x) == 1:
        return orthogonal(x)
    count = -(-len(x) // world)
    rank = distributed.get_rank()
    own = x[rank * count : (rank + 1) * count]
    mine = x.new_zeros(count, *x.shape[1:])
    if len(own):
        mine[: len(own)] = orthogonal(own)
    everyones = x.new_empty(world * count, *x.shape[1:])
    distributed.all_gather_into_tensor(everyones, mine)
    return everyones[: len(x)]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices and convolution kernels, AdamW for all other parameters, as one optimizer with one `state`.

    Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) makes the momentum of each matrix orthogonal; its updates
    are scaled to AdamW's size, so both follow one learning rate. A kernel `(O, I, H, W)` is treated as a matrix `(O, I H W)`.
    Matrices of the same shape are processed together, divided among the processes. (torch's Muon takes matrices only.)

    Attributes:
        found_inf: as in torch's fused optimizers, for a step that waits for nothing: a tensor `()`, 1 if gradients are not
            finite and nothing may change.
    """

    momentum = 0.95
    _step_supports_amp_scaling = True  # torch's scaler for float16 then sets `found_inf` itself, from unscaled gradients

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, betas, eps: float, weight_decay: float):
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim < 2]
        self.found_inf = None
        self.adamw: Any = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__(
            [{"params": matrices, "lr": lr, "weight_decay": weight_decay}, {**self.adamw.param_groups[0], "params": others}],
            {},
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One step of Muon and AdamW."""
        found_inf = getattr(self, "found_inf", None)  # torch's scaler deletes it
        alike = defaultdict(list)
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                alike[p.flatten(1).shape].append(p)
        for parameters in alike.values():
            self._step_matrices(parameters, found_inf)
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]  # loading a state replaces both
        self.adamw.found_inf = found_inf
        self.adamw.step()

    def _step_matrices(self, parameters: list[torch.nn.Parameter], found_inf: torch.Tensor | None) -> None:
        """One step of Muon for parameters that are matrices of the same shape."""
        lr, weight_decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        whole_grads: list[Any] = [p.grad for p in parameters]
        for p, grad in zip(parameters, whole_grads):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(grad)
        grads = [local_part(grad) for grad in whole_grads]
        averages = [local_part(self.state[p]["momentum_buffer"]) for p in parameters]
        values = [local_part(p) for p in parameters]
        keep = torch.ones((), device=grads[0].device) if found_inf is None else 1 - found_inf
        if found_inf is not None:
            for grad in grads:
                grad.masked_fill_(found_inf > 0, 0.0)
        torch._foreach_lerp_(averages, grads, [(1 - self.momentum) * keep] * len(grads))
        updates = torch._foreach_lerp(grads, averages, self.momentum)
        whole = torch.stack([_whole(update, p).flatten(1) for update, p in zip(updates, parameters)])
        size = 0.2 * max(whole.shape[1:]) ** 0.5  # the root mean square of AdamW's updates
        whole = orthogonal_by_all(whole) * (-lr * size * keep)
        torch._foreach_mul_(values, 1 - lr * weight_decay * keep)
        torch._foreach_add_(values, [_part(update.view(p.shape), p) for update, p in zip(whole, parameters)])


def _whole(part: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
    """The whole of a tensor that is sharded as `like` is, from the part that this process holds."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _part(whole: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
    """This process's part, sharded as `like` is, of a tensor that all processes hold."""
    if not isinstance(like, DTensor):
        return whole
    return local_part(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))


def take_step(
    accelerator: Accelerator, optimizer: AcceleratedOptimizer, parameters: list[torch.nn.Parameter], max_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step with gradients scaled down to `max_norm` if their norm is larger.

    A gradient that is not finite changes nothing. Nothing waits for a GPU, except with float16's scaler and with optimizers
    that do not know `found_inf`, such as the one with 8-bit state; on a CPU, where checking is free, no work is done that
    would change nothing.

    Returns:
        The norm before scaling, and whether it is finite, both `()`, on the device.
    """
    accelerator.unscale_gradients()
    plain: Any = optimizer.optimizer
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        norm: Any = accelerator.clip_grad_norm_(parameters, max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    else:
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        # As `clip_grads_with_norm_`, but gradients within the limit are multiplied by exactly 1.
        if norm.device.type not in HOST_DEVICES or norm > max_norm:
            torch._foreach_mul_(grads, torch.where(norm > max_norm, (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0))
    is_finite = norm.isfinite()
    on_device = norm.device.type not in HOST_DEVICES
    if on_device and accelerator.scaler is None and getattr(plain, "_step_supports_amp_scaling", False):
        plain.found_inf = 1 - is_finite.float()
        optimizer.step()
        return norm, is_finite
    if accelerator.scaler is not None or bool(is_finite):
        optimizer.step()
    return norm, is_finite


def build_optimizer(config: OptimConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (fused), AdamW with 8-bit state, or Muon for matrices along with AdamW; AdamW if there are only matrices.

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
