"""What a task is: a protocol in two halves, one for training and one for the results. The loop knows nothing else."""

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
        streams: the random streams of a sample.
        checkpoint: the one that the run resumes from.
    """

    config: Config
    images: ArraySet
    accelerator: Accelerator
    streams: Streams
    checkpoint: Path | None = None


class Collapsed(RuntimeError):
    """Training has gone wrong in a way that the loss does not show; the message says how. The run stops."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run ends with.

    Attributes:
        captions, images: the last samples.
        scores, scores_label: the task's own scores by name, and what they are scores of.
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
        data: what the loader makes batches from.
    """

    module: torch.nn.Module
    frozen_parts: tuple[torch.nn.Module, ...]
    data: SampleData

    def begin_step(self, done: float, ema: EMA) -> None:
        """Called before each optimizer step with the fraction of the run that is done and the averaged weights."""
        ...

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch, `()`; `model` is `module` as Accelerate runs it. Nothing in it waits for the device."""
        ...

    def check(self) -> None:
        """Check what the steps left on the device; called by all processes when losses are read.

        Raises:
            Collapsed: there is no point in going on.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What the task learned from the data besides the weights, as JSON, for a checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the `state` of a checkpoint."""
        ...


class ResultsHalf(Protocol):
    """What training results in. All processes call each of these; the first one writes."""

    def samples(self) -> tuple[list[str], list[Image.Image]]:
        """Captions and images for a grid; from call to call, only the weights differ."""
        ...

    def held_out(self) -> dict[str, float]:
        """`held_out_loss`, or `training_loss` if nothing is held out, and its parts."""
        ...

    def scores(self) -> tuple[dict[str, float], str]:
        """Scores on held-out data, and a label that says what they are; empty if there are none."""
        ...

    def checkpoint_writer(self, state: dict[str, Any]) -> Callable[[Path, Path], object]:
        """A function that writes the model into a checkpoint, given its present folder and its final one."""
        ...

    def write_what_is_whole(self, folder: Path) -> None:
        """Write into a checkpoint of sharded weights, from the first process, what resuming needs besides them."""
        ...

    def finish(self, state: dict[str, Any], outcome: Outcome) -> list[str]:
        """Write the result; returns the messages to show, the last of which says how to use it."""
        ...


class Task(TrainingHalf, ResultsHalf, Protocol):
    """A complete task. Its class is called with a `TaskContext`.

    Raises:
        ValueError: settings that contradict one another or do not suit the model.
    """

    config: Config
    images: ArraySet
    accelerator: Accelerator

    def __init__(self, context: TaskContext): ...

    @classmethod
    def model_needs(cls, config: Config) -> ModelNeeds:
        """What its model has besides a UNet that reads text and noise; see `models.build.build_pipeline`."""
        ...


def check_not_sharded(context: TaskContext) -> None:
    """Raise ValueError if the weights would be sharded over processes, which not every task supports."""
    if context.accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(f"task={context.config.task} cannot be sharded over GPUs; use configs/accelerate/multi_gpu.yaml")


def captioned_images(images: ArraySet, numbers: list[int]) -> tuple[list[str], list[np.ndarray]]:
    """First captions and images `(H, W, C)` uint8 of records."""
    return [images[i]["captions"][0] for i in numbers], [images.image(i) for i in numbers]
