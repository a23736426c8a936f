"""The one training loop, top to bottom."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from filelock import FileLock, Timeout
from transformers.utils import logging as transformers_logging

from sfumato.training.config import schema as configs
from sfumato.training.config.rules import DISTANCES
from sfumato.training.data.array_set import PictureSet
from sfumato.training.data.loader import batches
from sfumato.training.data.prepare import prepare as prepare_pictures
from sfumato.training.engine import best, checkpoints, resume
from sfumato.training.engine.ema import EMA, averaged, forget_snapshots, snapshot
from sfumato.training.engine.optimizers import build_optimizer
from sfumato.training.engine.tracking import Log, trackers
from sfumato.training.models.parameters import is_sharded, trained_parameters
from sfumato.training.objectives import lr_scale
from sfumato.training.publish import hub
from sfumato.training.quality.features import DEFAULT, reference_features
from sfumato.training.tasks.autoencoder import Autoencoder
from sfumato.training.tasks.registry import TASKS
from sfumato.training.tasks.text_to_image import TextToImage

DIVERGED, NOT_PUSHED = 3, 5
SHOWN = ("objective.", "optim.", "train.", "ema.", "scheduler.", "seed:", "precision:")  # changes the card tells; no paths
# Changes that a run which is done cannot take any more.
RESULT = ("data:", "data.random_flip", "objective.", "optim.", "scheduler.", "unet.", "seed:")
PATIENCE = 20  # seconds for the data workers of a trainer that was killed to notice


@dataclass
class Run:
    """All that a training run works with."""

    config: configs.Config
    accelerator: Accelerator
    pictures: PictureSet
    task: TextToImage | Autoencoder
    model: torch.nn.Module  # the task's module as Accelerate runs it
    optimizer: torch.optim.Optimizer
    ema: EMA
    state: dict  # how far the run is; what a checkpoint keeps
    saved: Path | None  # the newest checkpoint
    origin: dict  # what else its numbers depend on
    pushes: hub.BackgroundPush  # of checkpoints, to the Hub
    best: float | None  # the best score by checkpoint.best_by so far
    lock: FileLock  # held by the first process: one trainer writes to a folder

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)


def prepare(config: configs.Config) -> Run:
    """Check and build everything that can go wrong before the first step.

    Raises:
        ValueError: a setting, the data or the checkpoint cannot be used; says why.
    """
    transformers_logging.disable_progress_bar()
    pictures = prepare_pictures(config.data)  # before any process waits for another: this may take hours
    accelerator = start(config)
    if config.hub.push or config.hub.every_steps:
        on_main(accelerator, hub.check, config.hub.repo_id, config.hub.pull_request, config.hub.private)
    lock = FileLock(Path(config.output_dir) / ".lock", is_singleton=True)
    on_main(accelerator, claim, lock)
    try:
        return assemble(config, pictures, accelerator, lock)
    except BaseException:
        lock.release(force=True)
        raise


def assemble(config: configs.Config, pictures: PictureSet, accelerator: Accelerator, lock: FileLock) -> Run:
    """Task, optimizer and averages, from random weights or from a checkpoint."""
    checkpoint = on_main(
        accelerator, resume.find, config.checkpoint.resume, Path(config.output_dir), config.checkpoint.every_steps
    )
    by, held_out = config.checkpoint.best_by, len(pictures.select("held_out"))
    if (by == "held_out_loss" and not held_out) or (by == "FD of model" and held_out == 1):
        raise ValueError(f"checkpoint.best_by={by}: {held_out} pictures are held out, which is too few; choose another score")
    if config.checkpoint.best_by in DISTANCES:
        if pictures.several_sizes:
            raise ValueError(f"checkpoint.best_by={config.checkpoint.best_by}: needs pictures of one size")
        reference_features(pictures, DEFAULT, config.data.cache_dir)  # now, which is not training time
    task = TASKS[config.task](config, pictures, checkpoint, accelerator)
    origin = resume.origin(config, accelerator, pictures, task.parts)
    model, optimizer = accelerator.prepare(task.module, build_optimizer(config.optim, trained_parameters(task.module)))
    ema = EMA(trained_parameters(task.module), config.ema.decay, config.ema.offload, bool(config.ema.snapshot_steps))
    state = {"step": 0, "images_seen": 0, "seconds": 0.0, "skipped_steps": 0, "changes": []}
    if checkpoint:
        stored = checkpoints.read_state(checkpoint)
        same = stored["config"]["optim"]["name"] == config.optim.name
        checkpoints.restore(checkpoint, task.module, optimizer, ema, with_moments=same)
        ema.optimization_step = stored["ema_step"]
        if accelerator.scaler is not None and stored["scaler"]:
            accelerator.scaler.load_state_dict(stored["scaler"])
        state = {key: stored.get(key, start) for key, start in state.items()}
        task.restore(stored.get("task", {}))
        if pictures.several_sizes:  # where the batch size changed, blocks of one size begin elsewhere
            block = config.train.batch_size * accelerator.num_processes
            state["images_seen"] = -(-state["images_seen"] // block) * block
        accelerator.print(f"goes on from {checkpoint}")
        told = resume.differences(stored, origin)
        other = [line for line in told if line.startswith(RESULT)]
        if fraction_done(config, state) >= 1 and other:
            raise ValueError(f"the run in {config.output_dir} is done; choose another output_dir, or undo this: {other[0]}")
        state["changes"] = [*state["changes"], *(f"step {state['step']:,}: {line}" for line in told if line.startswith(SHOWN))]
        for line in told:
            accelerator.print(f"  {line}")
    pushes = hub.BackgroundPush(Path(config.output_dir) / ".push")
    output_dir, by = Path(config.output_dir), config.checkpoint.best_by
    on_main(accelerator, forget_snapshots, output_dir, state["step"])
    score = on_main(accelerator, best.best_before, output_dir, by, state["step"])
    return Run(config, accelerator, pictures, task, model, optimizer, ema, state, checkpoint, origin, pushes, score, lock)


def start(config: configs.Config) -> Accelerator:
    """Join the other processes and share out the cores.

    Raises:
        ValueError: a way of sharding that this trainer does not know.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # several processes without a GPU: Accelerate wants to be told
        log_with=trackers(config) or None,
        project_dir=config.output_dir,
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed is not supported; configs/accelerate/fsdp2.yaml spreads the same state over GPUs")
    if accelerator.distributed_type == DistributedType.FSDP and (not accelerator.is_fsdp2 or config.lora.rank):
        raise ValueError("of FSDP only version 2 is supported, and without lora; see configs/accelerate/fsdp2.yaml")
    if accelerator.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # taskset, Slurm
        torch.set_num_threads(config.train.num_threads or max(1, ours // local))
    return accelerator


def claim(lock: FileLock) -> None:
    """Take the run folder, so that no second trainer writes to it; the system gives it back however this process ends."""
    folder = Path(lock.lock_file).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ValueError(f"another trainer is writing to {folder}; choose another output_dir") from None
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} cannot be written: {error}") from error


def on_main(accelerator: Accelerator, function, *arguments):
    """The result, or the ValueError, of a call that the first process makes for all."""
    result = [None]
    if accelerator.is_main_process:
        try:
            result = [function(*arguments)]
        except ValueError as error:
            result = [error]
    (result,) = broadcast_object_list(result)
    if isinstance(result, ValueError):
        raise ValueError(str(result)) from result
    return result


def train(run: Run) -> int:
    """Train to the end, to a signal, or until the loss diverges; leaves checkpoints and, at the end, what the task makes.

    Returns:
        0 done, 3 diverged, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
    """
    c, accelerator, task, state, ema = run.config, run.accelerator, run.task, run.state, run.ema
    device, parameters = accelerator.device, trained_parameters(task.module)
    model, optimizer = run.model, run.optimizer
    rank, world = accelerator.process_index, accelerator.num_processes
    loader = batches(run.pictures, c, task.texts, rank, world, state["images_seen"], task.latents, task.beside)
    log = Log(c, accelerator, state["step"])
    stop, pushes = StopSignal(), run.pushes
    bad_in_a_row, due, push_due, started = 0, False, False, time.monotonic() - state["seconds"]
    done, stopped = fraction_done(c, state), 0

    while done < 1 and not stopped and bad_in_a_row < c.train.max_bad_steps:
        # One optimizer step, its loss summed over the accumulated batches.
        losses = []
        for _ in range(c.train.gradient_accumulation_steps):
            batch = next(loader)
            with accelerator.accumulate(model):
                loss = task.loss(model, batch)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    lr = c.optim.lr * lr_scale(state["step"], done, c.optim.lr_warmup_steps, c.optim.lr_decay)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    grad_norm = clip_gradients(accelerator, parameters, c.optim.max_grad_norm)
                    # A gradient that is not finite never reaches the weights. (fp16's scaler skips such steps itself.)
                    finite = bool(torch.isfinite(grad_norm))
                    if finite or accelerator.scaler is not None:
                        optimizer.step()
                optimizer.zero_grad()
        if finite:
            ema.step(parameters)
        bad_in_a_row = 0 if finite else bad_in_a_row + 1

        # All processes agree on loss, time and whether to stop.
        pulse = torch.tensor([torch.stack(losses).mean(), time.monotonic() - started, stop.number], device=device)
        pulse = accelerator.gather(pulse[None])
        state["step"] += 1
        state["images_seen"] += c.train.batch_size * c.train.gradient_accumulation_steps * accelerator.num_processes
        state["seconds"] = pulse[:, 1].max().item()
        state["skipped_steps"] += not finite
        done, stopped = fraction_done(c, state), int(pulse[:, 2].max())
        log.write(
            {
                **numbers(state),
                "loss": pulse[:, 0].mean().item(),
                "lr": lr,
                "grad_norm": float(grad_norm),
                "done": round(done, 5),
            }
        )
        if every(c.ema.snapshot_steps, state) or (c.ema.snapshot_steps and done >= 1):
            snapshot(run.output_dir, state["step"], task.module, ema, accelerator.is_main_process)
        due, push_due = due or every(c.checkpoint.every_steps, state), push_due or every(c.hub.every_steps, state)
        if (due and finite) or stopped or done >= 1:
            log.sync()
            run.saved = save(run) or run.saved
            if push_due and accelerator.is_main_process and not stopped and done < 1:
                branch = f"step-{state['step']}"
                pushes.start(run.saved / "pipeline", repo_id=c.hub.repo_id, private=c.hub.private, branch=branch)
            due = push_due = False
        for line in pushes.news():
            log.say(line)
        if every(c.validation.every_steps, state) and done < 1 and not stopped:
            with averaged(ema, task.module):
                log.show(state["step"], *task.show())
                validate(run, log)

    stop.release()
    if stopped:
        log.close(f"stopped by signal {stopped}; go on with checkpoint.resume=auto")
        return 128 + stopped
    if done < 1:
        log.close(
            f"stopped: {bad_in_a_row} steps in a row had a gradient that is not finite; none reached the weights."
            f" The checkpoints are good. Lower optim.lr (now {c.optim.lr}) and go on with checkpoint.resume=auto"
        )
        return DIVERGED
    with averaged(ema, task.module):
        finish(run, log)
    return 0


def validate(run: Run, log: Log, last: bool = False) -> tuple[dict[str, float], str]:
    """Measure on held-out data; where `checkpoint.best_by` says that this is the best model so far, keep it in `best/`.

    Returns:
        The task's own scores and what they are, where `best_by` needs them or this is the `last` time; else nothing.
    """
    by, task, own, what = run.config.checkpoint.best_by, run.task, {}, ""
    scores = task.held_out()
    if last or (by is not None and by not in scores):
        own, what = task.scores(task.shareable())
    scores |= own
    log.validated({**numbers(run.state), **scores})
    if by is not None and best.is_better(by, scores[by], run.best):
        run.best, write, folder = scores[by], task.writer(run.state), run.output_dir / "best"
        if run.accelerator.is_main_process:
            best.keep(write, folder, by, run.best, run.state["step"])
    return own, what


def clip_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to `max_norm` where their norm is larger; returns the norm before.

    Gradients within the limit, the usual case, are read once and not written: `clip_grad_norm_` multiplies them by 1.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        norm = accelerator.clip_grad_norm_(parameters, max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    accelerator.unscale_gradients()
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None])))
    if norm > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def fraction_done(config: configs.Config, state: dict) -> float:
    """How much of the run is done, by steps or by minutes, whichever is further; learning rates follow it."""
    by_steps = state["step"] / config.train.max_steps if config.train.max_steps else 0.0
    by_time = state["seconds"] / 60 / config.train.max_minutes if config.train.max_minutes else 0.0
    return max(by_steps, by_time)


