"""From the config to tokenizer, text encoder, VAE, UNet and scheduler: real diffusers and transformers classes."""

import json
import warnings
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.conditions import UPSCALERS_SCALE
from sfumato.pipelines.guided import run_network
from sfumato.schedulers import SfumatoDDPMScheduler, SfumatoFlowScheduler, trained
from sfumato.training.models.autoencoder import divisible, identity_vae, known, lists_to_tuples, made, set_scaling_factor
from sfumato.training.config.schema import Config, TextEncoderConfig
from sfumato.training.models.latent_space import is_identity

START, END = "<|startoftext|>", "<|endoftext|>"


class Denoiser(torch.nn.Module):
    """Text encoder, UNet and, where there is one, ControlNet as one module: one DDP wrapper and one optimizer serve all."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, controlnet: ControlNetModel | None = None
    ):  # fmt: skip
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.controlnet = controlnet

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, given: dict | None = None) -> torch.Tensor:
        """Prediction `(B, C, H, W)` for noisy `x_t`, timesteps `(B,)` and token ids `(B, L)` or embeddings `(B, L, D)`.

        `given`: see `guided.run_network`.
        """
        embeddings = text if text.is_floating_point() else self.text_encoder(text)[0]
        return run_network(self.unet, self.controlnet, x_t, t, embeddings, given)


def train_tokenizer(captions: list[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-level BPE is learned from `captions`.

    All 256 bytes are in the vocabulary, alone and at a word's end, so every text in every script can be written.
    """
    blank = CLIPTokenizer(vocab={END: 0, START: 1}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [letter + "</w>" for letter in alphabet]
    # Pairs that are as frequent are merged in the order of their letters' numbers, so all letters get theirs here: those that
    # the learner meets by itself come in another order in each process.
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - 2, len(base)), end_of_word_suffix="</w>", special_tokens=base, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    vocab, merges = {token: i for i, token in enumerate(base)}, []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    for mark in (START, END):
        vocab[mark] = len(vocab)
    # The same in every process by now; should another learner break ties at random, all speak the first one's tokens.
    vocab, merges = broadcast_object_list([vocab, merges])
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def build_text_encoder(
    config: TextEncoderConfig, captions: list[str], tokenizer: CLIPTokenizer | None = None
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer, where not given, and text encoder, from random weights or pretrained (a folder or Hub id with both)."""
    if config.pretrained is not None:
        key, source = "text_encoder.pretrained", config.pretrained
        encoder, whole = _pretrained(CLIPTextModel, key, source, "text_encoder", dtype=torch.float32)
        try:
            tokenizer = tokenizer or CLIPTokenizer.from_pretrained(source, subfolder="tokenizer" if whole else "")
        except (OSError, ValueError) as error:
            raise ValueError(f"{key}={source!r}: its tokenizer cannot be opened: {error}") from error
        if len(tokenizer) < 256:  # transformers makes an empty one where there is none
            raise ValueError(f"{key}={source!r} has no tokenizer beside its text encoder")
    else:
        tokenizer = tokenizer or train_tokenizer(captions, config.vocab_size, config.max_length)
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=4 * config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=config.max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        # CLIP's own 0.02 drowns in what attention and MLP add at random, so that words can hardly be told apart at first;
        # LOG.md has the figures, which one text layer and the data's palette share in.
        for module in encoder.modules():
            if isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=config.embedding_std)
    train = config.train if config.train is not None else config.pretrained is None
    encoder.requires_grad_(train)
    return tokenizer, encoder.train(train)


def _pretrained(cls: type, key: str, source: str, part: str, **arguments):
    """The model `part` of a whole pipeline, or of a folder or repository with that model alone; and whether it is whole.

    Only safetensors are opened: a pickle can run code.

    Raises:
        ValueError: neither is there; names the setting `key`.
    """
    try:
        return cls.from_pretrained(source, subfolder=part, use_safetensors=True, **arguments), True
    except (OSError, ValueError, SafetensorError) as error:
        try:
            return cls.from_pretrained(source, use_safetensors=True, **arguments), False
        except (OSError, ValueError, SafetensorError):
            raise ValueError(f"{key}={source!r} cannot be opened: {str(error).strip().splitlines()[0]}") from error


def build_scheduler(config: Config) -> SfumatoDDPMScheduler | SfumatoFlowScheduler:
    """The scheduler; pixel models clip x_0 to [-1, 1] in the form that StableDiffusionPipeline leaves alone."""
    if config.objective.target == "flow":
        if unknown := set(config.scheduler) - {"num_train_timesteps", "shift"}:  # others do not travel
            raise ValueError(f"scheduler: flow matching takes num_train_timesteps and shift, not {', '.join(sorted(unknown))}")
        return made("scheduler", SfumatoFlowScheduler, config.scheduler)
    arguments = {"timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False, **config.scheduler}
    if config.vae.pretrained is None:
        arguments = {"thresholding": True, "sample_max_value": 1.0, **arguments}
    known(arguments, SfumatoDDPMScheduler, "scheduler")
    return made("scheduler", SfumatoDDPMScheduler, arguments)


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
    known(config.unet, UNet2DConditionModel, "unet")
    scheduler = build_scheduler(config)
    torch.manual_seed(config.seed)
    tokenizer, text_encoder = build_text_encoder(config.text_encoder, captions, tokenizer)
    upscaling = config.task == "upscaling"
    if config.vae.pretrained is None:
        vae = identity_vae(max(config.data.size), config.data.channels, 4 if config.task == "inpainting" else None, upscaling)
    else:
        vae, _ = _pretrained(AutoencoderKL, "vae.pretrained", config.vae.pretrained, "vae")
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
    divisible(config, factor)
    given = {
        "sample_size": _sample_size(config, factor),
        "in_channels": _num_inputs(config, vae),
        "out_channels": vae.config.latent_channels * (1 + learns_variance(scheduler)),
        **({"class_embed_type": "timestep"} if upscaling else {}),
        "cross_attention_dim": text_encoder.config.hidden_size,
    }
    if clash := {k: config.unet[k] for k, v in given.items() if config.unet.get(k, v) != v}:
        raise ValueError(f"unet: {clash} contradicts what data, vae and text_encoder say: { {k: given[k] for k in clash} }")
    unet = made("unet", UNet2DConditionModel, {**lists_to_tuples(config.unet), **given})
    strengthen_conditioning(unet)
    more = {"self_conditioning": True} if config.objective.self_conditioning else {}
    if upscaling:
        low_res = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        if config.upscaling.max_noise_level >= low_res.config.num_train_timesteps:
            raise ValueError(f"upscaling.max_noise_level must be below {low_res.config.num_train_timesteps}")
        more = {"low_res_scheduler": low_res, "max_noise_level": config.upscaling.max_noise_level}
    return SfumatoPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, **more)


def learns_variance(scheduler) -> bool:
    """Whether the network's output has a second half, which says the variance (Nichol and Dhariwal 2021)."""
    return scheduler.config.get("variance_type") == "learned_range"


def _num_inputs(config: Config, vae: AutoencoderKL) -> int:
    """Channels that the UNet reads: the noisy latents; for inpainting also the mask and the masked picture's latents; for
    upscaling the small picture; with self-conditioning what it last made of them.
    """
    beside = {"inpainting": vae.config.latent_channels + 1, "upscaling": vae.config.in_channels}
    own = vae.config.latent_channels if config.objective.self_conditioning else 0
    return vae.config.latent_channels + beside.get(config.task, own)


def build_controlnet(unet: UNet2DConditionModel, factor: int) -> ControlNetModel:
    """A stock ControlNet for this UNet that reads maps of `factor` times its size; changes nothing until it is trained.

    It begins with all weights of the UNet that fit: diffusers knows no ControlNet with a `time_embedding_dim` of its own.
    """
    widths = (16, 32, 96, 256, 256)[: factor.bit_length()]
    new = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths, load_weights_from_unet=False)
    if unet.config.addition_embed_type:  # whose number of heads from_unet forgets
        heads = {"addition_embed_type_num_heads": unet.config.addition_embed_type_num_heads, "_use_default_values": []}
        new = ControlNetModel.from_config({**new.config, **heads})
    own = new.state_dict()
    fits = {name: value for name, value in unet.state_dict().items() if name in own and own[name].shape == value.shape}
    new.load_state_dict(fits, strict=False)
    return new


