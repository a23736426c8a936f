"""Many prompts drawn in batches, each image by a seed of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def draw_in_batches(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    batch_size: int = 32,
    each: Mapping[str, Sequence[Any]] | None = None,
    **call: Any,
) -> list[Any]:
    """What a pipeline draws for each prompt; the same whatever the size of the batches, apart from rounding.

    Args:
        pipe: a diffusers pipeline; its progress bar is switched off.
        prompts: any number of them.
        seeds: one for each prompt; by default 0, 1, 2 and so on.
        each: arguments of the pipeline's call that have a value for each prompt, such as `image` and `mask_image`.
        call: all other arguments of the call.
    """
    pipe.set_progress_bar_config(disable=True)
    seeds = range(len(prompts)) if seeds is None else seeds
    drawn = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        drawn += list(
            pipe(
                list(prompts[part]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                **{name: list(values[part]) for name, values in (each or {}).items()},
                **call,
            ).images
        )
    return drawn
