"""How many bits a model needs for an image: the variational bound, term by term."""

from typing import cast

import numpy as np
import torch
from tqdm.auto import tqdm

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.guided import run_network
from sfumato.schedulers import SfumatoDDPMScheduler, training_scheduler
from sfumato.training.data.array_set import evenly_spaced
from sfumato.training.data.streams import noise_for
from sfumato.training.models.latent_space import encode, is_identity, to_pixel_values
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, mean_score


def check_has_bound(pipe: SfumatoPipeline) -> None:
    """Raise ValueError for a model whose bits per dimension cannot be bounded here."""
    if not is_identity(pipe.vae):
        raise ValueError("bits per dimension are for pixels; this model works on latents")
    if not isinstance(training_scheduler(pipe.scheduler), SfumatoDDPMScheduler) or pipe.reads is not None:
        raise ValueError("this bound is for diffusion in discrete steps by a network that reads no image but the noisy one")


@torch.no_grad()
def bits_per_dim(
    pipe: SfumatoPipeline,
    images: np.ndarray,
    captions: list[str],
    *,
    num_levels: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> dict:
    """An upper bound on the bits per dimension of images: the full variational bound (Ho et al. 2020, equation 5).

    Args:
        pipe: a model that works on pixels.
        images: `(N, H, W, C)` uint8.
        captions: those of the images; used without guidance.
        num_levels: number of noise levels per image, evenly spread with an offset of its own; each stands for those around
            it, so the sum is correct on average. None: all levels. The last step, t = 0, is always among them.

    Returns:
        `bits/dim`; `each`, those of each image; and the parts `prior` (L_T), `decoder` (L_0) and `levels`, the terms between,
        for t = 1 to T - 1 (NaN where `num_levels` left a level out), all in bits per dimension.

    Raises:
        ValueError: fewer than two levels; a model of latents, one of flow matching (whose bound is different), or one that
            reads more than the noisy image.
    """
    scheduler = training_scheduler(pipe.scheduler)
    check_has_bound(pipe)
    device, steps = pipe.unet.device, scheduler.config["num_train_timesteps"]
    if num_levels is not None and num_levels < 2:
        raise ValueError("num_levels must be at least 2: t = 0 and one of the others")
    count = min(num_levels or steps, steps) - 1
    terms, times = np.zeros(steps), np.zeros(steps)
    each = []
    prior = []
    decoder = []
    embeds = pipe.encode_prompt(captions, device, 1, False)[0]
    for i in tqdm(range(len(images)), desc="bits per dimension", unit="image", disable=not progress):
        x_0 = encode(pipe.vae, to_pixel_values(images[i : i + 1])).to(device)
        shift = (0.5 + i * 0.6180339887498949) % 1
        levels = (1 + torch.floor((torch.arange(count, dtype=torch.float64) + shift) * (steps - 1) / count)).long()
        levels = torch.cat([levels.new_zeros(1), levels]).to(device)
        values = []
        for k in range(0, len(levels), batch_size):
            t = levels[k : k + batch_size]
            noise = noise_for(seed + (i * steps + t) % 2**62, x_0.shape[1:], device)
            x_t = scheduler.add_noise(x_0, noise, cast(torch.IntTensor, t))
            output = run_network(pipe.unet, None, x_t, t, embeds[i : i + 1].expand(len(t), -1, -1))
            values.append(scheduler.bound_term(output.float(), x_0.expand_as(x_t), x_t, t))
        values, levels = torch.cat(values).cpu().double().numpy(), levels.cpu().numpy()
        np.add.at(terms, levels, values)
        np.add.at(times, levels, 1)
        prior.append(scheduler.prior_term(x_0).item())
        decoder.append(values[0])
        each.append(prior[-1] + values[0] + values[1:].mean() * (steps - 1))
    return {
        "bits/dim": float(np.mean(each)),
        "each": [float(value) for value in each],
        "prior": float(np.mean(prior)),
        "decoder": float(np.mean(decoder)),
        "levels": [float(v) for v in np.where(times > 0, terms / np.maximum(times, 1), np.nan)[1:]],
    }


def bits(evaluation: Evaluation) -> dict[str, Score]:
    """Upper bounds on the bits per dimension of held-out and of training images."""
    scores: dict[str, Score] = {}
    for part in ("held_out", "train"):
        numbers = evaluation.parts[part]
        numbers = numbers[evenly_spaced(len(numbers), evaluation.plan.bits)]
        if len(numbers):
            captions = [evaluation.caption(i) for i in numbers]
            bound = bits_per_dim(evaluation.pipe, evaluation.real(numbers), captions, num_levels=evaluation.plan.bits_levels)
            scores[f"bits per dimension, {part.replace('_', '-')}"] = mean_score(bound["each"])
    return scores
