"""Samplers, guiders and runtimes by name. Importing this loads nothing heavy, so that configs and `--help` may."""

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
    # Its trapezoid in sigma needs steps that shrink evenly: the trained ones leap from 20,000 to 10 at once (LOG.md).
    "heun": ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}),
}
FLOW_SAMPLERS = ("euler", "dpm++", "unipc")  # those that draw with models of flow matching
# name -> diffusers' class
GUIDERS = {
    "cfg": "ClassifierFreeGuidance",
    "apg": "AdaptiveProjectedGuidance",
    "zero-star": "ClassifierFreeZeroStarGuidance",
    "tangential": "TangentialClassifierFreeGuidance",
    "magnitude-aware": "MagnitudeAwareGuidance",
    # Away from what a weaker version of the model draws from the same prompt (Karras et al. 2024, arXiv 2406.02507).
    "autoguidance": "ClassifierFreeGuidance",
    # These, `SECOND`, add to plain guidance, away from what the model draws with its innermost self-attention disturbed.
    "pag": "PerturbedAttentionGuidance",
    "slg": "SkipLayerGuidance",
    "seg": "SmoothedEnergyGuidance",
}
# name -> how the settings of the guidance that it adds begin
SECOND = {"pag": "perturbed_guidance", "slg": "skip_layer_guidance", "seg": "seg_guidance"}
# name -> the package that it needs
RUNTIMES = {"torch": None, "bf16": None, "onnx": "onnxruntime", "openvino": "openvino"}


def check_name(kind: str, name: str, known: dict) -> None:
    """Raise ValueError, with the known names, unless `name` is one of them."""
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")


def replace_components(pipe, **parts):
    """The same pipeline with other parts; all others are shared, and keep their precision."""
    from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline

    settings = {name: pipe.config[name] for name in ("requires_safety_checker", "max_noise_level", "self_conditioning")}
    new = SfumatoPipeline(**{**pipe.components, **parts}, **settings)
    new.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return new


def with_sampler(pipe, name: str):
    """The same `SfumatoPipeline` drawn by another sampler, on the schedule it was trained with.

    Raises:
        ValueError: no such sampler, or one that cannot draw with what the model predicts.
    """
    import diffusers

    from sfumato.schedulers import SfumatoDDPMScheduler, SfumatoFlowScheduler, training_scheduler

    check_name("sampler", name, SAMPLERS)
    known = training_scheduler(pipe.scheduler)
    if isinstance(known, SfumatoFlowScheduler):
        if name not in FLOW_SAMPLERS:
            raise ValueError(f"{name} cannot draw with a model of flow matching; choose one of {', '.join(FLOW_SAMPLERS)}")
        cls = SAMPLERS[name][0]
        known = known if name == "euler" else known.to_stock(getattr(diffusers, cls), solver_order=2)
        return replace_components(pipe, scheduler=known)
    if name == "euler-a" and pipe.scheduler.config.prediction_type == "sample":
        raise ValueError("diffusers' euler-a cannot draw with a model that predicts the picture itself; use dpm++-sde")
    cls, more = SAMPLERS[name]
    cls = SfumatoDDPMScheduler if name == "ddpm" else getattr(diffusers, cls)
    # What an earlier choice set goes; what it replaced of the trained config comes back, and is kept with the notes.
    config = dict(pipe.scheduler.config)
    notes = dict(config.get("_sfumato") or {})
    kept = ("thresholding", "clip_sample", "variance_type")
    original = notes.setdefault("trained", {k: config[k] for k in kept if k in config})
    config = {k: v for k, v in config.items() if k not in ("algorithm_type", "use_exponential_sigmas")}
    if name != "ddpm" and config.get("variance_type") == "learned_range":  # DPM-Solver would cut three channels off
        more = {"variance_type": None, **more}
    scheduler = cls.from_config({**config, **original}, **more)
    scheduler.register_to_config(_sfumato=notes)
    if name == "euler-a":
        _in_double(scheduler)
    return replace_components(pipe, scheduler=scheduler)


def _in_double(scheduler) -> None:
    """Keep the noise levels in double precision: sigma_down^2 = b^2 - b^2 (a^2 - b^2) / a^2 of diffusers' euler-a falls below
    0 by rounding where one step leads from a to a b thousands of times smaller, and its root is not a number.
    """
    plain = scheduler.set_timesteps

    def set_timesteps(*arguments, **more):
        plain(*arguments, **more)
        if scheduler.sigmas.device.type != "mps":  # which has no double precision
            scheduler.sigmas = scheduler.sigmas.double()

    scheduler.set_timesteps = set_timesteps


