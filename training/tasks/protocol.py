"""What a task is: two halves of one protocol, one for training and one for what comes of it. The loop knows no more."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image

from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import ArraySet
from sfumato.training.data.loader import SampleData
from sfumato.training.data.streams import Streams
from sfumato.training.engine.ema import EMA
from sfumato.training.models.denoiser import ModelNeeds


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a task is built from.

    Attributes:
        config: all settings.
        images: the prepared set.
        accelerator: devices and processes.
        streams: what is random about a sample.
        checkpoint: the one that the run goes on from.
    """

    config: Config
    images: ArraySet
    accelerator: Accelerator
    streams: Streams
    checkpoint: Path | None = None


class Collapsed(RuntimeError):
    """The training has gone wrong in a way that the loss does not show; says how. The run stops."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run ends with.

    Attributes:
        captions, images: the last samples.
        scores: the task's own scores by name, and what they are.
        checkpoint: the last one.
    """

    captions: list[str]
    images: list[Image.Image]
    scores: dict[str, float]
    scores_label: str
    checkpoint: Path | None


class TrainingHalf(Protocol):
    """What is trained.

    Attributes:
        module: all that is trained, as one module.
        frozen_parts: the models whose frozen weights the result depends on.
        data: what the loader makes batches of.
    """

    module: torch.nn.Module
    frozen_parts: tuple[torch.nn.Module, ...]
    data: SampleData

    def begin_step(self, done: float, ema: EMA) -> None:
        """Told before each optimizer step what share of the run is done, and the averaged weights."""
        ...

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch, (); `model` is `module` as Accelerate runs it. Nothing in it waits for the device."""
        ...

    def check(self) -> None:
        """Look at what the steps left on the device; called by all processes, when losses are read.

        Raises:
            Collapsed: going on is of no use.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What the task learned of the data beside the weights, as JSON, for a checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state` of a checkpoint."""
        ...


class ResultsHalf(Protocol):
    """What comes of it. All processes call each of these; the first one writes."""

    def samples(self) -> tuple[list[str], list[Image.Image]]:
        """Captions and images for a grid, the same each time but for the weights."""
        ...

    def held_out(self) -> dict[str, float]:
        """`held_out_loss`, or `training_loss` where nothing is held out, and its parts."""
        ...

    def scores(self) -> tuple[dict[str, float], str]:
        """What can be measured on held-out data, and what that is; nothing where nothing can."""
        ...

    def checkpoint_writer(self, state: dict[str, Any]) -> Callable[[Path, Path], object]:
        """A function that writes the model into a checkpoint, given its folder now and its name later."""
        ...

    def write_what_is_whole(self, folder: Path) -> None:
        """Write into a checkpoint of sharded weights, from the first process, what a run that goes on needs beside them."""
        ...

    def finish(self, state: dict[str, Any], outcome: Outcome) -> list[str]:
        """Write the result; returns what to say, at last how to use it."""
        ...


class Task(TrainingHalf, ResultsHalf, Protocol):
    """A task, whole. Its class is called with a `TaskContext`.

    Raises:
        ValueError: settings that contradict one another, or that the model does not go with.
    """

    config: Config
    images: ArraySet
    accelerator: Accelerator

    def __init__(self, context: TaskContext): ...

    @classmethod
    def model_needs(cls, config: Config) -> ModelNeeds:
        """What its model has beside a UNet of text and noise; see `models.build.build_pipeline`."""
        ...


def check_not_sharded(context: TaskContext) -> None:
    """Raise ValueError where the weights would be spread over processes, which not every task can have."""
    if context.accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(f"task={context.config.task} is not spread over GPUs; use configs/accelerate/multi_gpu.yaml")


def captioned_images(images: ArraySet, numbers: list[int]) -> tuple[list[str], list[np.ndarray]]:
    """First captions and images `(H, W, C)` uint8 of records."""
    return [images[i]["captions"][0] for i in numbers], [images.image(i) for i in numbers]
