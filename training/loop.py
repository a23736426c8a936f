"""The one training loop, top to bottom."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from filelock import FileLock, Timeout
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.training import checkpoints, evaluation, facts, hub
from sfumato.training import config as configs
from sfumato.training.build import Denoiser, build_pipeline, warn_of_long_captions
from sfumato.training.data import batches, noise_for
from sfumato.training.ema import EMA
from sfumato.training.latents import cached_latents, cached_texts, encode, is_identity
from sfumato.training.objectives import loss_weight, lr_scale, sample_timesteps, weighted_mse
from sfumato.training.optimizers import build_optimizer
from sfumato.training.pictures import PictureSet
from sfumato.training.pictures import prepare as prepare_pictures
from sfumato.training.tracking import Log, trackers

DIVERGED, NOT_PUSHED = 3, 5
PATIENCE = 20  # seconds for the data workers of a trainer that was killed to notice


@dataclass
class Run:
    """All that a training run works with."""

    config: configs.Config
    accelerator: Accelerator
    pictures: PictureSet
    texts: np.ndarray  # token ids or embeddings of every caption
    latents: np.ndarray | None  # x_0 of every picture, where kept
    pipe: SfumatoPipeline
    denoiser: Denoiser  # the pipeline's UNet and text encoder
    model: torch.nn.Module  # the denoiser as Accelerate runs it
    optimizer: torch.optim.Optimizer
    ema: EMA
    state: dict  # how far the run is; what a checkpoint keeps
    saved: Path | None  # the newest checkpoint
    origin: dict  # what else its numbers depend on
    pushes: hub.BackgroundPush  # of checkpoints, to the Hub
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
    """Model, optimizer and averages, from random weights or from a checkpoint."""
    checkpoint = on_main(
        accelerator, checkpoints.find, config.checkpoint.resume, Path(config.output_dir), config.checkpoint.every_steps
    )
    captions = pictures.training_captions()
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "pipeline" / "tokenizer") if checkpoint else None
    pipe = build_pipeline(config, captions, tokenizer)
    warn_of_long_captions(pipe, captions)
    if config.validation.num_inference_steps > pipe.scheduler.config.num_train_timesteps:
        raise ValueError(
            f"validation.num_inference_steps={config.validation.num_inference_steps}: "
            f"the model has {pipe.scheduler.config.num_train_timesteps} steps"
        )
    evaluation.as_drawn(pipe, config.validation)
    pipe.vae.to(accelerator.device)
    denoiser = Denoiser(pipe.unet, pipe.text_encoder).to(accelerator.device)
    if config.train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if config.train.compile == "unet":
        pipe.unet.compile()
    elif config.train.compile == "regional":
        pipe.unet.compile_repeated_blocks()
    texts, latents = cached(config, pictures, pipe)
    origin = checkpoints.origin(config, accelerator, pictures, pipe)
    optimizer = build_optimizer(config.optim, checkpoints.trained(denoiser))
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    ema = EMA(checkpoints.trained(denoiser), config.ema.decay, config.ema.offload)
    state = {"step": 0, "images_seen": 0, "seconds": 0.0, "skipped_steps": 0}
    if checkpoint:
        stored = checkpoints.read_state(checkpoint)
        checkpoints.restore(checkpoint, denoiser, optimizer, ema)
        ema.optimization_step = stored["ema_step"]
        if accelerator.scaler is not None and stored["scaler"]:
            accelerator.scaler.load_state_dict(stored["scaler"])
        state = {key: stored[key] for key in state}
        if pictures.several_sizes:  # where the batch size changed, blocks of one size begin elsewhere
            block = config.train.batch_size * accelerator.num_processes
            state["images_seen"] = -(-state["images_seen"] // block) * block
        accelerator.print(f"goes on from {checkpoint}")
        for line in checkpoints.differences(stored, origin):
            accelerator.print(f"  {line}")
    pushes = hub.BackgroundPush(Path(config.output_dir) / ".push")
    return Run(
        config,
        accelerator,
        pictures,
        texts,
        latents,
        pipe,
        denoiser,
        model,
        optimizer,
        ema,
        state,
        checkpoint,
        origin,
        pushes,
        lock,
    )


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
        torch.set_num_threads(config.train.num_threads or max(1, (os.cpu_count() or 1) // local))
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


def cached(config: configs.Config, pictures: PictureSet, pipe: SfumatoPipeline) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids or embeddings of all captions, and latents of all pictures where they are to be kept.

    Raises:
        ValueError: embeddings of a text encoder that is trained, or latents of a pixel model.
    """
    data, latents = config.data, None
    if data.cache_latents and is_identity(pipe.vae):
        raise ValueError("data.cache_latents=true: a pixel model has no latents to keep; leave it out")
    if data.cache_embeddings and any(parameter.requires_grad for parameter in pipe.text_encoder.parameters()):
        raise ValueError("data.cache_embeddings=true needs a frozen text encoder: text_encoder.train=false")
    if data.cache_latents:
        latents = cached_latents(pictures, pipe.vae, data.cache_dir)
    encoder = pipe.text_encoder if data.cache_embeddings else None
    return cached_texts(pictures, pipe.tokenizer, encoder, data.cache_dir), latents


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


