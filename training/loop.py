"""The one training loop, top to bottom."""

import hashlib
import json
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from filelock import FileLock
from transformers.utils import logging as transformers_logging

from sfumato.files import read_lines
from sfumato.registries import TASKS, metric_of
from sfumato.training.config.load import default_config
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import ArraySet
from sfumato.training.data.loader import batches
from sfumato.training.data.prepare import prepare as prepare_data
from sfumato.training.data.stream import Stream
from sfumato.training.data.streams import STREAM_VERSION, streams_of
from sfumato.training.engine import best, checkpoints, requests, resume
from sfumato.training.engine.ema import EMA, averaged_weights, forget_snapshots, save_snapshot
from sfumato.training.engine.optimizers import build_optimizer, take_step
from sfumato.training.engine.processes import (
    StopSignal,
    claim_folder,
    run_on_main,
    start_accelerator,
)
from sfumato.training.engine.pulse import Pulse
from sfumato.training.engine.tracking import Log
from sfumato.training.models.build import check_network
from sfumato.training.models.parameters import is_sharded, trained_parameters
from sfumato.training.objectives import lr_scale
from sfumato.training.publish import hub
from sfumato.training.quality.features import DEFAULT, reference_features
from sfumato.training.tasks.protocol import Outcome, Task, TaskContext

DIVERGED = 3
NOT_PUSHED = 5


@dataclass(kw_only=True)
class Run:
    """Everything that a training run works with.

    Attributes:
        model: the task's module as Accelerate runs it.
        state: how far the run is; what a checkpoint keeps.
        origin: what else its results depend on.
        checkpoint: the newest one.
        best: the best score by `checkpoint.best_by` so far.
        pushes: pushes checkpoints to the Hub.
        lock: held by the first process: one trainer writes to a folder.
        stream: reads the data while training, if they are streamed.
        saver: writes checkpoints while training continues, if weights are sharded over GPUs.
    """

    config: Config
    accelerator: Accelerator
    task: Task
    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    ema: EMA
    state: dict[str, Any]
    origin: dict[str, Any]
    checkpoint: Path | None
    best: float | None
    finished: bool
    pushes: hub.BackgroundPush
    lock: FileLock
    stream: Stream | None = None
    saver: checkpoints.BackgroundSaver | None = None

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)


def prepare(config: Config) -> Run:
    """Check and build everything that can go wrong before the first step.

    Raises:
        ValueError: a setting, the data or the checkpoint cannot be used; says why.
    """
    transformers_logging.disable_progress_bar()
    check_network(config)
    images = prepare_data(config.data)  # before any process waits for another: this may take hours
    accelerator = start_accelerator(config)
    if config.hub.push or config.hub.every_steps:
        run_on_main(accelerator, hub.check, config.hub.repo_id, config.hub.pull_request, config.hub.private)
    lock = FileLock(Path(config.output_dir) / ".lock", is_singleton=True)
    run_on_main(accelerator, claim_folder, lock)
    run_on_main(accelerator, requests.take, Path(config.output_dir))  # what was asked of an earlier trainer
    try:
        return assemble(config, images, accelerator, lock)
    except BaseException:
        lock.release(force=True)
        raise


