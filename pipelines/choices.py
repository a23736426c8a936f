"""Samplers and guiders by name, for the command line and for benchmarks."""

import diffusers
from diffusers import guiders

from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.schedulers import SfumatoDDPMScheduler

# name -> diffusers' class, and what to set beside the trained schedule
SAMPLERS = {
    "ddpm": ("SfumatoDDPMScheduler", {}),
    # diffusers' DDIM clips x_0 but not the eps that goes with it, and many small steps add the difference up (LOG.md).
    "ddim": ("DDIMScheduler", {"thresholding": False, "clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
# Not here: MagnitudeAwareGuidance of diffusers 0.42 takes a matrix norm over three dimensions, which fails on pictures.
GUIDERS = {
    "cfg": guiders.ClassifierFreeGuidance,
    "apg": guiders.AdaptiveProjectedGuidance,
    "zero-star": guiders.ClassifierFreeZeroStarGuidance,
    "tangential": guiders.TangentialClassifierFreeGuidance,
}


def _choose(kind: str, name: str, known: dict):
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")
    return known[name]


def with_sampler(pipe: SfumatoPipeline, name: str) -> SfumatoPipeline:
    """The same model drawn by another sampler, on the schedule it was trained with.

    Raises:
        ValueError: no such sampler, or one that cannot draw with what the model predicts.
    """
    if name == "euler-a" and pipe.scheduler.config.prediction_type == "sample":
        raise ValueError("diffusers' euler-a cannot draw with a model that predicts the picture itself; use dpm++-sde")
    cls, more = _choose("sampler", name, SAMPLERS)
    cls = SfumatoDDPMScheduler if name == "ddpm" else getattr(diffusers, cls)
    return SfumatoPipeline.from_pipe(pipe, scheduler=cls.from_config(pipe.scheduler.config, **more))


def with_guider(pipe: SfumatoPipeline, name: str, **settings) -> SfumatoPipeline:
    """The same model under another guidance; `settings` as diffusers' guider takes them, such as `start` and `stop`.

    Raises:
        ValueError: no such guider.
    """
    return SfumatoPipeline.from_pipe(pipe, guider=_choose("guider", name, GUIDERS)(**settings))