def with_guider(pipe, name: str, weak=None, **settings):
    """The same `SfumatoPipeline` under another guidance.

    Args:
        weak: the pipeline of a weaker model, for `autoguidance`: an earlier checkpoint of the same run.
        settings: as diffusers' guider takes them, such as `start`, `stop`, `guidance_rescale`.

    Raises:
        ValueError: no such guider, or one that does not go with this model.
    """
    from diffusers import guiders, hooks

    check_name("guider", name, GUIDERS)
    if (weak is None) == (name == "autoguidance"):
        raise ValueError("autoguidance, and no other guider, takes a weaker model beside: an earlier checkpoint of the run")
    cls, given = _mended(name, getattr(guiders, GUIDERS[name])), {}
    if name == "apg":  # by diffusers' own defaults (eta 1, no momentum) it is plain guidance; these are the paper's
        given = {"eta": 0.0, "adaptive_projected_guidance_momentum": -0.5}
    elif name in SECOND:  # where plain guidance is off, diffusers gives their pass the wrong prompt: one interval for both
        kind, interval = SECOND[name], {"start": settings.get("start", 0.0), "stop": settings.get("stop", 1.0)}
        given = {f"{kind}_{end}": value for end, value in interval.items()}
    if name == "pag":
        layers = hooks.LayerSkipConfig(**_middle(pipe), skip_attention=False, skip_attention_scores=True, skip_ff=False)
        given["perturbed_guidance_config"] = layers
    elif name == "slg":
        given["skip_layer_config"] = hooks.LayerSkipConfig(**_middle(pipe))
    elif name == "seg":
        given["seg_guidance_config"] = hooks.SmoothedEnergyGuidanceConfig(**_middle(pipe))
    guider = cls(**{**given, **settings})
    if weak is not None:
        from sfumato.schedulers import training_scheduler

        for what, read in {
            "prediction_type": lambda p: training_scheduler(p.scheduler).prediction_type,
            "in_channels": lambda p: p.unet.config.in_channels,
            "out_channels": lambda p: p.unet.config.out_channels,
            "a ControlNet:": lambda p: p.controlnet is not None,
        }.items():
            here, there = read(pipe), read(weak)
            if here != there:
                raise ValueError(f"the weaker model has {what} {there}, this one {here}")
        guider.weak = weak
    return replace_components(pipe, guider=guider)


def _mended(name: str, cls: type) -> type:
    """diffusers' guider, without what is wrong in 0.42."""
    if name == "magnitude-aware":

        class MagnitudeAwareGuidance(cls):
            """Its norm over three dimensions fails: pictures come to it as rows."""

            def forward(self, pred_cond, pred_uncond=None):
                output = super().forward(pred_cond.flatten(1), None if pred_uncond is None else pred_uncond.flatten(1))
                output["pred"] = output.pred.reshape(pred_cond.shape)
                return output

        return MagnitudeAwareGuidance
    if name == "apg":

        class AdaptiveProjectedGuidance(cls):
            """Its update starts from the unconditional prediction, which then keeps what the projection should leave out."""

            def forward(self, pred_cond, pred_uncond=None):
                told = self.guidance_scale, self.use_original_formulation
                self.guidance_scale, self.use_original_formulation = self.guidance_scale - 1, True  # cond + (scale - 1) update
                output = super().forward(pred_cond, pred_uncond)
                self.guidance_scale, self.use_original_formulation = told
                return output

        return AdaptiveProjectedGuidance
    if name == "seg":

        class SmoothedEnergyGuidance(cls):
            """It does not count its passes, and so never smooths anything."""

            def prepare_models(self, denoiser):
                self._count_prepared += 1
                super().prepare_models(denoiser)

        return SmoothedEnergyGuidance
    return cls


def _middle(pipe) -> dict:
    """Where in the UNet its innermost self-attention is, in the words of diffusers' configs."""
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith(".transformer_blocks")]
    inner = [name for name in names if name.startswith("mid_block")] or [n for n in names if n.startswith("down")][-1:]
    if not inner or "forward" in vars(pipe.unet):
        raise ValueError("this guider reaches into the network's self-attention, which this model or its runtime does not let")
    return {"fqn": inner[0], "indices": list(range(len(pipe.unet.get_submodule(inner[0]))))}