def assemble(config: Config, images: ArraySet, accelerator: Accelerator, lock: FileLock) -> Run:
    """Build task, optimizer and averages, from random weights or from a checkpoint."""
    output_dir, every_steps = Path(config.output_dir), config.checkpoint.every_steps
    checkpoint = run_on_main(accelerator, resume.find_checkpoint, config.checkpoint.resume, output_dir, every_steps)
    stored = {} if checkpoint is None else checkpoints.read_state(checkpoint)
    entry = TASKS[config.task]
    if images.codec is not None and not (entry.plain or entry.arrays):
        raise ValueError(f"task={config.task} is for images; {config.data.name} has none")
    _check_best_by(config, images)
    stream_version = stored.get("stream_version", 1) if stored else STREAM_VERSION
    context = TaskContext(
        config=config,
        images=images,
        accelerator=accelerator,
        streams=streams_of(stream_version, config.seed),
        checkpoint=checkpoint,
    )
    task: Task = TASKS.load(config.task)(context)
    parameters = trained_parameters(task.module)
    origin = resume.origin_of(config, accelerator, images, task.frozen_parts)
    model, optimizer = accelerator.prepare(task.module, build_optimizer(config.optim, parameters))
    ema = EMA(trained_parameters(task.module), config.ema.decay, config.ema.offload, post_hoc=bool(config.ema.snapshot_steps))
    run = Run(
        config=config,
        accelerator=accelerator,
        task=task,
        model=model,
        optimizer=optimizer,
        ema=ema,
        state={
            "step": 0,
            "images_seen": 0,
            "seconds": 0.0,
            "skipped_steps": 0,
            "changes": [],
            "stream_version": stream_version,
            "ended_early": False,
        },
        origin=origin,
        checkpoint=checkpoint,
        best=None,
        finished=False,
        pushes=hub.BackgroundPush(output_dir / ".push"),
        lock=lock,
    )
    if checkpoint is not None:
        go_on(run, stored)
    if is_sharded(task.module) and config.hub.every_steps:
        raise ValueError("hub.every_steps: checkpoints of sharded weights hold no model yet; push the result with hub.push")
    if is_sharded(task.module) and accelerator.device.type != "cpu":  # a copy on the host takes no GPU memory
        run.saver = checkpoints.BackgroundSaver()
    if config.data.stream:
        run.stream = Stream(
            task.data,
            config,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            start=run.state["images_seen"],
            state=stored.get("stream", {}),
        )
    run_on_main(accelerator, forget_snapshots, output_dir, run.state["step"])
    run.best = run_on_main(accelerator, best.load_best, output_dir, config.checkpoint.best_by, run.state["step"])
    return run


def _check_best_by(config: Config, images: ArraySet) -> None:
    """Raise ValueError if the data cannot give the score of `checkpoint.best_by`; compute what it compares with."""
    by, held_out = config.checkpoint.best_by, len(images.select("held_out"))
    if (by == "held_out_loss" and not held_out) or (by == "FD of model" and held_out == 1):
        raise ValueError(f"checkpoint.best_by={by}: {held_out} images are held out, which is too few; choose another score")
    if by is None or TASKS[config.task].scores:
        return
    metric = metric_of(by)
    if images.codec is not None and metric is not None and metric.of == "drawings":
        raise ValueError(f"checkpoint.best_by={by} is for images; {config.data.name} has none")
    if metric is not None and metric.of == "drawings" and metric.needs:
        if images.has_several_sizes:
            raise ValueError(f"checkpoint.best_by={by}: needs images of one size")
        reference_features(images, DEFAULT, config.data.cache_dir)  # now, which is not training time


