"""Pictures to look at and scores to read, drawn by the pipeline that will be shared; split over all processes."""

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.pipelines.inputs import on_white
from sfumato.training.config.schema import Config, ValidationConfig
from sfumato.training.data.prepare import PictureSet
from sfumato.training.data.sources import shapes
from sfumato.training.quality.obedience import shapes_right


def to_show(pictures: PictureSet, count: int) -> list[int]:
    """Numbers of up to `count` held-out pictures, else of training pictures, evenly spread."""
    chosen = pictures.select("held_out") if len(pictures.select("held_out")) else pictures.select("train")
    return [int(i) for i in chosen[shapes.evenly(len(chosen), count)]]


def captions_to_show(pictures: PictureSet) -> list[str]:
    """Captions of up to twelve pictures that `to_show` chooses."""
    return [pictures[i]["captions"][0] for i in to_show(pictures, 12)]


def as_drawn(pipe: SfumatoPipeline, config: ValidationConfig) -> SfumatoPipeline:
    """The model with the sampler and the guider that `config` names.

    Raises:
        ValueError: they do not go with the model.
    """
    start, stop = config.guidance_interval
    return with_guider(with_sampler(pipe, config.sampler), config.guider, start=start, stop=stop)


def draw_pictures(
    pipe: SfumatoPipeline,
    prompts: list[str],
    config: ValidationConfig,
    accelerator: Accelerator,
    batch_size: int = 32,
    **given: list[np.ndarray],
) -> list[Image.Image]:
    """One picture for each prompt, the same whatever the number of processes: picture i has seed `config.seed` + i.

    Args:
        given: further arguments of the pipeline's call that have a value for each prompt, such as `image` and `mask_image`.

    Returns:
        All pictures in order, on every process.
    """
    pipe.set_progress_bar_config(disable=True)
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    drawn = []
    for start in range(0, len(mine), batch_size):
        numbers = mine[start : start + batch_size]
        drawn += pipe(
            [prompts[i] for i in numbers],
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator().manual_seed(config.seed + i) for i in numbers],
            **{name: [values[i] for i in numbers] for name, values in given.items()},
        ).images
    pairs = gather_object(list(zip(mine, drawn)))
    return [picture for _, picture in sorted(pairs, key=lambda pair: pair[0])]


def arrays(pictures: list[Image.Image]) -> np.ndarray:
    """Pictures of one size as `(N, H, W, C)` uint8, grey ones with one channel."""
    return np.stack([np.asarray(picture).reshape(picture.height, picture.width, -1) for picture in pictures])


def grid(pictures: list[Image.Image], prompts: list[str], columns: int = 6, min_side: int = 128) -> Image.Image:
    """One picture of many, each enlarged to at least `min_side` pixels without smoothing, its prompt below."""
    scale = max(1, min_side // pictures[0].width)
    width, height, gap, text = pictures[0].width * scale, pictures[0].height * scale, 6, 26
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap + text) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + gap + text)
        sheet.paste(on_white(picture, 3).resize((width, height), Image.Resampling.NEAREST), (x, y))
        lines, words = [""], prompt.split()
        for word in words:
            if lines[-1] and pen.textlength(f"{lines[-1]} {word}", font) > width:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((x, y + height), "\n".join(lines[:2]), "black", font, spacing=0)
    return sheet


def as_image(picture: np.ndarray) -> Image.Image:
    """`(H, W, C)` uint8 as PIL has it."""
    return Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)


def evaluate_shapes(pipe: SfumatoPipeline, config: Config, accelerator: Accelerator) -> dict[str, list[bool]]:
    """Obedience on held-out captions of `shapes`; see `shapes_right`."""
    scenes = shapes.scenes(held_out=True, count=config.validation.num_judged, num_figures=config.data.num_figures)
    pictures = draw_pictures(pipe, [scene.caption for scene in scenes], config.validation, accelerator)
    return shapes_right([np.asarray(picture) for picture in pictures], scenes)