def widen(unet: UNet2DConditionModel, in_channels: int, out_channels: int) -> None:
    """More channels in and out, their weights zero: what the UNet computes stays as it is until they are trained."""
    for name, ins, outs in (("conv_in", in_channels, None), ("conv_out", None, out_channels)):
        old = getattr(unet, name)
        ins, outs = ins or old.in_channels, outs or old.out_channels
        new = torch.nn.Conv2d(ins, outs, old.kernel_size, padding=old.padding)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.zero_()
            new.weight[: old.out_channels, : old.in_channels] = old.weight
            new.bias[: old.out_channels] = old.bias
        setattr(unet, name, new)
    unet.register_to_config(in_channels=in_channels, out_channels=out_channels)


def _sample_size(config: Config, factor: int) -> int | tuple[int, int]:
    """The UNet's `sample_size`: the side of the latents, or their height and width."""
    height, width = (side // factor for side in config.data.size)
    return height if height == width else (height, width)


def load_pipeline(config: Config) -> SfumatoPipeline:
    """The model of `init_from`, ready to be fine-tuned; with `lora.rank`, its UNet gets the adapter that alone is trained.

    Raises:
        ValueError: no such model, one that this trainer cannot train, or one of another resolution factor.
        ModuleNotFoundError: LoRA needs the package peft.
    """
    inside = Path(config.init_from) / "pipeline"  # of a run folder
    try:
        pipe = SfumatoPipeline.from_pretrained(
            inside if (inside / "model_index.json").is_file() else config.init_from, torch_dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from={config.init_from!r} cannot be opened: {error}") from error
    pipe.register_modules(scheduler=trained(pipe.scheduler))  # whatever sampler the folder names, its schedule is what counts
    channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if pipe.config.self_conditioning != config.objective.self_conditioning:
        raise ValueError(f"objective.self_conditioning: init_from={config.init_from!r} has {pipe.config.self_conditioning}")
    if channels == latents == pipe.unet.config.out_channels and config.task == "inpainting":
        if is_identity(pipe.vae):
            pipe.register_modules(vae=identity_vae(max(config.data.size), pipe.vae.config.in_channels, 4))
            latents = 4
        widen(pipe.unet, _num_inputs(config, pipe.vae), latents)
    elif channels != _num_inputs(config, pipe.vae):
        model = f"init_from={config.init_from!r} has a UNet of {channels} channels for {latents} latents"
        raise ValueError(f"{model}, not one for {config.task}")
    if pipe.vae.config.in_channels != config.data.channels:
        raise ValueError(f"data.channels={config.data.channels}: init_from draws {pipe.vae.config.in_channels} channels")
    divisible(config, pipe.vae_scale_factor)
    if pipe.unet.config.out_channels != latents * (1 + learns_variance(pipe.scheduler)):
        outputs = f"{pipe.unet.config.out_channels} outputs for {latents} latents"
        raise ValueError(f"init_from={config.init_from!r}: {outputs} and variance_type {pipe.scheduler.config.variance_type}")
    if pipe.scheduler.prediction_type == "epsilon" and config.objective.min_snr_floor:
        raise ValueError("objective.min_snr_floor: init_from predicts epsilon, on which a floor is unbounded; leave it out")
    if pipe.scheduler.prediction_type == "epsilon" and config.objective.weight == "edm":
        raise ValueError("objective.weight=edm: init_from predicts epsilon, on which it is unbounded; choose another")
    pipe.unet.register_to_config(sample_size=_sample_size(config, pipe.vae_scale_factor))
    torch.manual_seed(config.seed)
    pipe.vae.requires_grad_(False).eval()
    train_text = bool(config.text_encoder.train) and not config.lora.rank
    pipe.text_encoder.requires_grad_(train_text).train(train_text)
    pipe.unet.requires_grad_(not config.lora.rank).train()
    if config.task == "control":
        pipe.unet.requires_grad_(False).eval()
        pipe.text_encoder.requires_grad_(False).eval()
        if pipe.controlnet is None:
            pipe.register_modules(controlnet=build_controlnet(pipe.unet, pipe.vae_scale_factor))
        if pipe.controlnet.config.conditioning_channels != 3:
            raise ValueError(f"init_from={config.init_from!r} has a ControlNet that does not read maps of 3 channels")
        pipe.controlnet.requires_grad_(True).train()
    elif pipe.controlnet is not None:
        raise ValueError(f"init_from={config.init_from!r} has a ControlNet, which only task=control trains")
    if config.lora.rank:
        try:
            from peft import LoraConfig
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("lora.rank needs a package: pip install 'sfumato[lora]'") from error
        alpha = config.lora.rank if config.lora.alpha is None else config.lora.alpha
        pipe.unet.add_adapter(LoraConfig(r=config.lora.rank, lora_alpha=alpha, target_modules=config.lora.target_modules))
    return pipe


def warn_of_long_captions(pipe: SfumatoPipeline, captions: list[str]) -> None:
    """Say how many captions lose their end to the token limit; nothing is cut in silence."""
    limit, long, longest = pipe.tokenizer.model_max_length, 0, 0
    for start in range(0, len(captions), 1000):
        lengths = [len(ids) for ids in pipe.tokenizer(captions[start : start + 1000], verbose=False).input_ids]
        long, longest = long + sum(length > limit for length in lengths), max(longest, *lengths)
    if long:
        warnings.warn(
            f"{long} of {len(captions)} captions are longer than {limit} tokens and are cut; "
            f"text_encoder.max_length={longest} would hold them all",
            stacklevel=2,
        )


def strengthen_conditioning(unet: UNet2DConditionModel, factor: float = 3.0) -> None:
    """Let time and pooled text scale and shift every block strongly from the first step on.

    PyTorch's own initialisation gives a linear layer outputs of std 1 / sqrt(3) for inputs of std 1, and the embedding
    is smaller than that after its SiLU; a text that hardly changes what a block does is a text that is slow to learn
    (LOG.md, "where is place learned?").
    """
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith("time_emb_proj"):
                module.weight.mul_(factor)
