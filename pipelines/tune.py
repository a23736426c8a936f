"""Find the diffusers sampler that comes nearest to the end of a model's path in a few steps, by trying each on the model."""

import inspect
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard
from tqdm.auto import tqdm

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.choices import replace_components, with_sampler
from sfumato.pipelines.export import export_pipeline
from sfumato.pipelines.guided import guidance_width
from sfumato.registries import SAMPLERS
from sfumato.schedulers import SfumatoFlowScheduler, training_scheduler

TRIED = ("dpm++", "unipc", "deis", "ddim", "euler")  # deterministic, one pass per step
CHOICES: dict[str, tuple] = {  # settings to combine, each if the class has it
    "timestep_spacing": ("trailing", "linspace", "leading"),
    "solver_order": (2, 3),
    "sigmas": (None, "use_karras_sigmas", "use_exponential_sigmas"),
}
REFERENCE_STEPS = 100
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A sampler that was tried.

    Attributes:
        sampler: its name in `registries.SAMPLERS`.
        settings: settings of its class, in addition to those that the name sets.
        error: root mean square difference of its images, in [0, 1], from those of many steps from the same noise.
        scheduler: the sampler itself.
    """

    sampler: str
    settings: dict[str, Any]
    error: float
    scheduler: Any

    def __str__(self):
        more = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.error:.4f}  {self.sampler}{f' ({more})' if more else ''}"


def tune(pipe: SfumatoPipeline, prompts: list[str], num_inference_steps: int, guidance_scale: float) -> list[Trial]:
    """Draw with each sampler, spacing, order and kind of noise levels that a stock folder can name; returns the best first.

    Args:
        prompts: one image is drawn for each, with seeds 0, 1, ...
        num_inference_steps: the small number of steps to tune for.

    Raises:
        ValueError: the model is distilled, so that its sampler is fixed, or reads more than noise and text.
    """
    if guidance_width(pipe.unet) is not None:
        raise ValueError("this model is distilled: its sampler and steps are those it was trained for")
    if pipe.reads is not None or pipe.controlnet is not None:
        raise ValueError("samplers are tuned only for models that read noise and text alone")
    reference = _draw(with_sampler(pipe, "dpm++"), prompts, REFERENCE_STEPS, guidance_scale)
    trials = []
    for name, settings, scheduler in tqdm(list(_candidates(pipe)), desc="samplers", unit=""):
        try:
            images = _draw(replace_components(pipe, scheduler=scheduler), prompts, num_inference_steps, guidance_scale)
        except (
            ValueError,
            IndexError,
            RuntimeError,
            AssertionError,
        ):  # invalid combinations of settings, which each class detects itself
            continue
        error = float(np.sqrt(np.square(images - reference).mean()))
        if np.isfinite(error):
            trials.append(Trial(sampler=name, settings=settings, error=error, scheduler=scheduler))
    return sorted(trials, key=lambda trial: trial.error)


def _candidates(pipe: SfumatoPipeline):
    """Name, settings and scheduler of everything that is tried."""
    flow = isinstance(training_scheduler(pipe.scheduler), SfumatoFlowScheduler)
    for name in TRIED:
        if flow and not SAMPLERS[name].flow:
            continue
        scheduler: Any = with_sampler(pipe, name).scheduler
        known = inspect.signature(type(scheduler).__init__).parameters
        open_choices = {
            key: values
            for key, values in CHOICES.items()
            if key in known or key == "sigmas" and values[1] in known and not flow
        }
        for values in itertools.product(*open_choices.values()):
            settings = dict(zip(open_choices, values))
            sigmas = settings.pop("sigmas", None)
            if sigmas is not None:
                if settings.get("timestep_spacing") != "trailing":  # the levels already fix the spacing
                    continue
                settings[sigmas] = True
            yield name, settings, type(scheduler).from_config(scheduler.config, **settings)


def _draw(pipe: SfumatoPipeline, prompts: list[str], steps: int, scale: float) -> np.ndarray:
    call = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np"}
    return np.stack(draw_in_batches(pipe, prompts, batch_size=BATCH, **call))


def keep(pipe: SfumatoPipeline, trial: Trial, source: Path, folder: Path, steps: int, scale: float) -> Path:
    """Write the model of the exported folder `source` with a trial's sampler; the card and its snippets name the new steps."""
    before = recommended_settings(str(source))["num_inference_steps"]
    export_pipeline(replace_components(pipe, scheduler=trial.scheduler), folder, source=source)
    path = folder / "README.md"
    if path.is_file():
        card = ModelCard.load(path, ignore_metadata_errors=True)
        data: Any = card.data
        data.inference = {"parameters": {"num_inference_steps": steps, "guidance_scale": scale}}
        card.text = card.text.replace(f"num_inference_steps={before}", f"num_inference_steps={steps}")
        card.save(path)
    return folder
