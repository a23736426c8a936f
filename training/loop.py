"""The one training loop, top to bottom."""

import json
import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.training import checkpoints, evaluation, openmoji
from sfumato.training import config as configs
from sfumato.training.build import Denoiser, build_pipeline
from sfumato.training.data import PictureSet, batches, noise_for
from sfumato.training.data import prepare as prepare_data
from sfumato.training.latents import encode
from sfumato.training.objectives import loss_weight, lr_scale, sample_timesteps, weighted_mse
from sfumato.training.tracking import Log

DIVERGED = 3


@dataclass
class Run:
    """All that a training run works with."""

    config: configs.Config
    accelerator: Accelerator
    pictures: PictureSet
    pipe: SfumatoPipeline
    denoiser: Denoiser  # the pipeline's UNet and text encoder
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    state: dict  # how far the run is; what a checkpoint keeps

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)


def prepare(config: configs.Config) -> Run:
    """Check and build everything that can go wrong before the first step.

    Raises:
        ValueError: a setting, the data or the checkpoint cannot be used; says why.
    """
    transformers_logging.disable_progress_bar()
    checkpoint = checkpoints.find(config.checkpoint.resume, Path(config.output_dir))
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # several processes without a GPU: Accelerate wants to be told
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
    )
    if accelerator.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(config.train.num_threads or max(1, (os.cpu_count() or 1) // local))
    with accelerator.local_main_process_first():
        pictures = prepare_data(config.data)
    captions = pictures.training_captions()
    pipe = build_pipeline(config, captions)
    warn_of_long_captions(pipe, captions)
    pipe.vae.to(accelerator.device)
    denoiser = Denoiser(pipe.unet, pipe.text_encoder).to(accelerator.device)
    parameters, o = checkpoints.trained(denoiser), config.optim
    optimizer = torch.optim.AdamW(
        parameters, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    ema = EMAModel(parameters, decay=config.ema.decay, foreach=True)
    state = {"step": 0, "images_seen": 0, "seconds": 0.0, "skipped_steps": 0}
    if checkpoint:
        pipe.register_modules(tokenizer=CLIPTokenizer.from_pretrained(checkpoint / "pipeline" / "tokenizer"))
        state = checkpoints.restore(checkpoint, denoiser, optimizer, ema)
        accelerator.print(f"goes on from {checkpoint}")
    return Run(config, accelerator, pictures, pipe, denoiser, optimizer, ema, state)


def warn_of_long_captions(pipe: SfumatoPipeline, captions: list[str]) -> None:
    """Say how many captions lose their end to the token limit; nothing is cut in silence."""
    limit = pipe.tokenizer.model_max_length
    lengths = [len(ids) for ids in pipe.tokenizer(captions, verbose=False).input_ids]
    if long := sum(length > limit for length in lengths):
        warnings.warn(
            f"{long} of {len(captions)} captions are longer than {limit} tokens and are cut; "
            f"text_encoder.max_length={max(lengths)} would hold them all",
            stacklevel=2,
        )


def facts(run: Run) -> dict:
    """What the model card tells of this run."""
    c, state = run.config, run.state
    known = {
        "title": c.title,
        "data": f"{c.data.name}, {len(run.pictures.select('train'))} training pictures",
        "steps": state["step"],
        "pictures seen": state["images_seen"],
        "training time": f"{state['seconds'] / 60:.1f} minutes",
        "hardware": f"{run.accelerator.num_processes} x {run.accelerator.device.type}",
        "batch size": c.train.batch_size * c.train.gradient_accumulation_steps * run.accelerator.num_processes,
        "learning rate": c.optim.lr,
        "weights": f"EMA, decay {c.ema.decay}",
        "caption dropout": c.objective.caption_dropout,
        "guidance_scale": c.validation.guidance_scale,
    }
    if c.data.name == "openmoji":
        known |= {"license": openmoji.LICENSE, "language": c.data.languages, "data licence": openmoji.ATTRIBUTION}
    return known


def train(run: Run) -> int:
    """Train to the end, to a signal, or until the loss diverges; leaves checkpoints and, at the end, `pipeline/`.

    Returns:
        0 done, 3 diverged, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
    """
    c, accelerator, pipe, state, ema = run.config, run.accelerator, run.pipe, run.state, run.ema
    scheduler, device, prediction_type = pipe.scheduler, accelerator.device, pipe.scheduler.config.prediction_type
    parameters = checkpoints.trained(run.denoiser)
    denoiser, optimizer = accelerator.prepare(run.denoiser, run.optimizer)
    snr = scheduler.snr(torch.arange(scheduler.config.num_train_timesteps)).to(device)
    loader = batches(
        run.pictures, c, pipe.tokenizer, accelerator.process_index, accelerator.num_processes, start=state["images_seen"]
    )
    log = Log(c, accelerator, run.pictures, pipe, state["step"])
    stop = StopSignal()
    bad_in_a_row, started = 0, time.monotonic() - state["seconds"]
    done, stopped = fraction_done(c, state), 0

    while done < 1 and not stopped and bad_in_a_row < c.train.max_bad_steps:
        # One optimizer step: draw x_0, eps and t, noise, predict, compare; summed over the accumulated batches.
        losses = []
        for _ in range(c.train.gradient_accumulation_steps):
            batch = next(loader)
            with accelerator.accumulate(denoiser):
                x_0 = encode(pipe.vae, batch["pixel_values"].to(device))
                noise = noise_for(batch["noise_seed"], x_0.shape[1:], device)
                t = sample_timesteps(
                    batch["u"].to(device), snr, c.objective.timesteps, c.objective.log_snr_mean, c.objective.log_snr_std
                )
                x_t = scheduler.add_noise(x_0, noise, t)
                prediction = denoiser(x_t, t, batch["input_ids"].to(device))
                target = scheduler.training_target(x_0, noise, t)
                weight = loss_weight(
                    snr[t], prediction_type, c.objective.weight, c.objective.min_snr_gamma, c.objective.min_snr_floor
                )
                loss = weighted_mse(prediction, target, weight)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    lr = c.optim.lr * lr_scale(state["step"], done, c.optim.lr_warmup_steps, c.optim.lr_decay)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    grad_norm = accelerator.clip_grad_norm_(parameters, c.optim.max_grad_norm)
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
        due = (every(c.checkpoint.every_steps, state) and finite) or stopped or done >= 1
        if due and accelerator.is_main_process:
            checkpoints.save(run.output_dir, run.denoiser, run.optimizer, ema, pipe, state, facts(run), c.checkpoint.keep)
        if every(c.validation.every_steps, state) and done < 1:
            with checkpoints.averaged(ema, run.denoiser):
                log.preview(state["step"])

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


def fraction_done(config: configs.Config, state: dict) -> float:
    """How much of the run is done, by steps or by minutes, whichever is further; learning rates follow it."""
    by_steps = state["step"] / config.train.max_steps if config.train.max_steps else 0.0
    by_time = state["seconds"] / 60 / config.train.max_minutes if config.train.max_minutes else 0.0
    return max(by_steps, by_time)


def every(steps: int | None, state: dict) -> bool:
    return steps is not None and state["step"] % steps == 0


def finish(run: Run, log: Log) -> None:
    """Last grid, scores where they can be had, and the exported folder."""
    prompts, pictures = log.preview(run.state["step"])
    known = facts(run)
    if run.config.data.name == "shapes":
        scores = evaluation.evaluate_shapes(run.pipe, run.config.validation, run.accelerator)
        known["obedience on held-out captions"] = ", ".join(f"{name} {share:.1%}" for name, share in scores.items())
        if run.accelerator.is_main_process:
            (run.output_dir / "evaluation.json").write_text(json.dumps(scores, indent=2))
        log.say("right on held-out captions: " + known["obedience on held-out captions"])
    folder = run.output_dir / "pipeline"
    if run.accelerator.is_main_process:
        export_pipeline(run.pipe, folder, known, list(zip(prompts, pictures)))
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
