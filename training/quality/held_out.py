"""The loss on held-out images, comparable between recipes and independent of batch size and number of processes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import ArraySet
from sfumato.training.data.loader import Sample, SampleData, collate
from sfumato.training.data.streams import GOLDEN_RATIO, SeededStreams, Streams, noise_for
from sfumato.training.models.denoiser import Denoiser
from sfumato.training.models.parameters import plain_pipeline
from sfumato.training.quality.drawing import sample_indices

# Bands of log-SNR, in nats, from where only the layout of an image is left to where only its grain is missing.
EDGES = (-8, -6, -4, -2, 0, 2, 4, 6, 8)


class DenoisingTask(Protocol):
    """What this module needs of a task: `tasks.text_to_image.TextToImage` or a subclass."""

    config: Config
    images: ArraySet
    accelerator: Accelerator
    pipe: SfumatoPipeline
    module: torch.nn.Module
    data: SampleData
    snr: torch.Tensor

    def x_0(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Clean latents or pixels."""
        ...

    def predict(
        self,
        model: torch.nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        batch: dict[str, torch.Tensor],
        *,
        streams: Streams | None = None,
        always_estimate: bool = False,
    ) -> torch.Tensor:
        """The network's output for noisy latents."""
        ...


class Probe(NamedTuple):
    """One image at one noise level: the number of the image, that of the band, and the log-SNR."""

    index: int
    band: int
    log_snr: float


@torch.no_grad()
def held_out_loss(task: DenoisingTask, batch_size: int | None = None) -> dict[str, float]:
    """How well x_0 is recovered from x_t on held-out images (on training images if there are none), without guidance.

    Each of `validation.num_held_out` images is noised once in every band of `EDGES` that the noise schedule spans, at a
    level and with noise that depend only on the image and the band. The error is that of v, (1 + SNR) * mean squared
    error of x_0, so models can be compared whatever their target, loss weight and sampling of noise levels, and models
    with different schedules by the bands that both span. Call this with the averaged weights in place.

    Args:
        batch_size: as in training if not given; it does not affect the result.

    Returns:
        `held_out_loss`, the mean over the bands, and each band by its name, such as `held_out_loss -8 to -6`. If no
        images are held out, training images are used, and the name is `training_loss`.
    """
    accelerator, pipe = task.accelerator, plain_pipeline(task.pipe, task.module)
    name = "held_out_loss" if len(task.images.select("held_out")) else "training_loss"
    model = Denoiser(pipe.unet, pipe.text_encoder, pipe.controlnet)
    probes = list(_probes(task))
    mine = probes[accelerator.process_index :: accelerator.num_processes]
    errors: list[tuple[tuple[int, int], float]] = []
    for part in _batches(mine, task.images, batch_size or task.config.train.batch_size):
        values = _errors(task, model, part)
        errors += [((probe.index, probe.band), value) for probe, value in zip(part, values)]
    by_probe = dict(gather_object(errors))
    losses = {}
    for band in sorted({probe.band for probe in probes}):
        values = [by_probe[probe.index, probe.band] for probe in probes if probe.band == band]
        losses[f"{name} {EDGES[band]} to {EDGES[band + 1]}"] = float(np.mean(values))
    return {name: float(np.mean(list(losses.values()))), **losses}


def _probes(task: DenoisingTask) -> Iterator[Probe]:
    """Every image in every band that the schedule spans."""
    log_snr = _log_snr(task)
    for i, index in enumerate(sample_indices(task.images, task.config.validation.num_held_out)):
        for band, (low, high) in enumerate(zip(EDGES, EDGES[1:])):
            if log_snr[-1] <= low and high <= log_snr[0]:
                yield Probe(index, band, low + (high - low) * ((i * GOLDEN_RATIO) % 1.0))


def _batches(probes: list[Probe], images: ArraySet, batch_size: int) -> Iterator[list[Probe]]:
    """Batches of images of one size."""
    size = {probe.index: int(images.table[probe.index]["bucket"]) for probe in probes}
    for bucket in sorted(set(size.values())):
        alike = [probe for probe in probes if size[probe.index] == bucket]
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def _log_snr(task: DenoisingTask) -> torch.Tensor:
    return task.snr.clamp(1e-20, 1e20).log()


def _errors(task: DenoisingTask, model: torch.nn.Module, probes: list[Probe]) -> list[float]:
    """The error of v for each probe. All randomness has fixed seeds: a run's own streams would make runs incomparable."""
    device = task.accelerator.device
    scheduler = task.pipe.scheduler
    log_snr = _log_snr(task)
    streams = SeededStreams(0)
    samples = []
    for probe in probes:
        key = probe.index * (len(EDGES) - 1) + probe.band
        samples.append(Sample(index=probe.index, flip=False, caption=0, level=0.0, key=key))
    batch = collate(samples, replace(task.data, streams=streams))
    batch = {name: value.to(device) for name, value in batch.items()}
    levels = torch.tensor([probe.log_snr for probe in probes]).to(log_snr)
    t = torch.searchsorted(-log_snr, -levels).clamp(max=len(log_snr) - 1)
    x_0 = task.x_0(batch)
    x_t = scheduler.add_noise(x_0, noise_for(batch["sample_key"], tuple(x_0.shape[1:]), device), t)
    output = task.predict(model, x_t, t, batch, streams=streams, always_estimate=True)[:, : x_0.shape[1]].float()
    error = (scheduler.denoised(output, x_t, t) - x_0).square().flatten(1).mean(1)
    return ((1 + task.snr[t]) * error).cpu().double().tolist()
