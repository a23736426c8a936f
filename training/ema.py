"""Averaged weights."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel


class EMA(EMAModel):
    """diffusers' `EMAModel` with the update as one fused pass: shadow <- shadow + (1 - decay) (parameter - shadow).

    The stock update reads and writes every weight twice, which at small models is half of what a trainer adds to a step.
    The averages stay in float32: at a decay of 0.999 and more, an update is below what bfloat16 resolves.

    Args:
        parameters: what is averaged.
        decay: at most; rises to it as (1 + step) / (10 + step).
        offload: keep the averages on the CPU.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float, offload: bool = False):
        super().__init__(parameters, decay=decay, foreach=True)
        self.offload = offload
        if offload:
            self.to("cpu")

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average in the parameters after an optimizer step."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        parameters = [p.to("cpu", non_blocking=False) for p in parameters] if self.offload else list(parameters)
        torch._foreach_lerp_(self.shadow_params, parameters, 1 - self.cur_decay_value)
