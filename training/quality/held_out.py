"""The loss on pictures that are not trained on: the same number whatever the recipe, the batch size and the processes."""

import numpy as np
import torch
from accelerate.utils import gather_object

from sfumato.training.data.loader import collate
from sfumato.training.data.streams import GOLDEN_RATIO, noise_for
from sfumato.training.models.denoiser import Denoiser
from sfumato.training.models.parameters import plain_pipeline
from sfumato.training.quality import drawing

# Bands of log-SNR, in nats: from where only the layout of a picture is left to where only its grain is missing.
EDGES = (-8, -6, -4, -2, 0, 2, 4, 6, 8)


@torch.no_grad()
def held_out_loss(task, batch_size: int | None = None) -> dict[str, float]:
    """How well x_0 is told from x_t on held-out pictures (else on training pictures), without guidance.

    Each of `validation.num_held_out` pictures is noised once in every band of `EDGES` that the noise schedule spans, at a
    level and with a noise that depend on the picture and the band alone. The error is that of v, (1 + SNR) * mean squared
    error of x_0, so models of any target, weight and sampling of noise levels can be compared, and of any schedule by the
    bands that both have. Call it with the averaged weights in place.

    Args:
        task: a `tasks.TextToImage` or what derives from it.
        batch_size: as in training where not given; no matter.

    Returns:
        `held_out_loss`, the mean over the bands, and each band by its name, such as `held_out_loss -8 to -6`. Where no
        pictures are held out, it is of training pictures, and called `training_loss`.
    """
    pictures, scheduler, accelerator = task.pictures, task.pipe.scheduler, task.accelerator
    device, pipe, bands = accelerator.device, plain_pipeline(task.pipe, task.module), len(EDGES) - 1
    name = "held_out_loss" if len(pictures.select("held_out")) else "training_loss"
    model = Denoiser(pipe.unet, pipe.text_encoder, pipe.controlnet)
    batch_size = batch_size or task.config.train.batch_size
    log_snr = task.snr.clamp(1e-20, 1e20).log()
    samples = [
        (number, k, EDGES[k] + (EDGES[k + 1] - EDGES[k]) * ((i * GOLDEN_RATIO) % 1.0))
        for i, number in enumerate(drawing.sample_indices(pictures, task.config.validation.num_held_out))
        for k in range(bands)
        if log_snr[-1] <= EDGES[k] and EDGES[k + 1] <= log_snr[0]
    ]
    size = {number: int(pictures.table[number]["bucket"]) for number, *_ in samples}
    mine, found = samples[accelerator.process_index :: accelerator.num_processes], []
    alike = [[s for s in mine if size[s[0]] == bucket] for bucket in sorted(set(size.values()))]
    for part in (group[k : k + batch_size] for group in alike for k in range(0, len(group), batch_size)):
        rows = [(n, False, int(pictures.table[n]["first_caption"]), 0.0, n * bands + k) for n, k, _ in part]
        batch = collate(rows, pictures, task.texts, task.latents, task.beside)
        batch = {name: value.to(device) for name, value in batch.items()}
        t = torch.searchsorted(-log_snr, -torch.tensor([level for *_, level in part]).to(log_snr)).clamp(max=len(log_snr) - 1)
        x_0 = task.x_0(batch)
        noise = noise_for(batch["noise_seed"], x_0.shape[1:], device)  # the recipe's own noise would be another yardstick
        x_t = scheduler.add_noise(x_0, noise, t)
        output = task.predict(model, x_t, t, batch, all_first=True)[:, : x_0.shape[1]].float()
        error = (scheduler.denoised(output, x_t, t) - x_0).square().flatten(1).mean(1)
        found += zip([(n, k) for n, k, _ in part], ((1 + task.snr[t]) * error).cpu().double().tolist())
    found = dict(gather_object(found))
    spanned = sorted({k for _, k, _ in samples})
    losses = {f"{name} {EDGES[k]} to {EDGES[k + 1]}": np.mean([found[n, b] for n, b, _ in samples if b == k]) for k in spanned}
    return {name: float(np.mean(list(losses.values()))), **{band: float(loss) for band, loss in losses.items()}}
