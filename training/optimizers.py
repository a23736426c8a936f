"""The optimizer that a config asks for."""

import torch

from sfumato.training.config import OptimConfig


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices, AdamW for all other parameters, as one optimizer with one `state`.

    Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) makes the momentum of each matrix orthogonal; its updates
    are scaled to AdamW's size, so both follow one learning rate. Convolution kernels are AdamW's: torch's Muon takes
    matrices only.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, betas, eps: float, weight_decay: float):
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        if not matrices or not others:
            raise ValueError("optim.name=muon needs both matrices and other parameters to train; use adamw")
        self.parts = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True),
        )
        groups = [{**part.param_groups[0], "params": part.param_groups[0]["params"]} for part in self.parts]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both."""
        for part, group in zip(self.parts, self.param_groups):
            part.state, part.param_groups = self.state, [group]  # anew each time: loading a state replaces both
            part.step()


def build_optimizer(config: OptimConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (fused), AdamW with 8-bit state, or Muon for matrices beside AdamW.

    Raises:
        ValueError: `adamw_8bit` without bitsandbytes.
    """
    settings = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "muon":
        return MuonAdamW(parameters, **settings)
    if config.name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError("optim.name=adamw_8bit needs a package: pip install 'sfumato[8bit]'; or use adamw") from error
        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)
