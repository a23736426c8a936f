"""The processes of a run: joined, agreed, stopped together; one trainer to a folder."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from filelock import FileLock, Timeout

from sfumato.training.config.schema import Config
from sfumato.training.engine.tracking import find_trackers

PATIENCE = 20  # seconds for the data workers of a trainer that was killed to notice
T = TypeVar("T")


def start_accelerator(config: Config) -> Accelerator:
    """Join the other processes and share out the cores.

    Raises:
        ValueError: a way of sharding that this trainer does not know.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # several processes without a GPU: Accelerate must be asked for the CPU
        log_with=find_trackers(config) or None,  # pyright: ignore[reportArgumentType]
        project_dir=config.output_dir,
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed is not supported; configs/accelerate/fsdp2.yaml spreads the same state over GPUs")
    if accelerator.distributed_type == DistributedType.FSDP and (not accelerator.is_fsdp2 or config.lora.rank):
        raise ValueError("of FSDP only version 2 is supported, and without lora; see configs/accelerate/fsdp2.yaml")
    if accelerator.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
        ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # taskset, Slurm
        torch.set_num_threads(config.train.num_threads or max(1, ours // local))
    return accelerator


def claim_folder(lock: FileLock) -> None:
    """Take the run folder, so that no second trainer writes to it; the system gives it back however this process ends."""
    folder = Path(lock.lock_file).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ValueError(f"another trainer is writing to {folder}; choose another output_dir") from None
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} cannot be written: {error}") from error


def run_on_main(accelerator: Accelerator, function: Callable[..., T], *arguments) -> T:
    """The result, or the ValueError, of a call that the first process makes for all."""
    results: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            results = [function(*arguments)]
        except ValueError as error:
            results = [error]
    (result,) = broadcast_object_list(results)
    if isinstance(result, ValueError):
        raise ValueError(str(result)) from result
    return result


def clip_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to `max_norm` where their norm is larger; returns the norm before.

    Gradients within the limit, the usual case, are read once and not written: `clip_grad_norm_` multiplies them by 1.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        norm: Any = accelerator.clip_grad_norm_(parameters, max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    accelerator.unscale_gradients()
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None])))
    if norm > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that the loop can save and leave after the step under way; a second one ends at once."""

    def __init__(self):
        self.number = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.number = number
