"""What the host learns of the steps, and when."""

import time
from typing import Any

import torch
from accelerate import Accelerator


class Pulse:
    """Loss, gradient norm and time of steps, kept on the device until they are read, those of several steps together.

    Each read waits until the device has done all that it was told; between two reads it is never waited for. The time is
    known only when it is read; in between it is guessed, by all processes alike.

    Attributes:
        seconds: of training so far.
    """

    def __init__(self, accelerator: Accelerator, seconds: float):
        self.accelerator = accelerator
        self.seconds = self._read_at = seconds
        self._started = time.monotonic() - seconds
        self._pace: float | None = None  # seconds a step; None until steps after the first read have been timed
        self._entries: list[dict[str, Any]] = []
        self._figures: list[torch.Tensor] = []

    def __len__(self) -> int:
        """How many steps are unread."""
        return len(self._entries)

    def note(self, entry: dict[str, Any], loss: torch.Tensor, norm: torch.Tensor, is_finite: torch.Tensor) -> None:
        """A step: what the host knows of it, and the tensors () of what it does not know yet."""
        self._entries.append(entry)
        self._figures.append(torch.stack([loss.float(), norm.float(), is_finite.float()]))
        self.seconds += self._pace or 0.0

    def read(self, wishes: tuple[int, ...]) -> tuple[list[dict[str, Any]], list[int]]:
        """The steps since the last read, and what is wished for; all processes must call, and get the same.

        Args:
            wishes: of this process, as numbers; 0 for what it does not wish.

        Returns:
            The entries with `loss`, `grad_norm`, `is_finite` and `seconds`; of each wish the largest number.
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
