"""Images for sample grids and scores, drawn by the pipeline that will be shared and split over all processes."""

from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.training.config.schema import ValidationConfig
from sfumato.training.data import array_set
from sfumato.training.data.array_set import ArraySet


def sample_indices(images: ArraySet, count: int) -> list[int]:
    """Numbers of up to `count` held-out images, or of training images if there are none, evenly spread."""
    chosen = images.select("held_out") if len(images.select("held_out")) else images.select("train")
    return [int(i) for i in chosen[array_set.evenly_spaced(len(chosen), count)]]


def sample_captions(images: ArraySet) -> list[str]:
    """Captions of up to twelve images that `sample_indices` chooses; if some are the same, twelve distinct ones chosen by a
    seed from more images, since the captions of a generated set repeat in a rhythm of their own ("slowly", "quickly").
    """
    captions = [images[i]["captions"][0] for i in sample_indices(images, 12)]
    if len(set(captions)) == len(captions):
        return captions
    distinct = list(dict.fromkeys(images[i]["captions"][0] for i in sample_indices(images, 600)))
    chosen = np.random.default_rng(0).permutation(len(distinct))[:12]
    return [distinct[k] for k in sorted(chosen)]


def sampling_pipeline(pipe: SfumatoPipeline, config: ValidationConfig) -> SfumatoPipeline:
    """The model with the sampler and the guider that `config` names.

    Raises:
        ValueError: they do not suit the model.
    """
    start, stop = config.guidance_interval
    return with_guider(with_sampler(pipe, config.sampler), config.guider, start=start, stop=stop)


def draw_images(
    pipe: SfumatoPipeline,
    prompts: list[str],
    config: ValidationConfig,
    accelerator: Accelerator,
    batch_size: int = 32,
    **inputs: list[np.ndarray],
) -> list[Any]:
    """One image for each prompt, the same whatever the number of processes: image i has seed `config.seed` + i.

    Args:
        inputs: further arguments of the pipeline's call that have a value for each prompt, such as `image` and `mask_image`.

    Returns:
        All images in order, on every process; for a model with a codec, arrays `(H, W, C)` in [0, 1].
    """
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    drawn = draw_in_batches(
        pipe,
        [prompts[i] for i in mine],
        seeds=[config.seed + i for i in mine],
        batch_size=batch_size,
        each={name: [values[i] for i in mine] for name, values in inputs.items()},
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        output_type="pil" if pipe.codec is None else "np",
    )
    pairs = gather_object(list(zip(mine, drawn)))
    return [image for _, image in sorted(pairs, key=lambda pair: pair[0])]
