"""The model in diffusers' own classes: the stock pipeline of its kind and the stock scheduler.

This file travels inside shared model folders.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import diffusers
from diffusers import DDPMScheduler, DiffusionPipeline
from transformers.utils import logging as transformers_logging

from sfumato.pipelines.conditions import check_upscaling
from sfumato.schedulers.scheduling_sfumato_ddpm import SfumatoDDPMScheduler
from sfumato.schedulers.scheduling_sfumato_flow import SfumatoFlowScheduler

# The class that `model_index.json` names for a model that no stock pipeline can draw: that in the folder's own pipeline.py.
REMOTE_CLASS = ["pipeline", "SfumatoPipeline"]


def stock_pipeline(pipe) -> DiffusionPipeline:
    """The same model as a stock pipeline, sharing all weights: `StableDiffusionPipeline`, or the one for inpainting, upscaling
    or ControlNets.

    Raises:
        ValueError: no stock pipeline can draw it, because the model reads its own estimate.
    """
    if pipe.reads == "estimate":
        raise ValueError("no stock pipeline supports self-conditioning; open this model with SfumatoPipeline")
    return stock_parts(pipe)


def stock_parts(pipe) -> DiffusionPipeline:
    """`stock_pipeline`, or for a model that no stock pipeline can draw, one that holds the same parts."""
    parts = {**pipe.components, "scheduler": stock_scheduler(pipe.scheduler)}
    if hasattr(pipe.unet, "to_stock"):  # clips, see `pipelines.motion`
        unet, adapter = pipe.unet.to_stock()
        parts |= {"vae": pipe.vae.vae, "unet": unet, "motion_adapter": adapter}
        kept = (
            "vae",
            "text_encoder",
            "tokenizer",
            "unet",
            "motion_adapter",
            "scheduler",
            "feature_extractor",
            "image_encoder",
        )
        return diffusers.AnimateDiffPipeline(**{name: parts[name] for name in kept})
    parts["unet"] = getattr(pipe.unet, "unet", pipe.unet)  # unwrap a network that another runtime runs
    guider, low_res, controlnet = (parts.pop(name) for name in ("guider", "low_res_scheduler", "controlnet"))
    if pipe.reads == "low_res":
        check_upscaling(pipe.vae)
        del parts["image_encoder"]
        parts |= {"low_res_scheduler": low_res, "max_noise_level": pipe.config.max_noise_level}
        return diffusers.StableDiffusionUpscalePipeline(**parts)
    parts["requires_safety_checker"] = pipe.config.requires_safety_checker
    if controlnet is not None:
        return diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=controlnet)
    name = "StableDiffusionInpaintPipeline" if pipe.reads == "masks" else "StableDiffusionPipeline"
    return getattr(diffusers, name)(**parts)


@contextmanager
def quiet_transformers():
    """Hide the progress bars of transformers, "Loading weights" and "Writing model shards", which last about a second."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_no_lora(pipe) -> None:
    """Raise ValueError for a pipeline with a LoRA beside its weights, which a folder of full weights would lose or corrupt."""
    for name in ("unet", "text_encoder"):
        part = getattr(pipe, name)
        if part is not None and any("lora_" in key for key, _ in part.named_parameters()):
            raise ValueError(
                f"a LoRA is loaded beside the weights of `{name}`, which such a folder cannot hold: first run "
                "`pipe.fuse_lora(); pipe.unload_lora_weights()` to save both as one, or save it with `pipe.save_lora_weights`"
            )


def stock_scheduler(scheduler):
    """The sampler as a diffusers class that stock pipelines can draw with."""
    if isinstance(scheduler, SfumatoFlowScheduler):
        return scheduler.to_stock()
    cls = DDPMScheduler if isinstance(scheduler, SfumatoDDPMScheduler) else type(scheduler)
    # A copy, since StableDiffusionPipeline edits its scheduler's config and turns clip_sample off. Thresholding at 1.0
    # clips in exactly the same way and is left alone.
    config = dict(scheduler.config)
    if config.get("clip_sample") and config.get("clip_sample_range", 1.0) == 1.0 and "thresholding" in config:
        config.update(clip_sample=False, thresholding=True, sample_max_value=1.0)
    return cls.from_config(config)


def write_class(pipe, folder) -> None:
    """In the saved folder of a model that no stock pipeline can draw, name the class that can."""
    if pipe.reads == "estimate":
        path = Path(folder) / "model_index.json"
        index = {**json.loads(path.read_text(encoding="utf-8")), "_class_name": REMOTE_CLASS, "self_conditioning": True}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
