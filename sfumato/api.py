"""The Python counterpart of the command line, for notebooks and other programs. This interface is stable.

    from sfumato import api

    config = api.load_config("demo", ["train.max_steps=100", "output_dir=runs/mine"])
    api.train(config)
    report = api.evaluate("runs/mine/pipeline", images=64)

Nothing heavy is imported before a function needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.pipelines.locate import DEFAULT

if TYPE_CHECKING:
    import numpy as np

    from sfumato.pipelines import SfumatoPipeline
    from sfumato.pipelines.drawer import Drawer
    from sfumato.pipelines.tune import Trial
    from sfumato.training.config.schema import Config, DataConfig
    from sfumato.training.data.array_set import ArraySet
    from sfumato.training.doctor import Finding
    from sfumato.training.quality.command import Report

__all__ = [
    "build_pipeline",
    "doctor",
    "drawer",
    "evaluate",
    "load_config",
    "plan",
    "prepare_data",
    "read_image",
    "train",
    "tune",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or the packaged config of that name, and apply `key.subkey=value` overrides.

    Raises:
        ValueError: file missing, unknown key, wrong type, or a value that cannot work; the message names all of them.
    """
    from sfumato.training.config.load import load_config

    return load_config(path, overrides)


def prepare_data(data: DataConfig) -> ArraySet:
    """Read, check and resize every image once; later calls with the same settings memory-map the stored result.

    Raises:
        ValueError: no such source, no captions, or too many unusable images; the message names each.
    """
    from sfumato.training.data.prepare import prepare

    return prepare(data)


def build_pipeline(config: Config, captions: list[str]) -> SfumatoPipeline:
    """Build the model of a config, with random weights drawn from `config.seed` and a tokenizer learned from the captions.

    Raises:
        ValueError: an argument that a stock class does not have, or that contradicts another section.
    """
    from sfumato.training.models.build import build_pipeline

    return build_pipeline(config, captions)


def read_image(
    source: str | Path | bytes,
    size: tuple[int, int],
    channels: int = 3,
    resize: str = "crop",
    notes: set[str] | None = None,
) -> np.ndarray:
    """Read one image as `(*size, channels)` uint8, as training does: upright, on white unless `channels` is 4, and resized.

    Args:
        source: a file or its contents.
        size: height and width.
        channels: 1 grey, 3 RGB, 4 RGBA.
        resize: `crop` the longer side, `pad` the shorter one with white, or `stretch`.
        notes: receives anything unusual about the image, such as a palette.

    Raises:
        ValueError: too large, too small or not readable; the message gives the reason.
    """
    from sfumato.training.data.images import read_image

    return read_image(source if isinstance(source, bytes) else Path(source), size, channels, resize, notes)


def train(config: Config) -> int:
    """Train in one process, or as one of the processes that `accelerate launch` started.

    Returns:
        The exit code of `sfumato train`: 0 done, 3 diverged, 4 no room to save, 5 done but not pushed, 130 or 143 stopped
        by a signal.

    Raises:
        ValueError: a setting, the data or the checkpoint cannot be used.
    """
    from sfumato.training import loop
    from sfumato.training.train import finish_training

    return finish_training(loop.prepare(config))


def evaluate(model: str | Path, *, data: str | None = None, **options) -> Report | None:
    """Measure a model, write `evaluation.json`, and put the figures into its card.

    Args:
        model: a run folder, a pipeline folder or a Hub id.
        data: a config, or a value for `data.name`; None for the model's training data.
        options: fields of `quality.command.EvaluateOptions`, such as `images`, `steps`, `extractor`, `out`.

    Returns:
        The report; None on every process but the first.

    Raises:
        ValueError: the model, the data or an option cannot be used.
    """
    from sfumato.pipelines.locate import locate_pipeline
    from sfumato.training.quality.command import EvaluateOptions, evaluate

    return evaluate(locate_pipeline(str(model)), EvaluateOptions(data=data, **options))


def drawer(model: str = DEFAULT, **settings) -> Drawer:
    """Open a model and keep it warm: `drawer(model).draw("red heart")`, or `.follow(prompts)` while the user types.

    Args:
        settings: `runtime`, `num_inference_steps`, `guidance_scale`; see `pipelines.drawer.Drawer`.
    """
    from sfumato.pipelines.drawer import Drawer

    return Drawer(model, **settings)


def tune(
    model: str | Path,
    *,
    steps: int = 8,
    guidance_scale: float | None = None,
    prompts: Sequence[str] | None = None,
    out: str | Path | None = None,
) -> tuple[list[Trial], Path]:
    """Find the sampler that comes closest to many steps in a few, and save it in the model's folder.

    Args:
        model: a run folder or an exported folder.
        steps: the number of steps to tune for.
        guidance_scale: None for the one in the card.
        prompts: what is drawn in the trials; None for those of the card's samples.
        out: a new folder for the model with that sampler, instead of its own.

    Returns:
        The trials, best first, and the folder.

    Raises:
        ValueError: no such folder, or a model whose sampler cannot be chosen freely.
    """
    from sfumato.pipelines import SfumatoPipeline
    from sfumato.pipelines.card import recommended_settings, sample_prompts
    from sfumato.pipelines.locate import is_packaged, locate_pipeline
    from sfumato.pipelines.tune import keep
    from sfumato.pipelines.tune import tune as try_all

    source = Path(locate_pipeline(str(model)))
    if not source.is_dir():
        raise ValueError(f"{model} is on the Hub; download it, or give a folder")
    if out is None and is_packaged(source):
        raise ValueError("this model belongs to the package; give a folder for your copy with --out")
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    prompts = list(prompts or sample_prompts(source))
    if not prompts:
        raise ValueError(f"the card of {source} has no samples; say what to draw with --prompts")
    scale = recommended_settings(str(source))["guidance_scale"] if guidance_scale is None else guidance_scale
    pipe = SfumatoPipeline.from_pretrained(source)
    trials = try_all(pipe, prompts, steps, scale)
    return trials, keep(pipe, trials[0], source, Path(out) if out else source, steps, scale)


def plan(config: Config, *, gpu: str, gpus: int = 1, images: float | None = None) -> list[Finding]:
    """What a run would need on devices that are not present: memory, time, data and money; see `training.planner`.

    Args:
        gpu: the kind of device, such as `h100`; see `training.planner.DEVICES`.
        gpus: the number of devices.
        images: the number for the run to see; by default as many as in `train.max_steps`.

    Raises:
        ValueError: the data or the settings cannot be used at all, or the device is unknown.
    """
    from sfumato.training import planner

    return planner.examine(config, gpu=gpu, gpus=gpus, images=images)


def doctor(config: Config, *, verify: bool = False) -> list[Finding]:
    """Check the data, the settings and, for a finished run, its result; each finding says what to do.

    With `verify`, all bytes of the prepared set are read and checked against their hash.

    Raises:
        ValueError: the data or the settings cannot be used at all.
    """
    from sfumato.training.doctor import examine

    return examine(config, verify=verify)
