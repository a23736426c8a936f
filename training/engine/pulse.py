"""What the host learns about the steps, and when."""

import time
from typing import Any

import torch
from accelerate import Accelerator


class Pulse:
    """Loss, gradient norm and time of steps, kept on the device until those of several steps are read together.

    Each read waits until the device has finished all its work; between two reads nothing waits for it. The time is known
    only when it is read; in between it is estimated, in the same way by all processes.

    Attributes:
        seconds: training time so far.
    """

    def __init__(self, accelerator: Accelerator, seconds: float):
        self.accelerator = accelerator
        self.seconds = self._read_at = seconds
        self._started = time.monotonic() - seconds
        self._pace: float | None = None  # seconds per step; None until steps after the first read have been timed
        self._entries: list[dict[str, Any]] = []
        self._figures: list[torch.Tensor] = []

    def __len__(self) -> int:
        """Number of unread steps."""
        return len(self._entries)

    def note(self, entry: dict[str, Any], loss: torch.Tensor, norm: torch.Tensor, is_finite: torch.Tensor) -> None:
        """Record a step: what the host knows about it, and tensors `()` of what it does not know yet."""
        self._entries.append(entry)
        self._figures.append(torch.stack([loss.float(), norm.float(), is_finite.float()]))
        self.seconds += self._pace or 0.0

    def read(self, wishes: tuple[int, ...]) -> tuple[list[dict[str, Any]], list[int]]:
        """The steps since the last read, and the requests; all processes must call, and get the same.

        Args:
            wishes: the requests of this process, as numbers; 0 for none.

        Returns:
            The entries with `loss`, `grad_norm`, `is_finite` and `seconds`; and for each request the largest number.
        """
        figures = self.accelerator.gather(torch.stack(self._figures)[None])
        loss, norm, is_finite = figures.mean(0).T.tolist()  # pyright: ignore[reportAttributeAccessIssue]
        clock = torch.tensor([[time.monotonic() - self._started, *wishes]], device=self.accelerator.device)
        seconds, *granted = self.accelerator.gather(clock).max(0).values.tolist()  # pyright: ignore[reportAttributeAccessIssue]
        took = (seconds - self._read_at) / len(self._entries)
        entries = [
            {
                **entry,
                "seconds": self._read_at + took * (number + 1),
                "loss": loss[number],
                "grad_norm": norm[number],
                "is_finite": is_finite[number] == 1,
            }
            for number, entry in enumerate(self._entries)
        ]
        self._pace = took if self._pace is not None else 0.0  # the first steps also warm up
        self.seconds = self._read_at = seconds
        self._entries, self._figures = [], []
        return entries, [int(wish) for wish in granted]
