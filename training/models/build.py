"""From the config to tokenizer, text encoder, VAE, UNet and scheduler: real diffusers and transformers classes."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTokenizer

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.conditions import UPSCALERS_SCALE
from sfumato.schedulers import SfumatoDDPMScheduler, SfumatoFlowScheduler
from sfumato.training.config.schema import Config
from sfumato.training.models.autoencoder import identity_vae, set_scaling_factor
from sfumato.training.models.denoiser import learns_variance, num_unet_inputs, sample_size, strengthen_conditioning
from sfumato.training.models.finetune import load_pipeline
from sfumato.training.models.pretrained import load_part
from sfumato.training.models.stock_classes import build_stock, check_arguments, check_divisible, lists_to_tuples
from sfumato.training.models.text import build_text_encoder


def build_scheduler(config: Config) -> SfumatoDDPMScheduler | SfumatoFlowScheduler:
    """The scheduler; pixel models clip x_0 to [-1, 1] in the form that StableDiffusionPipeline leaves alone."""
    if config.objective.target == "flow":
        if unknown := set(config.scheduler) - {"num_train_timesteps", "shift"}:  # others do not travel
            raise ValueError(f"scheduler: flow matching takes num_train_timesteps and shift, not {', '.join(sorted(unknown))}")
        return build_stock("scheduler", SfumatoFlowScheduler, config.scheduler)
    arguments = {"timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False, **config.scheduler}
    if config.vae.pretrained is None:
        arguments = {"thresholding": True, "sample_max_value": 1.0, **arguments}
    check_arguments(arguments, SfumatoDDPMScheduler, "scheduler")
    return build_stock("scheduler", SfumatoDDPMScheduler, arguments)


def build_pipeline(config: Config, captions: list[str], tokenizer: CLIPTokenizer | None = None) -> SfumatoPipeline:
    """All parts, random weights drawn from `config.seed`.

    Args:
        captions: all training captions, from which the tokenizer learns its words.
        tokenizer: of a run that goes on; its words stay, whatever became of the captions.

    Raises:
        ValueError: an argument that the stock class does not have, or that contradicts another section.
    """
    if config.init_from is not None:
        pipe = load_pipeline(config)
        if tokenizer is not None:
            pipe.register_modules(tokenizer=tokenizer)
        return pipe
    check_arguments(config.unet, UNet2DConditionModel, "unet")
    scheduler = build_scheduler(config)
    torch.manual_seed(config.seed)
    tokenizer, text_encoder = build_text_encoder(config.text_encoder, captions, tokenizer)
    upscaling = config.task == "upscaling"
    if config.vae.pretrained is None:
        vae = identity_vae(max(config.data.size), config.data.channels, 4 if config.task == "inpainting" else None, upscaling)
    else:
        vae, _ = load_part(AutoencoderKL, "vae.pretrained", config.vae.pretrained, "vae")
        vae.requires_grad_(False).eval()
        if vae.config.in_channels != config.data.channels:
            raise ValueError(f"data.channels={config.data.channels}: vae.pretrained takes {vae.config.in_channels}")
        if config.task == "inpainting" and vae.config.latent_channels != 4:
            raise ValueError("task=inpainting needs a VAE of 4 latent channels: Stable Diffusion's inpainting knows no other")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if upscaling:
        if config.upscaling.factor < factor:
            raise ValueError(
                f"upscaling.factor={config.upscaling.factor}: latents are {factor} times smaller than pictures, and the small "
                f"picture lies beside them; set it to {factor} or more"
            )
        if vae.quant_conv is None or vae.post_quant_conv is None:
            raise ValueError("vae.pretrained: stock upscaling needs a VAE with quant_conv and post_quant_conv")
        set_scaling_factor(vae, UPSCALERS_SCALE)
    check_divisible(config, factor)
    given = {
        "sample_size": sample_size(config, factor),
        "in_channels": num_unet_inputs(config, vae),
        "out_channels": vae.config.latent_channels * (1 + learns_variance(scheduler)),
        **({"class_embed_type": "timestep"} if upscaling else {}),
        "cross_attention_dim": text_encoder.config.hidden_size,
    }
    if clash := {k: config.unet[k] for k, v in given.items() if config.unet.get(k, v) != v}:
        raise ValueError(f"unet: {clash} contradicts what data, vae and text_encoder say: { {k: given[k] for k in clash} }")
    unet = build_stock("unet", UNet2DConditionModel, {**lists_to_tuples(config.unet), **given})
    strengthen_conditioning(unet)
    more = {"self_conditioning": True} if config.objective.self_conditioning else {}
    if upscaling:
        low_res = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        if config.upscaling.max_noise_level >= low_res.config.num_train_timesteps:
            raise ValueError(f"upscaling.max_noise_level must be below {low_res.config.num_train_timesteps}")
        more = {"low_res_scheduler": low_res, "max_noise_level": config.upscaling.max_noise_level}
    return SfumatoPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, **more)
