"""From the config to tokenizer, text encoder, VAE, UNet and scheduler: real diffusers and transformers classes."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTokenizer

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.guided import NetworkInputs, run_network
from sfumato.pipelines.inputs import CAPTION_WORDS
from sfumato.pipelines.trust import find_depth
from sfumato.registries import TASKS
from sfumato.schedulers import SfumatoDDPMScheduler, SfumatoFlowScheduler
from sfumato.training.config.schema import Config
from sfumato.training.models.autoencoder import downsampling_factor, identity_vae
from sfumato.training.models.denoiser import (
    ModelNeeds,
    learns_variance,
    num_unet_inputs,
    strengthen_conditioning,
    unet_sample_size,
)
from sfumato.training.models.finetune import load_pipeline
from sfumato.training.models.pretrained import check_predecessor, load_part
from sfumato.training.models.stock_classes import (
    build_stock,
    check_arguments,
    check_contradictions,
    check_divisible,
    lists_to_tuples,
)
from sfumato.training.models.text import build_text_encoder, extend_vocabulary, fit_text_encoder, remember_words

MAX_LAYERS = 200
MAX_PARAMETERS = 50_000_000_000


def build_pipeline(config: Config, captions: list[str], tokenizer: CLIPTokenizer | None = None) -> SfumatoPipeline:
    """All parts, with random weights drawn from `config.seed`; or the model of `init_from`.

    Args:
        captions: all training captions, from which the tokenizer learns its words.
        tokenizer: that of a run that is resumed; its vocabulary stays, whatever has become of the captions.

    Raises:
        ValueError: an argument that the stock class does not have, or that contradicts another section.
    """
    needs: ModelNeeds = TASKS.load(config.task).model_needs(config)
    if config.init_from is not None:
        vae = build_vae(config, needs) if config.vae.pretrained is not None else None
        pipe = load_pipeline(config, needs, vae)
        text = config.text_encoder
        trained = any(parameter.requires_grad for parameter in pipe.text_encoder.parameters())
        grows = bool(text.extra_vocab and text.train and trained)
        if tokenizer is not None:
            pipe.register_modules(tokenizer=tokenizer)
        else:
            if grows:
                grown = extend_vocabulary(pipe.tokenizer, captions, text.extra_vocab, text.max_length)
                pipe.register_modules(tokenizer=grown)
            if pipe.tokenizer.init_kwargs.get(CAPTION_WORDS):
                remember_words(pipe.tokenizer, captions)
        if grows:
            fit_text_encoder(pipe.text_encoder, pipe.tokenizer)
        return pipe
    check_arguments(config.unet, UNet2DConditionModel, "unet")
    scheduler = build_scheduler(config)
    torch.manual_seed(config.seed)
    tokenizer, text_encoder = build_text_encoder(config.text_encoder, captions, tokenizer)
    vae = build_vae(config, needs)
    factor = downsampling_factor(vae)
    check_divisible(config, factor)
    unet = _build_unet(config, needs, vae, scheduler, text_encoder.config.hidden_size)
    strengthen_conditioning(unet)
    components = dict(needs.components)
    if config.objective.self_conditioning:
        components["self_conditioning"] = True
    return SfumatoPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, **components
    )


def _build_unet(config: Config, needs: ModelNeeds, vae: AutoencoderKL, scheduler, text_width: int) -> UNet2DConditionModel:
    factor = downsampling_factor(vae)
    derived = {
        "sample_size": unet_sample_size(config, factor),
        "in_channels": num_unet_inputs(config, vae, needs),
        "out_channels": vae.config["latent_channels"] * (1 + learns_variance(scheduler)),
        **needs.unet,
        "cross_attention_dim": text_width,
    }
    check_contradictions(config.unet, derived, "unet", "data, vae and text_encoder say")
    return build_stock("unet", UNet2DConditionModel, {**lists_to_tuples(config.unet), **derived})


def check_network(config: Config) -> None:
    """Run the network of a config once on torch's meta device, which computes only shapes, before anything slow.

    Raises:
        ValueError: it cannot be built, or does not fit images of the config's sizes; with diffusers' reason in one line.
    """
    needs: ModelNeeds = TASKS.load(config.task).model_needs(config)
    for key, source in (("init_from", config.init_from), ("text_encoder.pretrained", config.text_encoder.pretrained)):
        if source is not None:
            check_predecessor(key, source)
    if config.init_from is not None or not needs.has_unet:
        return
    if (same := _network_settings(config)) in _fitting:
        return
    check_arguments(config.unet, UNet2DConditionModel, "unet")
    if depth := find_depth(config.unet, MAX_LAYERS):
        raise ValueError(f"unet: {depth}; at most {MAX_LAYERS} are allowed")
    scheduler = build_scheduler(config)
    vae = build_vae(config, needs)
    factor = downsampling_factor(vae)
    check_divisible(config, factor)
    pretrained = config.text_encoder.pretrained is not None
    width = config.unet.get("cross_attention_dim", 64) if pretrained else config.text_encoder.hidden_size
    with torch.device("meta"), torch.no_grad():
        unet = _build_unet(config, needs, vae, scheduler, width)
        if (count := sum(parameter.numel() for parameter in unet.parameters())) > MAX_PARAMETERS:
            raise ValueError(f"unet: asks for {count:,} parameters; at most {MAX_PARAMETERS:,} are allowed")
        for height, width_of_image in config.data.buckets or [config.data.size]:
            shape = (2, unet.config["in_channels"], height // factor, width_of_image // factor)
            labelled = unet.config["class_embed_type"] or unet.config["num_class_embeds"]
            labels = torch.zeros(2, dtype=torch.long) if labelled else None
            inputs = NetworkInputs(class_labels=labels)
            try:
                out = run_network(unet, None, torch.zeros(shape), torch.zeros(2), torch.zeros(2, 3, width), inputs)
            except Exception as error:  # whatever a mismatched shape raises
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                raise ValueError(f"unet: it cannot draw {height} x {width_of_image} pixels: {reason}") from error
            if tuple(out.shape[2:]) != shape[2:]:
                raise ValueError(f"unet: it turns latents {shape[2:]} into {tuple(out.shape[2:])}; sides must divide further")
    _fitting.add(same)


_fitting: set[str] = set()  # what `check_network` has found to fit in this process


def _network_settings(config: Config) -> str:
    """Everything that decides whether a network fits."""
    own = TASKS[config.task].section
    parts = (config.objective, config.text_encoder, config.vae, config.unet, config.scheduler, own and getattr(config, own))
    return repr((config.task, config.data.size, config.data.buckets, config.data.channels, parts))


def build_vae(config: Config, needs: ModelNeeds) -> AutoencoderKL:
    """The identity, or the VAE of `vae.pretrained`, frozen.

    Raises:
        ValueError: it does not suit the data or the task.
    """
    if config.vae.pretrained is None:
        repeat = config.vae.repeat
        vae = identity_vae(max(config.data.size), config.data.channels, needs.latent_channels, needs.use_quant_conv, repeat)
        needs.prepare_vae(vae, repeat)
        return vae
    vae, _ = load_part(AutoencoderKL, "vae.pretrained", config.vae.pretrained, "vae")
    vae.requires_grad_(False).eval()
    if vae.config.in_channels != config.data.channels:
        raise ValueError(f"data.channels={config.data.channels}: vae.pretrained takes {vae.config.in_channels}")
    if needs.latent_channels not in (None, vae.config.latent_channels):
        raise ValueError(
            f"task={config.task} needs a VAE of {needs.latent_channels} latent channels: "
            "its stock pipeline supports no other number"
        )
    needs.prepare_vae(vae, downsampling_factor(vae))
    return vae


def build_scheduler(config: Config) -> SfumatoDDPMScheduler | SfumatoFlowScheduler:
    """The scheduler; pixel models clip x_0 to [-1, 1] in the form that StableDiffusionPipeline leaves alone.

    They do not with `empty_caption: noise`, whose guided x_0 lies outside [-1, 1].
    """
    if config.objective.target == "flow":
        if unknown := set(config.scheduler) - {"num_train_timesteps", "shift"}:  # others do not travel
            raise ValueError(f"scheduler: flow matching takes num_train_timesteps and shift, not {', '.join(sorted(unknown))}")
        return build_stock("scheduler", SfumatoFlowScheduler, config.scheduler)
    arguments = {"timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False, **config.scheduler}
    if config.vae.pretrained is None and config.objective.empty_caption == "data":
        arguments = {"thresholding": True, "sample_max_value": 1.0, **arguments}
    check_arguments(arguments, SfumatoDDPMScheduler, "scheduler")
    return build_stock("scheduler", SfumatoDDPMScheduler, arguments)
