"""`sfumato doctor CONFIG`: look at data, settings and results before and after a run, and say what to do."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image

from sfumato.figures import grid, to_pil
from sfumato.files import read_lines
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.registries import TASKS
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import ArraySet
from sfumato.training.data.loader import batches
from sfumato.training.data.prepare import prepare
from sfumato.training.data.streams import STREAM_VERSION, streams_of
from sfumato.training.engine import checkpoints
from sfumato.training.engine.ema import EMA
from sfumato.training.engine.optimizers import build_optimizer, take_step
from sfumato.training.engine.processes import num_threads
from sfumato.training.models.parameters import trained_parameters
from sfumato.training.models.state_files import StateFiles
from sfumato.training.tasks.protocol import Task, TaskContext

SLOW = 10.0  # seconds per step above which nothing is timed again


@dataclass
class Finding:
    """One thing the doctor saw. `severity`: `fine`, `note`, `warning` or `error`."""

    severity: str
    what: str
    reason: str = ""
    advice: str = ""

    def __str__(self) -> str:
        tail = f"\n           {self.reason} {self.advice}".rstrip() if self.reason or self.advice else ""
        return f"{self.severity:8}   {self.what}{tail}"


def examine(config: Config, *, verify: bool = False) -> list[Finding]:
    """Everything the doctor can tell about a config, its data and, if the run is done, its result.

    `verify`: whether all bytes of the prepared set are compared with their hash.

    Writes `doctor.png`, a contact sheet of up to 64 training images with their captions, into `output_dir`.

    Raises:
        ValueError: the data or the settings cannot be used at all.
    """
    images = prepare(config.data)
    if verify and not images.verify():
        cure = "remove this folder, and it is prepared again"
        raise ValueError(f"the prepared set {images.folder} does not hold the bytes that were prepared; {cure}")
    task = build_task(config, images, cpu=not torch.accelerator.is_available())
    findings = _data(config, images)
    pipe: SfumatoPipeline | None = getattr(task, "pipe", None)
    if pipe is not None:
        findings += _captions(config, images, pipe) + _schedule(config, pipe)
    findings += _cost(config, images, task)
    folder = Path(config.output_dir)
    if (folder / "pipeline" / "model_index.json").is_file():
        findings += _result(config, folder, images)
    return findings


def build_task(config: Config, images: ArraySet, *, cpu: bool) -> Task:
    """The task of a config on this process alone."""
    if cpu:
        torch.set_num_threads(num_threads(config))
    accelerator = Accelerator(cpu=cpu, mixed_precision=config.train.mixed_precision)
    streams = streams_of(STREAM_VERSION, config.seed)
    return TASKS.load(config.task)(TaskContext(config=config, images=images, accelerator=accelerator, streams=streams))


def contact_sheet(images: ArraySet, count: int = 64) -> Image.Image:
    """Up to `count` training images, evenly spread, with their first captions."""
    chosen = images.select("train")
    chosen = chosen[:: max(1, len(chosen) // count)][:count]
    drawn = [images.picture(int(i)) for i in chosen]
    tiles = [to_pil(p) for p in drawn]
    return grid(tiles, [images[int(i)]["captions"][0] for i in chosen], columns=8, min_side=96)


def _data(config: Config, images: ArraySet) -> list[Finding]:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(images).save(folder / "doctor.png")
    train, num_bad = images.select("train"), sum(map(len, images.skipped.values()))
    sample = train[:: max(1, len(train) // 5000)]
    values = [images.image(int(i)) for i in sample]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    findings = [
        Finding("fine", f"{len(train)} training images, {len(images) - len(train)} held out; see {folder / 'doctor.png'}"),
        Finding("fine", f"pixels from {low:.3g} to {high:.3g}, of 0 to 255 (-1 to 1 for the network)")
        if high - low > 100 or images.dtype != np.uint8
        else Finding(
            "warning", f"pixels from {low:.3g} to {high:.3g}", "The images have hardly any contrast.", "Look at them."
        ),
        Finding("note" if num_bad else "fine", f"{num_bad} of {num_bad + len(images)} records cannot be used"),
    ]
    findings += [Finding("note", f"{len(names)} {reason}: {', '.join(names[:3])}") for reason, names in images.skipped.items()]
    findings += [
        Finding("note", f"{len(names)} left out, {why}: {', '.join(names[:3])}") for why, names in images.left_out.items()
    ]
    findings += [Finding("note", f"{count} {what}") for what, count in images.noted.items()]
    first: dict[bytes, int] = {}
    copies = [images[int(i)]["id"] for i, value in zip(sample, values) if first.setdefault(value.tobytes(), int(i)) != int(i)]
    if copies:
        share = len(copies) / len(values)
        findings.append(
            Finding(
                "warning" if share > 0.05 else "note",
                f"{share:.1%} of {len(values)} images looked at are copies of another: {', '.join(copies[:3])}",
                "Copies are memorised first.",
                "Remove them, or join their captions.",
            )
        )
    if len(train) < 100:
        findings.append(Finding("warning", f"only {len(train)} training images", "The model will repeat them.", "Add images."))
    return findings


def _captions(config: Config, images: ArraySet, pipe: SfumatoPipeline) -> list[Finding]:
    captions, limit = images.training_captions(limit=20_000), pipe.tokenizer.model_max_length
    lengths = np.array([len(ids) for ids in pipe.tokenizer(captions, verbose=False).input_ids])
    long = (lengths > limit).mean()
    findings = [
        Finding("fine", f"captions have {np.median(lengths):.0f} tokens (median) to {lengths.max()}, of {limit}")
        if not long
        else Finding(
            "warning",
            f"{long:.1%} of the captions are longer than {limit} tokens",
            "Their ends are never seen.",
            f"Set text_encoder.max_length={lengths.max()}.",
        )
    ]
    enough = max(16, 2 * lengths.max())  # prompts may be longer than captions
    if enough < limit and config.init_from is None and config.text_encoder.pretrained is None:
        findings.append(
            Finding("note", "captions fill less than half of the tokens", "", f"text_encoder.max_length={enough} is enough.")
        )
    if len(set(captions)) == 1:
        findings.append(
            Finding("warning", "all captions are the same", "Text cannot steer the model.", "Describe the images.")
        )
    dropout = config.objective.caption_dropout
    if dropout == 0 and config.task != "distillation":  # a student learns what guidance gives, and needs no second pass
        findings.append(
            Finding(
                "warning",
                "no caption is ever dropped",
                "Guidance needs a prediction without text.",
                "Set objective.caption_dropout=0.1.",
            )
        )
    elif dropout > 0.5:
        findings.append(
            Finding("warning", f"{dropout:.0%} of the captions are dropped", "Text is learned slowly.", "Use 0.1.")
        )
    else:
        findings.append(Finding("fine", f"{dropout:.0%} of the captions are dropped, for guidance"))
    return findings


def _schedule(config: Config, pipe: SfumatoPipeline) -> list[Finding]:
    scheduler = pipe.scheduler
    height, width = (side // pipe.vae_scale_factor for side in pipe.trained_size)
    terminal = float(scheduler.snr(scheduler.training_levels()[-1]))
    # An image's mean survives noise that its single pixels do not: averaging n values raises the SNR n times.
    mean_snr = terminal * height * width
    what = f"the last noise level leaves an SNR of {mean_snr:.1e} for an image's mean, {terminal:.1e} for a value"
    findings = [
        Finding("fine", what)
        if mean_snr < 0.05
        else Finding(
            "warning",
            what,
            "Sampling starts from pure noise, which training never shows: brightness comes out wrong (Lin et al. 2024).",
            "Use scheduler.beta_schedule=cosine, or rescale_betas_zero_snr=true with v_prediction or sample.",
        )
    ]
    if config.objective.min_snr_floor == 0 and config.objective.weight == "min_snr" and terminal == 0:
        findings.append(
            Finding(
                "note",
                "the last noise level has weight 0",
                "min_snr follows the SNR down to zero.",
                "objective.min_snr_floor=0.2 trains it.",
            )
        )
    return findings


def _cost(config: Config, images: ArraySet, task: Task) -> list[Finding]:
    """Batch arithmetic, and memory, time and disk, by three real steps on one process of this machine."""
    device, parameters = task.accelerator.device.type, trained_parameters(task.module)
    optimizer = cast(AcceleratedOptimizer, task.accelerator.prepare(build_optimizer(config.optim, parameters)))
    ema = EMA(parameters, config.ema.decay)
    loader = batches(task.data, config)

    def seconds_a_step() -> float:
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            with task.accelerator.autocast():
                loss = task.loss(task.module, next(loader))
            task.accelerator.backward(loss)
            _, is_finite = take_step(task.accelerator, optimizer, parameters, config.optim.max_grad_norm)
            optimizer.zero_grad()
            ema.step(parameters, is_finite)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[1:])) * config.train.gradient_accumulation_steps

    step = seconds_a_step()
    count, train = sum(p.numel() for p in parameters), len(images.select("train"))
    total = sum(p.numel() for p in task.module.parameters())
    a_step = config.train.batch_size * config.train.gradient_accumulation_steps
    by_time = config.train.max_minutes * 60 / step if config.train.max_minutes else math.inf
    steps = int(min(config.train.max_steps or math.inf, by_time))
    minutes = steps * step / 60
    checkpoint = 4 * (4 * count + total)
    run_bytes = (config.checkpoint.keep + 2) * checkpoint
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(config.output_dir).free
    findings = [
        Finding("fine", f"{count:,} weights are trained, of {total:,}"),
        Finding("fine", f"{a_step} images per step on each process; {train / a_step:.1f} steps are an epoch on one process")
        if a_step <= train
        else Finding(
            "warning",
            f"{a_step} images per step on each process, of {train} training images",
            "Each step sees some of them several times.",
            f"Lower train.batch_size to {train // config.train.gradient_accumulation_steps or 1} or less.",
        ),
        Finding("fine", f"a step takes {step * 1000:.0f} ms on one {device} process, {a_step / step:.0f} images/s"),
        Finding("fine", f"{steps:,} steps, {steps * a_step / train:.1f} epochs, {minutes:.0f} minutes on one process")
        if minutes < 24 * 60
        else Finding(
            "warning",
            f"{steps:,} steps take {minutes / 1440:.0f} days on one process of this machine",
            "It is sized for a faster one.",
            "Set train.max_minutes, or take a smaller network, as configs/folder_cpu.yaml has it.",
        ),
        Finding(
            "fine" if run_bytes < free_bytes else "error",
            f"a checkpoint takes {checkpoint / 1e6:.0f} MB, the run up to {run_bytes / 1e6:.0f} MB; "
            f"{free_bytes / 1e6:.0f} MB are free",
            "" if run_bytes < free_bytes else "Saving would fail.",
            "" if run_bytes < free_bytes else "Make room, or lower checkpoint.keep.",
        ),
        Finding("fine", f"weights, gradients, averages and optimizer take {4 * 5 * count / 1e6:.0f} MB, plus activations"),
    ]
    if device == "cpu":
        findings += _threads(step, seconds_a_step)
    if device == "cuda":
        findings.append(Finding("fine", f"peak GPU memory: {torch.cuda.max_memory_allocated() / 1e6:.0f} MB"))
    if steps < 1000:
        findings.append(
            Finding(
                "warning",
                f"only {steps} steps",
                "Images need a thousand or more.",
                "Train longer, or with a smaller network or batch.",
            )
        )
    return findings


def _threads(step: float, seconds_a_step: Callable[[], float]) -> list[Finding]:
    """Whether one thread is faster than several, as when other programs use the cores."""
    count = torch.get_num_threads()
    if count == 1 or step > SLOW:
        return []
    torch.set_num_threads(1)
    try:
        alone = seconds_a_step()
    finally:
        torch.set_num_threads(count)
    if step < 1.2 * alone:
        return [Finding("fine", f"{count} threads; a step takes {alone / step:.1f} times as long on one")]
    what = f"one thread is {step / alone:.1f} times as fast as {count} are now"
    return [Finding("warning", what, "Other programs use the cores.", "Set train.num_threads=1.")]


def _result(config: Config, folder: Path, images: ArraySet) -> list[Finding]:
    """What a finished run's images and weights look like."""
    findings, newest = [], reversed(checkpoints.list_checkpoints(folder))
    whole = next((saved for saved in newest if checkpoints.find_damage(saved) is None), None)
    if whole is not None:
        distance = norm = 0.0
        with StateFiles(whole) as files:
            for name in (name for name in files if name.startswith("raw.")):
                raw = files.read(name)
                distance += float((files.read(name.replace("raw.", "ema.", 1)) - raw).square().sum())
                norm += float(raw.square().sum())
        distance = (distance / norm) ** 0.5
        findings.append(
            Finding("fine", f"averaged weights are {distance:.1%} away from the last ones")
            if distance < 0.3
            else Finding(
                "warning",
                f"averaged weights are {distance:.0%} away from the last ones",
                "The average reaches too far back for so short a run, or the learning rate ended high.",
                "Lower ema.decay, or let the rate decay.",
            )
        )
    pipe = SfumatoPipeline.from_pretrained(folder / "pipeline")
    if pipe.reads == "low_res" or pipe.controlnet is not None:  # these draw from more than captions; the run's grids show them
        return findings + _skipped(folder)
    train = images.select("train")
    train = train[images.table["bucket"][train] == images.table["bucket"][train[0]]]  # of one size
    chosen = [int(i) for i in train[:: max(1, len(train) // 8)][:8]]
    prompts = [images[i]["captions"][0] for i in chosen]
    v = config.validation
    call = {"num_inference_steps": v.num_inference_steps, "guidance_scale": v.guidance_scale, "output_type": "np"}
    drawn = np.stack(draw_in_batches(pipe, prompts, **call))
    findings += judge_samples(drawn, np.stack([images.image(i) for i in chosen]) / 255)
    return findings + _skipped(folder)


def _skipped(folder: Path) -> list[Finding]:
    lines = read_lines(folder / "metrics.jsonl")
    count = json.loads(lines[-1])["skipped_steps"] if lines else 0
    what = f"{count} steps had a gradient that is not finite"
    return [Finding("warning", what, "They were left out.", "Lower optim.lr.")] if count else []


def judge_samples(images: np.ndarray, data: np.ndarray) -> list[Finding]:
    """Dead, identical or tinted samples; both arrays `(N, H, W, C)` in [0, 1], of the same captions."""
    findings = []
    contrast, data_contrast = images.std((1, 2)).mean(), data.std((1, 2)).mean()
    if contrast < 0.2 * data_contrast:
        findings.append(
            Finding(
                "error",
                f"samples are dead: contrast {contrast:.3f}, data {data_contrast:.3f}",
                "Nothing was learned.",
                "Train longer or with a lower optim.lr.",
            )
        )
    spread, data_spread = images.std(0).mean(), data.std(0).mean()
    if spread < 0.2 * data_spread:
        findings.append(
            Finding(
                "error",
                f"samples are all alike: spread {spread:.3f}, data {data_spread:.3f}",
                "The captions have no effect.",
                "Train longer; see caption_dropout and guidance_scale.",
            )
        )
    tint = images.mean((0, 1, 2)) - data.mean((0, 1, 2))
    if np.abs(tint).max() > 0.1:
        findings.append(
            Finding(
                "warning",
                f"samples are tinted by {', '.join(f'{value:+.2f}' for value in tint)} of 1",
                "Brightness is decided at the noisiest levels.",
                "See the last noise level above; train it more.",
            )
        )
    return findings or [Finding("fine", "samples have the data's contrast, variety and colour")]