def save(run: Run) -> Path | None:
    """Write a checkpoint, from the first process; the others take part where the weights are sharded."""
    main = run.accelerator.is_main_process
    if not main and not is_sharded(run.task.module):
        return None
    scaler, tensors = run.accelerator.scaler, checkpoints.collect(run.task.module, run.optimizer, run.ema)
    stored = {
        **run.state,
        "ema_step": run.ema.optimization_step,
        "task": run.task.state(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        **run.origin,
    }
    with averaged(run.ema, run.task.module):
        write = run.task.writer(run.state)
        if main:
            return checkpoints.save(run.output_dir, tensors, write, stored, run.config.checkpoint.keep)


def push_result(run: Run) -> int:
    """Push `pipeline/`, from the first process; a failure is told and costs nothing but the push.

    Returns:
        0 pushed, or not asked for; 5 not pushed.
    """
    h, folder = run.config.hub, run.output_dir / "pipeline"
    if not run.accelerator.is_main_process:
        return 0
    run.pushes.wait()
    for line in run.pushes.news():
        print(line)
    if not h.push:
        return 0
    try:
        message = f"Step {run.state['step']}, trained with Sfumato"
        address = hub.push(folder, h.repo_id, h.private, tag=h.tag, pull_request=h.pull_request, message=message)
        print(f"pushed {address}")
        return 0
    except hub.CannotPush as error:
        print(f"sfumato: not pushed: {error}. Later:  sfumato push {folder} {h.repo_id}", file=sys.stderr)
        return NOT_PUSHED


def numbers(state: dict) -> dict:
    """What metrics tell of how far a run is."""
    return {key: value for key, value in state.items() if key != "changes"}


def every(steps: int | None, state: dict) -> bool:
    return steps is not None and state["step"] % steps == 0


def finish(run: Run, log: Log) -> None:
    """Last grid, scores where they can be had, and what the task makes."""
    shown = run.task.show()
    log.show(run.state["step"], *shown)
    judged = validate(run, log, last=True)
    *said, last = run.task.finish(run.state, run.saved, *shown, *judged)
    for line in said:
        log.say(line)
    log.close(last)


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that the loop can save and leave after the step under way; a second one ends at once."""

    def __init__(self):
        self.number = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.number = number