def told(run: Run) -> dict:
    """What an exported folder says of the run."""
    known = facts.facts(run.config, run.accelerator, run.pictures, run.state)
    return {
        "facts": known,
        "metadata": facts.metadata(run.config, run.pictures, run.state),
        "settings": facts.public_settings(run.config),
    }


def train(run: Run) -> int:
    """Train to the end, to a signal, or until the loss diverges; leaves checkpoints and, at the end, `pipeline/`.

    Returns:
        0 done, 3 diverged, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
    """
    c, accelerator, pipe, state, ema = run.config, run.accelerator, run.pipe, run.state, run.ema
    scheduler, device, prediction_type = pipe.scheduler, accelerator.device, pipe.scheduler.config.prediction_type
    parameters, o = checkpoints.trained(run.denoiser), c.objective
    model, optimizer = run.model, run.optimizer
    snr = scheduler.snr(torch.arange(scheduler.config.num_train_timesteps)).to(device)
    rank, world = accelerator.process_index, accelerator.num_processes
    loader = batches(run.pictures, c, run.texts, rank, world, state["images_seen"], run.latents)
    log = Log(c, accelerator, run.pictures, state["step"])
    stop, pushes = StopSignal(), run.pushes
    bad_in_a_row, due, push_due, started = 0, False, False, time.monotonic() - state["seconds"]
    done, stopped = fraction_done(c, state), 0

    while done < 1 and not stopped and bad_in_a_row < c.train.max_bad_steps:
        # One optimizer step: draw x_0, eps and t, noise, predict, compare; summed over the accumulated batches.
        losses = []
        for _ in range(c.train.gradient_accumulation_steps):
            batch = next(loader)
            with accelerator.accumulate(model):
                x_0 = batch["x_0"].to(device) if "x_0" in batch else encode(pipe.vae, batch["pixel_values"].to(device))
                torch.manual_seed(int(batch["noise_seed"][0]))  # for dropout layers, if the model has any
                noise = noise_for(batch["noise_seed"], x_0.shape[1:], device)
                t = sample_timesteps(batch["u"].to(device), snr, o.timesteps, o.log_snr_mean, o.log_snr_std)
                x_t = scheduler.add_noise(x_0, noise, t)
                prediction = model(x_t, t, batch["text"].to(device))
                target = scheduler.training_target(x_0, noise, t)
                weight = loss_weight(snr[t], prediction_type, o.weight, o.min_snr_gamma, o.min_snr_floor)
                loss = weighted_mse(prediction, target, weight)
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
            {**state, "loss": pulse[:, 0].mean().item(), "lr": lr, "grad_norm": float(grad_norm), "done": round(done, 5)}
        )
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
        if every(c.validation.every_steps, state) and done < 1:
            with checkpoints.averaged(ema, run.denoiser):
                log.preview(state["step"], shareable(run))

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
    with checkpoints.averaged(ema, run.denoiser):
        finish(run, log)
    return 0


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
    if not main and not checkpoints.is_sharded(run.denoiser):
        return None
    scaler, tensors = run.accelerator.scaler, checkpoints.collect(run.denoiser, run.optimizer, run.ema)
    stored = {
        **run.state,
        "ema_step": run.ema.optimization_step,
        "scaler": scaler.state_dict() if scaler is not None else None,
        **run.origin,
    }
    with checkpoints.averaged(run.ema, run.denoiser):
        pipe = shareable(run)
        if main:
            return checkpoints.save(run.output_dir, tensors, pipe, stored, told(run), run.config.checkpoint.keep)


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


def shareable(run: Run) -> SfumatoPipeline:
    """The pipeline as it is drawn and exported: whole modules, the sampler and the guider of `validation`."""
    return evaluation.as_drawn(checkpoints.shareable(run.pipe, run.denoiser), run.config.validation)


def every(steps: int | None, state: dict) -> bool:
    return steps is not None and state["step"] % steps == 0


def finish(run: Run, log: Log) -> None:
    """Last grid, scores where they can be had, and the exported folder."""
    main, pipe = run.accelerator.is_main_process, shareable(run)
    prompts, pictures = log.preview(run.state["step"], pipe)
    known = told(run)
    if run.config.data.name == "shapes":
        scores = evaluation.evaluate_shapes(pipe, run.config, run.accelerator)
        n, line = run.config.validation.num_shapes, ", ".join(f"{name} {share:.1%}" for name, share in scores.items())
        known["facts"]["obedience to held-out captions"] = f"{line}; {n} captions, judged by a program"
        if main:
            (run.output_dir / "evaluation.json").write_text(json.dumps(scores, indent=2))
        log.say(f"right on held-out captions: {line}")
    folder = run.output_dir / "pipeline"
    if main:
        if run.config.lora.rank:
            checkpoints.save_lora(run.pipe, run.output_dir / "lora")
        h, curve = run.config.hub, facts.loss_curve(run.output_dir / "metrics.jsonl")
        raw = checkpoints.raw_weights(run.saved) if "raw" in h.variants else None
        export_pipeline(
            pipe, folder, samples=list(zip(prompts, pictures)), curve=curve, variants=h.variants, raw=raw,
            max_shard_size=h.max_shard_size, **known,
        )  # fmt: skip
    log.close(f"wrote {folder}. Open it with:  DiffusionPipeline.from_pretrained({str(folder)!r})")


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
