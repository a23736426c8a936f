"""The processes of a run: joined, coordinated and stopped together; one trainer per folder."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast_object_list
from filelock import FileLock, Timeout

from sfumato.training.config.schema import Config
from sfumato.training.engine.tracking import find_trackers

PATIENCE = 20  # seconds that data workers of a killed trainer may take to notice
T = TypeVar("T")


def start_accelerator(config: Config) -> Accelerator:
    """Join the other processes and divide the cores among them.

    Raises:
        ValueError: a way of sharding that this trainer does not support.
    """
    check_environment(config)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # several processes without a GPU: Accelerate must be told to use the CPU
        log_with=find_trackers(config) or None,  # pyright: ignore[reportArgumentType]
        project_dir=config.output_dir,
        mixed_precision=config.train.mixed_precision,
        # As a plugin, which ACCELERATE_GRADIENT_ACCUMULATION_STEPS does not override.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.train.gradient_accumulation_steps),
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed is not supported; configs/accelerate/fsdp2.yaml shards the same state over GPUs")
    if accelerator.distributed_type == DistributedType.FSDP and (not accelerator.is_fsdp2 or config.lora.rank):
        raise ValueError("only version 2 of FSDP is supported, and not with lora; see configs/accelerate/fsdp2.yaml")
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision != "no" and not torch.cpu._is_avx512_bf16_supported():
            slow = f"train.mixed_precision={accelerator.mixed_precision} is many times slower than no"
            print(f"{slow} on a processor without AVX512-BF16", file=sys.stderr)
        torch.set_num_threads(num_threads(config, int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)))
    accelerator.print(describe(config, accelerator))
    return accelerator


def check_environment(config: Config) -> None:
    """Refuse, or warn of, what the environment or `accelerate` sets differently from the config.

    Raises:
        ValueError: a launch for GPUs where there are none, or compilation that the config does not ask for.
    """
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps not in ("", str(config.train.gradient_accumulation_steps)):
        key = f"train.gradient_accumulation_steps={config.train.gradient_accumulation_steps}"
        print(f"{key} is used, not ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}", file=sys.stderr)
    precision, wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), config.train.mixed_precision
    if wanted is not None and precision not in ("", "no", wanted):
        print(f"train.mixed_precision={wanted} is used, not the {precision} of accelerate", file=sys.stderr)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("", "no"):
        raise ValueError(f"accelerate asks for the dynamo backend {backend}; leave it out and set train.compile=unet")
    # A configuration file with use_cpu looks the same from here, except in the launcher's own command.
    if b"--multi_gpu" in _parent("cmdline") and not torch.accelerator.is_available():
        raise ValueError(
            "launched with --multi_gpu, but torch sees no GPU; configs/accelerate/cpu.yaml is for several processes without"
        )


def num_threads(config: Config, local_processes: int = 1) -> int:
    """Torch threads of a process on a CPU: `train.num_threads`, else OMP_NUM_THREADS, else a share of the cores.

    Launchers set the variable to 1 by themselves; a 1 counts only if it was set before they started.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and asked == "1" and b"OMP_NUM_THREADS=1" not in _parent("environ"):
        asked = ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # taskset, Slurm
    return config.train.num_threads or (int(asked) if asked.isdigit() and int(asked) else max(1, cores // local_processes))


def _parent(what: str) -> list[bytes]:
    """`environ` or `cmdline` of the process that started this one, such as a launcher; on Linux."""
    try:
        return Path(f"/proc/{os.getppid()}/{what}").read_bytes().split(b"\0")
    except OSError:
        return []


def describe(config: Config, accelerator: Accelerator) -> str:
    """The first line of a run: processes, device, precision, images per step."""
    world = accelerator.num_processes
    images = config.train.batch_size * config.train.gradient_accumulation_steps * world
    threads = f" ({torch.get_num_threads()} threads)" if accelerator.device.type == "cpu" else ""
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    processes = f"{world} process{'es' if world > 1 else ''}"
    return f"{processes} on {accelerator.device.type}{threads}, {precision}, {images} images per step"


def claim_folder(lock: FileLock) -> None:
    """Lock the run folder so that no second trainer writes to it; the system unlocks it however this process ends."""
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


class StopSignal:
    """Records Ctrl-C, SIGTERM and a closed terminal, so that the loop can save and leave after the current step.

    A second signal ends the process at once. SIGHUP stays ignored if it was, as under `nohup`.
    """

    def __init__(self):
        self.number = 0
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def release(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.number = number
