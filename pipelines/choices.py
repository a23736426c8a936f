"""Samplers, guiders and runtimes by name. Importing this module loads nothing heavy, so that `--help` stays fast."""

from inspect import signature

from sfumato.registries import GUIDERS, SAMPLERS

# name -> the package that it needs
RUNTIMES = {"torch": None, "bf16": None, "onnx": "onnxruntime", "openvino": "openvino"}


def replace_components(pipe, **parts):
    """The same pipeline with some parts replaced; the others are shared and keep their precision."""
    from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline

    settings = {name: pipe.config[name] for name in ("requires_safety_checker", "max_noise_level", "self_conditioning")}
    new = SfumatoPipeline(**{**pipe.components, **parts}, **settings)
    new.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return new


def with_sampler(pipe, name: str):
    """The same `SfumatoPipeline` with another sampler, on the noise schedule it was trained with.

    Raises:
        ValueError: there is no such sampler, or it cannot use what the model predicts.
    """
    from sfumato.schedulers import SfumatoFlowScheduler, training_scheduler

    sampler, cls = SAMPLERS.check_name(name), SAMPLERS.load(name)
    levels = training_scheduler(pipe.scheduler)
    if isinstance(levels, SfumatoFlowScheduler):
        if not sampler.flow:
            flow = ", ".join(other for other, entry in SAMPLERS.items() if entry.flow)
            raise ValueError(f"{name} cannot draw with a model of flow matching; choose one of {flow}")
        if name == "lcm":  # LCM does not support flow matching; this takes nearly the same steps
            from diffusers import DPMSolverMultistepScheduler

            settings = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}
            return replace_components(pipe, scheduler=levels.to_stock(DPMSolverMultistepScheduler, **settings))
        return replace_components(pipe, scheduler=levels if name == "euler" else levels.to_stock(cls, solver_order=2))
    if name == "euler-a" and pipe.scheduler.config.prediction_type == "sample":
        raise ValueError("diffusers' euler-a cannot draw with a model that predicts the image itself; use dpm++-sde")
    # Drop what an earlier choice set; what it replaced of the trained config is restored, and kept with the notes.
    config, overrides = dict(pipe.scheduler.config), dict(sampler.overrides)
    notes = dict(config.get("_sfumato") or {})
    kept = ("thresholding", "clip_sample", "variance_type")
    original = notes["trained"] = {k: config[k] for k in kept if k in config} | notes.get("trained", {})
    config = {k: v for k, v in config.items() if k not in ("algorithm_type", "use_exponential_sigmas")}
    if name != "ddpm" and config.get("variance_type") == "learned_range":  # DPM-Solver would cut off three channels
        overrides = {"variance_type": None, **overrides}
    if sampler.max_sigma is not None and (betas := levels.capped_betas(sampler.max_sigma)):
        notes["trained"] = {**original, **{name: config[name] for name in ("trained_betas", "rescale_betas_zero_snr")}}
        overrides |= {"trained_betas": betas, "rescale_betas_zero_snr": False}
    config |= original
    if not cls._compatibles:  # it would warn of settings that belong to other classes
        config = {key: value for key, value in config.items() if key in signature(cls.__init__).parameters}
    scheduler = cls.from_config(config, **overrides)
    scheduler.register_to_config(_sfumato=notes)
    return replace_components(pipe, scheduler=scheduler)


def with_guider(pipe, name: str, weak=None, **settings):
    """The same `SfumatoPipeline` with another guider.

    Args:
        weak: for `autoguidance`, the pipeline of a weaker model: an earlier checkpoint of the same run.
        settings: arguments of diffusers' guider, such as `start`, `stop`, `guidance_rescale`.

    Raises:
        ValueError: there is no such guider, or it does not work with this model.
    """
    from sfumato.pipelines.guided import build_guider, guidance_width

    entry = GUIDERS.check_name(name)
    if name != "cfg" and guidance_width(pipe.unet) is not None:
        raise ValueError(f"{name}: the guidance scale is an input of this model, which takes no guider")
    if (weak is not None) != entry.weak:
        raise ValueError("autoguidance, and no other guider, takes a weaker model as well: an earlier checkpoint of the run")
    guider = build_guider(GUIDERS.load(name), **{**_guider_defaults(pipe, name, settings), **settings})
    if weak is not None:
        _check_weak(pipe, weak)
        setattr(guider, "weak", weak)  # noqa: B010  (not a field of diffusers' class)
    return replace_components(pipe, guider=guider)


def _guider_defaults(pipe, name: str, settings: dict) -> dict:
    """Settings of a guider that diffusers leaves open or sets differently from the paper."""
    if name == "apg":  # diffusers' defaults (eta 1, no momentum) amount to plain guidance; these are the paper's
        return {"eta": 0.0, "adaptive_projected_guidance_momentum": -0.5}
    kind = GUIDERS[name].second
    if kind is None:
        return {}
    from diffusers import hooks

    # Where plain guidance is off, diffusers gives their pass the wrong prompt, so both use one interval.
    interval = {"start": settings.get("start", 0.0), "stop": settings.get("stop", 1.0)}
    defaults = {f"{kind}_{end}": value for end, value in interval.items()}
    if name == "pag":
        layers = hooks.LayerSkipConfig(
            **_innermost_attention(pipe), skip_attention=False, skip_attention_scores=True, skip_ff=False
        )
        return {**defaults, "perturbed_guidance_config": layers}
    if name == "slg":
        return {**defaults, "skip_layer_config": hooks.LayerSkipConfig(**_innermost_attention(pipe))}
    if name == "seg":
        return {**defaults, "seg_guidance_config": hooks.SmoothedEnergyGuidanceConfig(**_innermost_attention(pipe))}
    return defaults


def _check_weak(pipe, weak) -> None:
    """Raise ValueError for a weaker model that predicts another quantity or reads other inputs."""
    from sfumato.schedulers import training_scheduler

    readers = {
        "prediction_type": lambda p: training_scheduler(p.scheduler).prediction_type,
        "in_channels": lambda p: p.unet.config.in_channels,
        "out_channels": lambda p: p.unet.config.out_channels,
        "a ControlNet:": lambda p: p.controlnet is not None,
    }
    for what, read in readers.items():
        here, there = read(pipe), read(weak)
        if here != there:
            raise ValueError(f"the weaker model has {what} {there}, this one {here}")


def _innermost_attention(pipe) -> dict:
    """Where the innermost self-attention of the UNet is, in the form of diffusers' configs."""
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith(".transformer_blocks")]
    inner = [name for name in names if name.startswith("mid_block")] or [n for n in names if n.startswith("down")][-1:]
    if not inner or getattr(pipe.unet, "runs_elsewhere", False):
        raise ValueError("this guider reaches into the network's self-attention, which this model or its runtime forbids")
    return {"fqn": inner[0], "indices": list(range(len(pipe.unet.get_submodule(inner[0]))))}