def go_on(run: Run, stored: dict[str, Any]) -> None:
    """Restore the state of the run's checkpoint, and say what differs from the run that wrote it.

    Raises:
        ValueError: a checkpoint of another model, or of a finished run whose result a changed setting would undo.
    """
    config = run.config
    accelerator = run.accelerator
    checkpoint = run.checkpoint
    assert checkpoint is not None
    resume.adopt_older_data(stored, run.task.images, config.data.cache_dir)
    same_optimizer = stored["config"]["optim"]["name"] == config.optim.name
    checkpoints.restore(checkpoint, run.task.module, run.optimizer, run.ema, with_moments=same_optimizer)
    run.ema.optimization_step = stored["ema_step"]
    if accelerator.scaler is not None and stored["scaler"]:
        accelerator.scaler.load_state_dict(stored["scaler"])
    run.state = state = {key: stored.get(key, start) for key, start in run.state.items()}
    run.task.restore(stored.get("task", {}))
    if run.task.images.has_several_sizes:  # if the batch size changed, blocks of one size begin elsewhere
        block = config.train.batch_size * accelerator.num_processes
        state["images_seen"] = -(-state["images_seen"] // block) * block
    accelerator.print(f"resuming from {checkpoint}; steps after it, if any were made, are repeated")
    state["ended_early"] = is_out_of_patience(run)
    changes = resume.find_changes(stored, run.origin)
    undone = [change for change in changes if change.undoes_a_result]
    if fraction_done(config, state) >= 1 and undone:
        raise ValueError(f"the run in {config.output_dir} is done; choose another output_dir, or undo this: {undone[0]}")
    same = read_finished(run).items() >= {"step": state["step"], "settings": settings_hash(config)}.items()
    run.finished = fraction_done(config, state) >= 1 and same
    state["changes"] = state["changes"] + [f"step {state['step']:,}: {c}" for c in changes if c.is_for_the_card]
    for line in [*changes, *resume.consequences(changes, config)]:
        accelerator.print(f"  {line}")


def train(run: Run) -> int:
    """Train to the end, to a signal, or until the loss diverges; leaves checkpoints and, at the end, the task's result.

    A validation or a push that was due at the checkpoint that the run resumes from, but was cut off, is made up for.

    Returns:
        0 done, 3 diverged, 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by the closing of its terminal.
    """
    stop = StopSignal()
    try:
        return train_until(run, stop)
    finally:
        stop.release()  # otherwise, after an error, signals would no longer end this process


def train_until(run: Run, stop: StopSignal) -> int:
    """See `train`; `stop` says when to leave."""
    config = run.config
    accelerator = run.accelerator
    task = run.task
    state = run.state
    ema = run.ema
    parameters = trained_parameters(task.module)
    model, optimizer = run.model, run.optimizer
    world = accelerator.num_processes
    loader = open_batches(run)
    log = Log(config, accelerator, state["step"])
    num_batches = config.train.gradient_accumulation_steps
    read_every = config.train.log_every_steps or (1 if accelerator.device.type == "cpu" else 10)
    pulse = Pulse(accelerator, state["seconds"])
    bad_in_a_row = 0
    diverged = False
    save_due = False
    push_due = False
    done = fraction_done(config, state)
    stopped = 0
    saved_at = state["seconds"]

    make_up_for(run, log)
    if config.validation.at_start and not state["step"]:
        log.show(0, *task.samples())
    while done < 1 and not stopped and not diverged:
        # One optimizer step, its loss averaged over the accumulated batches. Nothing in it waits for the device.
        losses = []
        task.begin_step(done, ema)
        lr = config.optim.lr * lr_scale(state["step"], done, config.optim.lr_warmup_steps, config.optim.lr_decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(num_batches):
            batch = next(loader)
            with accelerator.accumulate(model):
                loss = task.loss(model, batch)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    grad_norm, is_finite = take_step(accelerator, optimizer, parameters, config.optim.max_grad_norm)
                optimizer.zero_grad()
        ema.step(parameters, is_finite)

        state["step"] += 1
        state["images_seen"] += config.train.batch_size * num_batches * world
        entry = {"step": state["step"], "images_seen": state["images_seen"], "lr": lr}
        pulse.note(entry, torch.stack(losses).mean(), grad_norm, is_finite)
        state["seconds"] = pulse.seconds
        done = fraction_done(config, state)
        save_due = save_due or is_due(config.checkpoint.every_steps, state)
        show_due = is_due(config.validation.every_steps, state)
        snapshot_due = is_due(config.ema.snapshot_steps, state)
        push_due = push_due or is_due(config.hub.every_steps, state)
        if len(pulse) < read_every and done < 1 and not (save_due or show_due or snapshot_due or push_due):
            continue

        # All processes agree on loss, time and what is asked of them.
        entries, (stopped, save_asked, samples_asked) = pulse.read(wishes_of(run, stop))
        state["seconds"] = pulse.seconds
        is_overdue = state["seconds"] - saved_at >= 60 * (config.checkpoint.every_minutes or math.inf)
        save_due = save_due or bool(save_asked) or is_overdue
        for entry in entries:
            is_good = entry.pop("is_finite")
            bad_in_a_row = 0 if is_good else bad_in_a_row + 1
            diverged = diverged or bad_in_a_row >= config.train.max_bad_steps
            state["skipped_steps"] += not is_good
            entry["skipped_steps"] = state["skipped_steps"]
            log.write({**entry, "done": round(fraction_done(config, entry), 5)})
        task.check()
        done = fraction_done(config, state)

        if snapshot_due or (config.ema.snapshot_steps and done >= 1):
            save_snapshot(run.output_dir, state["step"], task.module, ema, accelerator.is_main_process)
        if (save_due and bad_in_a_row == 0) or stopped or done >= 1:
            log.sync()
            run.checkpoint = save(run, last=bool(stopped) or done >= 1) or run.checkpoint
            if push_due and not stopped and done < 1:
                push_checkpoint(run)
            save_due = push_due = False
            saved_at = state["seconds"]
        for line in new_messages(run):
            log.say(line)
        if done < 1 and not stopped:
            done = show_what_is_due(run, log, show_due, bool(samples_asked), done)

    stop.release()
    return conclude(run, log, stopped, done)


def conclude(run: Run, log: Log, stopped: int, done: float) -> int:
    """Do what is left after the last step; returns the exit code as `train` does."""
    if run.saver is not None:
        run.saver.wait()
    if stopped:
        log.close(f"stopped by signal {stopped}; go on with checkpoint.resume=auto")
        return 128 + stopped
    if done < 1:
        config = run.config
        log.close(
            f"stopped: {config.train.max_bad_steps} steps in a row had a gradient that is not finite; none changed the"
            f" weights. The checkpoints are good. Lower optim.lr (now {config.optim.lr}) and go on with checkpoint.resume=auto"
        )
        return DIVERGED
    with averaged_weights(run.ema, run.task.module):
        finish(run, log)
    return 0


def wishes_of(run: Run, stop: StopSignal) -> tuple[int, int, int]:
    """The signal by which this process is to stop, or 0; whether a checkpoint and whether samples were requested."""
    asked = requests.take(run.output_dir) if run.accelerator.is_main_process else set()
    number = stop.number or (signal.SIGINT if "stop" in asked else 0)
    return number, "save" in asked, "sample" in asked


def open_batches(run: Run) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of this process, from the run's current position on."""
    if run.stream is not None:
        return iter(run.stream)
    place = {"rank": run.accelerator.process_index, "num_processes": run.accelerator.num_processes}
    return batches(run.task.data, run.config, **place, start=run.state["images_seen"])


def new_messages(run: Run) -> list[str]:
    """Messages from background pushes and from the stream since the last call."""
    return [*run.pushes.new_messages(), *(run.stream.new_messages() if run.stream is not None else [])]


def make_up_for(run: Run, log: Log) -> None:
    """Do what was due at the step of the checkpoint that the run resumes from, but was cut off."""
    config, state = run.config, run.state
    if run.checkpoint is None or fraction_done(config, state) >= 1:
        return
    if is_due(config.hub.every_steps, state):
        push_checkpoint(run)
    if is_due(config.validation.every_steps, state) and not run_on_main(run.accelerator, log.was_validated, state["step"]):
        show_and_validate(run, log)


def is_out_of_patience(run: Run) -> bool:
    """Whether the last `train.patience` validations gave no better score; all processes must call this and get the same."""
    patience = run.config.train.patience
    if patience is None:
        return False
    by, step = run.config.checkpoint.best_by, run.state["step"]
    return run_on_main(run.accelerator, best.validations_since, run.output_dir, by, step) >= patience


def show_what_is_due(run: Run, log: Log, validation_due: bool, samples_asked: bool, done: float) -> float:
    """Validate, or draw the samples that were requested; returns the fraction done, 1 if no score was better for too long."""
    if not validation_due:
        if samples_asked:
            with averaged_weights(run.ema, run.task.module):
                log.show(run.state["step"], *run.task.samples())
        return done
    show_and_validate(run, log)
    if not is_out_of_patience(run):
        return done
    by, patience = run.config.checkpoint.best_by, run.config.train.patience
    log.say(f"{by} did not improve in {patience} validations, so the run ends at step {run.state['step']:,}; see best/")
    run.state["ended_early"] = True
    is_saved = run.checkpoint is not None and run.checkpoint.name == f"step-{run.state['step']:08d}"
    if not run_on_main(run.accelerator, bool, is_saved):
        log.sync()
        run.checkpoint = save(run, last=True) or run.checkpoint
    return 1.0


def show_and_validate(run: Run, log: Log) -> None:
    """Show a grid of samples and measure on held-out data, with the averaged weights."""
    with averaged_weights(run.ema, run.task.module):
        log.show(run.state["step"], *run.task.samples())
        validate(run, log)


def validate(run: Run, log: Log, last: bool = False) -> tuple[dict[str, float], str]:
    """Measure on held-out data; if this is the best model so far by `checkpoint.best_by`, keep it in `best/`.

    Returns:
        The task's own scores and their label, if `best_by` needs them or this is the `last` time; else nothing.
    """
    by = run.config.checkpoint.best_by
    task = run.task
    own_scores = {}
    label = ""
    scores = task.held_out()
    if last or (by is not None and by not in scores):
        own_scores, label = task.scores()
    scores |= own_scores
    if by is not None and best.is_better(by, scores[by], run.best):
        run.best = scores[by]
        write = task.checkpoint_writer(run.state)
        if run.accelerator.is_main_process:
            best.save_best(write, run.output_dir / "best", name=by, value=run.best, step=run.state["step"])
    log.write_validation({**progress(run.state), **scores})  # last: a resumed run takes it as the sign that all is done
    return own_scores, label


def finish(run: Run, log: Log) -> None:
    """Draw the last grid, compute the scores if there are any, and write the task's result."""
    log.say("training is done; drawing the last samples, measuring on held-out data and writing the model")
    captions, images = run.task.samples()
    log.show(run.state["step"], captions, images)
    scores, label = validate(run, log, last=True)
    outcome = Outcome(captions=captions, images=images, scores=scores, scores_label=label, checkpoint=run.checkpoint)
    *messages, last = run.task.finish(run.state, outcome)
    for line in messages:
        log.say(line)
    if run.accelerator.is_main_process:
        write_finished(run, pushed=None)
    log.close(last)


def tell_finished(run: Run) -> bool:
    """Whether the run was already finished; says so, since nothing is done then."""
    if run.finished:
        more = "for more, raise train.max_steps or train.max_minutes"
        run.accelerator.print(f"the run in {run.output_dir} is finished, at step {run.state['step']:,}; {more}")
    return run.finished


def read_finished(run: Run) -> dict[str, Any]:
    """What `finished.json` says about a finished run, such as its `step` and where it was `pushed`; empty before."""
    lines = read_lines(run.output_dir / "finished.json")
    return json.loads(lines[0]) if lines else {}


def settings_hash(config: Config) -> str:
    """A hash of all settings that differ from their default, except how the run is resumed, so that a setting that a later
    version adds does not change a finished run.
    """
    same = replace(config, checkpoint=replace(config.checkpoint, resume=None))
    default = resume.flat(asdict(default_config()))
    changed = {key: value for key, value in resume.flat(asdict(same)).items() if value != default.get(key)}
    return hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_finished(run: Run, pushed: str | None) -> None:
    """Record that the run is finished, after everything that belongs to it."""
    new = run.output_dir / "finished.json.new"
    note = {"step": run.state["step"], "settings": settings_hash(run.config), "pushed": pushed}
    new.write_text(json.dumps(note) + "\n")
    new.replace(run.output_dir / "finished.json")


def fraction_done(config: Config, state: dict) -> float:
    """The fraction of the run that is done, by steps or by minutes, whichever is greater; learning rates follow it."""
    if state.get("ended_early"):
        return 1.0
    by_steps = state["step"] / config.train.max_steps if config.train.max_steps else 0.0
    by_time = state["seconds"] / 60 / config.train.max_minutes if config.train.max_minutes else 0.0
    return max(by_steps, by_time)


def save(run: Run, last: bool) -> Path | None:
    """Write a checkpoint, from the first process; the others take part if weights are sharded or data are streamed.

    The `last` one is complete when this returns.
    """
    accelerator = run.accelerator
    main, sharded = accelerator.is_main_process, is_sharded(run.task.module)
    stream = {} if run.stream is None else run.stream.state(gather_object)
    if not main and not sharded:
        return None
    scaler = accelerator.scaler
    stored = {
        **run.state,
        "ema_step": run.ema.optimization_step,
        "task": run.task.state(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        **({"stream": stream} if stream else {}),
        **run.origin,
    }

    def write(new: Path, folder: Path) -> None:
        if sharded:  # no process ever holds the whole: the model is put together at the end
            run.task.write_what_is_whole(new)
            return
        with averaged_weights(run.ema, run.task.module):
            run.task.checkpoint_writer(run.state)(new, folder)

    folder = checkpoints.save(
        run.output_dir,
        checkpoints.collect(run.task.module, run.optimizer, run.ema),
        write,
        stored,
        run.config.checkpoint.keep,
        rank=accelerator.process_index if sharded else 0,
        world=accelerator.num_processes if sharded else 1,
        saver=run.saver,
    )
    if run.saver is not None and last:
        run.saver.wait()
    return folder


def push_checkpoint(run: Run) -> None:
    """Push the newest checkpoint in the background, to a branch of its own; from the first process."""
    if not run.accelerator.is_main_process:
        return
    assert run.checkpoint is not None
    target = hub.Target(
        repo_id=str(run.config.hub.repo_id), private=run.config.hub.private, branch=f"step-{run.state['step']}"
    )
    run.pushes.start(run.checkpoint / "pipeline", target)


def push_result(run: Run) -> int:
    """Push `pipeline/`, from the first process; a failure is reported and costs nothing but the push.

    Returns:
        0 pushed, or not asked for; 5 not pushed.
    """
    h, folder = run.config.hub, run.output_dir / "pipeline"
    if not run.accelerator.is_main_process:
        return 0
    run.pushes.wait()
    for line in run.pushes.new_messages():
        print(line)
    if not h.push or (run.finished and read_finished(run).get("pushed")):
        return 0
    try:
        message = f"Step {run.state['step']}, trained with Sfumato"
        target = hub.Target(repo_id=str(h.repo_id), private=h.private, tag=h.tag, pull_request=h.pull_request)
        address = hub.push(folder, target, message=message)
        print(f"pushed {address}")
        write_finished(run, pushed=address)
        return 0
    except hub.CannotPush as error:
        print(f"sfumato: not pushed: {error}. Later:  sfumato push {folder} {h.repo_id}", file=sys.stderr)
        return NOT_PUSHED


def progress(state: dict[str, Any]) -> dict[str, Any]:
    """The part of the state that metrics report."""
    return {key: value for key, value in state.items() if key not in ("changes", "stream_version", "ended_early")}


def is_due(steps: int | None, state: dict[str, Any]) -> bool:
    """Whether something that happens every `steps` steps is due at this one; never for None."""
    return steps is not None and state["step"] % steps == 0
