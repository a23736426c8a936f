"""Models that are trained further: opened, checked against the config, widened, given a LoRA adapter."""

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sfumato.pipelines import SfumatoPipeline
from sfumato.schedulers import training_scheduler
from sfumato.training.config.schema import Config
from sfumato.training.models.autoencoder import identity_vae
from sfumato.training.models.controlnet import build_controlnet
from sfumato.training.models.denoiser import ModelNeeds, learns_variance, num_unet_inputs, unet_sample_size
from sfumato.training.models.latent_space import is_identity
from sfumato.training.models.motion import add_motion
from sfumato.training.models.pretrained import check_predecessor
from sfumato.training.models.stock_classes import check_divisible


def save_lora(pipe: SfumatoPipeline, folder: Path) -> None:
    """Write the UNet's LoRA adapter as `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` reads."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(folder, unet_lora_layers=layers)


def widen(unet: UNet2DConditionModel, in_channels: int, out_channels: int) -> None:
    """Add input and output channels with zero weights: what the UNet computes stays the same until they are trained."""
    for name, ins, outs in (("conv_in", in_channels, None), ("conv_out", None, out_channels)):
        old = getattr(unet, name)
        ins, outs = ins or old.in_channels, outs or old.out_channels
        new = torch.nn.Conv2d(ins, outs, old.kernel_size, padding=old.padding)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.zero_()
            new.weight[: old.out_channels, : old.in_channels] = old.weight
            bias: Any = new.bias
            bias[: old.out_channels] = old.bias
            setattr(unet, name, new)
    unet.register_to_config(in_channels=in_channels, out_channels=out_channels)


def add_guidance_input(unet: UNet2DConditionModel, width: int, seed: int) -> Any:
    """The same network with the same weights, which also takes the guidance scale as an embedding of `width` values; at first
    that changes nothing.
    """
    torch.manual_seed(seed)
    told: Any = UNet2DConditionModel.from_config({**unet.config, "time_cond_proj_dim": width})
    weights = dict(unet.state_dict())
    weights["time_embedding.cond_proj.weight"] = torch.zeros_like(told.time_embedding.cond_proj.weight)
    told.load_state_dict(weights)
    return told.to(unet.device, unet.dtype)


def move_into_latents(pipe: SfumatoPipeline, vae: AutoencoderKL) -> SfumatoPipeline:
    """A pixel model that continues in the latents of a VAE: its UNet gets their further channels, with zero weights.

    It draws at once what it drew before if the latents' first channels are the downscaled image, as
    `autoencoder.thumbnail_weight` makes them.

    Raises:
        ValueError: the model works in latents already, or the VAE has fewer channels than its images.
    """
    channels = {pipe.unet.config.in_channels, pipe.unet.config.out_channels, pipe.vae.config.in_channels}
    of_pixels = is_identity(pipe.vae) and pipe.vae_scale_factor == 1
    if not of_pixels or len(channels) > 1 or max(channels) > vae.config["latent_channels"]:
        raise ValueError(
            "vae.pretrained: only a text-to-image model of pixels, which reads and predicts nothing else, can move into "
            "latents, of at least its own number of channels; leave it out to stay in those of init_from"
        )
    widen(pipe.unet, vae.config["latent_channels"], vae.config["latent_channels"])
    return SfumatoPipeline(
        **{**pipe.components, "vae": vae, "scheduler": _unbounded(pipe.scheduler)}
    )  # latents have no bounds


def _unbounded(scheduler):
    """The scheduler without clipping x_0."""
    return type(scheduler).from_config(scheduler.config, thresholding=False, clip_sample=False)


def load_pipeline(config: Config, needs: ModelNeeds, vae: AutoencoderKL | None = None) -> SfumatoPipeline:
    """The model of `init_from`, ready to be fine-tuned; with `lora.rank`, its UNet gets an adapter, and only that is trained.

    Args:
        vae: of `vae.pretrained`, into whose latents a pixel model moves.

    Raises:
        ValueError: no such model, one that this trainer cannot train, or one of another resolution factor.
        ModuleNotFoundError: LoRA needs the package peft.
    """
    pipe = _open(str(config.init_from))
    if config.objective.empty_caption == "noise":
        pipe.register_modules(scheduler=_unbounded(pipe.scheduler))
    if vae is not None:
        pipe = move_into_latents(pipe, vae)
    if pipe.config.self_conditioning != config.objective.self_conditioning:
        raise ValueError(f"objective.self_conditioning: init_from={config.init_from!r} has {pipe.config.self_conditioning}")
    if needs.motion is not None:
        _check_target(config, pipe)
        check_divisible(config, pipe.vae_scale_factor)
        add_motion(pipe, config, needs.motion)
        return pipe
    channels = {pipe.unet.config.in_channels, pipe.unet.config.out_channels, pipe.vae.config.latent_channels}
    if needs.widens and len(channels) == 1:  # a UNet that reads only latents
        if is_identity(pipe.vae):
            wider = identity_vae(
                max(config.data.size), pipe.vae.config.in_channels, needs.latent_channels, repeat=pipe.vae_scale_factor
            )
            pipe.register_modules(vae=wider)
        widen(pipe.unet, num_unet_inputs(config, pipe.vae, needs), pipe.vae.config.latent_channels)
    _check_loaded(config, pipe, needs)
    if vae is None and pipe.unet.config.sample_size is not None and pipe.trained_size != tuple(config.data.size):
        old, new = (f"{height} x {width}" for height, width in (pipe.trained_size, config.data.size))
        warnings.warn(
            f"init_from={config.init_from} draws images of {old} pixels and is now trained on {new};"
            " to keep its size, set data.resolution to it",
            stacklevel=2,
        )
    pipe.unet.register_to_config(sample_size=unet_sample_size(config, pipe.vae_scale_factor))
    torch.manual_seed(config.seed)
    pipe.vae.requires_grad_(False).eval()
    trains_text = bool(config.text_encoder.train) and not config.lora.rank and not needs.trains_controlnet
    pipe.text_encoder.requires_grad_(trains_text).train(trains_text)
    pipe.unet.requires_grad_(not config.lora.rank and not needs.trains_controlnet).train(not needs.trains_controlnet)
    if needs.trains_controlnet:
        if pipe.controlnet is None:
            pipe.register_modules(controlnet=build_controlnet(pipe.unet, pipe.vae_scale_factor))
        controlnet: Any = pipe.controlnet
        if controlnet.config.conditioning_channels != 3:
            raise ValueError(f"init_from={config.init_from!r} has a ControlNet that does not read maps of 3 channels")
        controlnet.requires_grad_(True).train()
    if config.lora.rank:
        _add_lora(config, pipe.unet)
    return pipe


def _open(source: str) -> SfumatoPipeline:
    """The model in a folder, the newest one of a run folder, one in a repository, or a packaged one, with the noise schedule
    that it was trained with.
    """
    check_predecessor("init_from", source)
    try:
        pipe = SfumatoPipeline.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from={source!r} cannot be opened: {error}") from error
    # Whatever sampler the folder names, its schedule is what counts.
    pipe.register_modules(scheduler=training_scheduler(pipe.scheduler))
    return pipe


def _check_loaded(config: Config, pipe: SfumatoPipeline, needs: ModelNeeds) -> None:
    """Raise ValueError for a model that cannot be trained further with this config."""
    channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != num_unet_inputs(config, pipe.vae, needs):
        model = f"init_from={config.init_from!r} has a UNet of {channels} channels for {latents} latents"
        raise ValueError(f"{model}, not one for {config.task}")
    if pipe.vae.config.in_channels != config.data.channels:
        raise ValueError(f"data.channels={config.data.channels}: init_from draws {pipe.vae.config.in_channels} channels")
    check_divisible(config, pipe.vae_scale_factor)
    if pipe.unet.config.out_channels != latents * (1 + learns_variance(pipe.scheduler)):
        outputs = f"{pipe.unet.config.out_channels} outputs for {latents} latents"
        raise ValueError(f"init_from={config.init_from!r}: {outputs} and variance_type {pipe.scheduler.config.variance_type}")
    _check_target(config, pipe)
    if pipe.controlnet is not None and not needs.trains_controlnet:
        raise ValueError(f"init_from={config.init_from!r} has a ControlNet, which only task=control trains")


def _check_target(config: Config, pipe: SfumatoPipeline) -> None:
    """Raise ValueError for an objective that does not suit what the model predicts."""
    if pipe.scheduler.prediction_type == "epsilon" and config.objective.min_snr_floor:
        raise ValueError("objective.min_snr_floor: init_from predicts epsilon, on which a floor is unbounded; leave it out")
    if pipe.scheduler.prediction_type == "epsilon" and config.objective.weight == "edm":
        raise ValueError("objective.weight=edm: init_from predicts epsilon, on which it is unbounded; choose another")


def _add_lora(config: Config, unet: UNet2DConditionModel) -> None:
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("lora.rank needs a package: pip install 'sfumato[lora]'") from error
    alpha: Any = config.lora.rank if config.lora.alpha is None else config.lora.alpha  # a fraction is allowed
    settings = LoraConfig(r=config.lora.rank, lora_alpha=alpha, target_modules=config.lora.target_modules)
    unet.add_adapter(settings)
