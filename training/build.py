"""From the config to tokenizer, text encoder, VAE, UNet and scheduler: real diffusers and transformers classes."""

import inspect
import json
import warnings

import torch
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfumato.pipelines import SfumatoPipeline
from sfumato.schedulers import SfumatoDDPMScheduler
from sfumato.training.config import Config, TextEncoderConfig
from sfumato.training.latents import is_identity

START, END = "<|startoftext|>", "<|endoftext|>"


class Denoiser(torch.nn.Module):
    """Text encoder and UNet as one module, so that one DDP wrapper and one optimizer serve both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Prediction `(B, C, H, W)` for noisy `x_t`, timesteps `(B,)` and token ids `(B, L)` or embeddings `(B, L, D)`."""
        embeddings = text if text.is_floating_point() else self.text_encoder(text)[0]
        return self.unet(x_t, t, embeddings, return_dict=False)[0]


class VariationalAutoencoder(torch.nn.Module):
    """Encoder, a latent drawn by given noise, and decoder as one forward pass (Kingma and Welling 2014)."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures `(B, C, H, W)` as they come back, and mean and log-variance of their latents, `(B, c, h, w)`."""
        latent = self.vae.encode(pixels).latent_dist
        return self.vae.decode(latent.mean + latent.std * noise).sample, latent.mean, latent.logvar


def build_autoencoder(config: Config) -> VariationalAutoencoder:
    """A stock `AutoencoderKL` of random weights, drawn from `config.seed`.

    Raises:
        ValueError: an argument that the class does not have, or that contradicts `data`.
    """
    arguments = config.autoencoder.model
    _known(arguments, AutoencoderKL, "autoencoder.model")
    given = {"sample_size": config.data.resolution, "in_channels": config.data.channels, "out_channels": config.data.channels}
    if clash := {k: arguments[k] for k, v in given.items() if arguments.get(k, v) != v}:
        raise ValueError(f"autoencoder.model: {clash} contradicts what data says: { {k: given[k] for k in clash} }")
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(**{**_lists_to_tuples(arguments), **given})
    _divisible(config, 2 ** (len(vae.config.block_out_channels) - 1))
    return VariationalAutoencoder(vae)


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
    # The learner counts only the letters it meets; ask for enough and cut its merges to what fits beside all bytes.
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False),
    )
    vocab = {token: i for i, token in enumerate(base)}
    merges = []
    for merge in json.loads(learner.to_str())["model"]["merges"]:
        if len(vocab) >= vocab_size - 2:
            break
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    for mark in (START, END):
        vocab[mark] = len(vocab)
    # Ties between equally frequent pairs may fall differently in another process; all must speak the first one's tokens.
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


def identity_vae(sample_size: int, channels: int = 3, latent_channels: int | None = None) -> AutoencoderKL:
    """A stock `AutoencoderKL` that computes the identity to 6e-7, so that a pixel model is an ordinary folder.

    Latent channels beyond the picture's, if any, are zero: Stable Diffusion's inpainting knows none but 4.

    Each colour x goes through the net as the pair (x, -x), and silu(x) - silu(-x) = x gives it back. Two channels of
    +-K fix the group norm's variance at K^2 / (channels + 1) whatever the picture; its weight undoes the division.
    """
    latent_channels = latent_channels or channels
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(2 * channels + 2,),
        latent_channels=latent_channels,
        norm_num_groups=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        sample_size=sample_size,
    )
    big = 1000.0
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        for half in (vae.encoder, vae.decoder):
            half.conv_norm_out.weight.fill_((big**2 / (channels + 1) + half.conv_norm_out.eps) ** 0.5)
            half.conv_in.bias[2 * channels :] = torch.tensor([big, -big])
            for colour in range(channels):
                half.conv_in.weight[2 * colour, colour, 1, 1] = 1
                half.conv_in.weight[2 * colour + 1, colour, 1, 1] = -1
                half.conv_out.weight[colour, 2 * colour, 1, 1] = 1
                half.conv_out.weight[colour, 2 * colour + 1, 1, 1] = -1
        vae.encoder.conv_out.bias[latent_channels:] = -30.0  # log-variance: no noise
    return vae.requires_grad_(False).eval()


def build_scheduler(config: Config) -> SfumatoDDPMScheduler:
    """The scheduler; pixel models clip x_0 to [-1, 1] in the form that StableDiffusionPipeline leaves alone."""
    arguments = {"timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False, **config.scheduler}
    if config.vae.pretrained is None:
        arguments = {"thresholding": True, "sample_max_value": 1.0, **arguments}
    _known(arguments, SfumatoDDPMScheduler, "scheduler")
    return SfumatoDDPMScheduler(**arguments)


def _known(arguments: dict, cls: type, section: str) -> None:
    allowed = list(inspect.signature(cls.__init__).parameters)[1:]
    if unknown := set(arguments) - set(allowed):
        raise ValueError(
            f"{section}: {cls.__name__} has no argument {', '.join(sorted(unknown))}; it takes {', '.join(allowed)}"
        )


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
    _known(config.unet, UNet2DConditionModel, "unet")
    scheduler = build_scheduler(config)
    torch.manual_seed(config.seed)
    tokenizer, text_encoder = build_text_encoder(config.text_encoder, captions, tokenizer)
    if config.vae.pretrained is None:
        vae = identity_vae(config.data.resolution, config.data.channels, 4 if config.task == "inpainting" else None)
    else:
        vae, _ = _pretrained(AutoencoderKL, "vae.pretrained", config.vae.pretrained, "vae")
        vae.requires_grad_(False).eval()
        if vae.config.in_channels != config.data.channels:
            raise ValueError(f"data.channels={config.data.channels}: vae.pretrained takes {vae.config.in_channels}")
        if config.task == "inpainting" and vae.config.latent_channels != 4:
            raise ValueError("task=inpainting needs a VAE of 4 latent channels: Stable Diffusion's inpainting knows no other")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    _divisible(config, factor)
    given = {
        "sample_size": config.data.resolution // factor,
        "in_channels": _num_inputs(config, vae),
        "out_channels": vae.config.latent_channels,
        "cross_attention_dim": text_encoder.config.hidden_size,
    }
    if clash := {k: config.unet[k] for k, v in given.items() if config.unet.get(k, v) != v}:
        raise ValueError(f"unet: {clash} contradicts what data, vae and text_encoder say: { {k: given[k] for k in clash} }")
    unet = UNet2DConditionModel(**{**_lists_to_tuples(config.unet), **given})
    strengthen_conditioning(unet)
    return SfumatoPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)


def _num_inputs(config: Config, vae: AutoencoderKL) -> int:
    """Channels that the UNet reads: the noisy latents, for inpainting also the mask and the masked picture's latents."""
    return vae.config.latent_channels * (2 if config.task == "inpainting" else 1) + (config.task == "inpainting")


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


def _divisible(config: Config, factor: int) -> None:
    for side in (config.data.resolution, *(side for size in config.data.buckets for side in size)):
        if side % factor:
            raise ValueError(f"data.resolution and buckets must be multiples of the VAE's factor {factor}, not {side}")


def load_pipeline(config: Config) -> SfumatoPipeline:
    """The model of `init_from`, ready to be fine-tuned; with `lora.rank`, its UNet gets the adapter that alone is trained.

    Raises:
        ValueError: no such model, one that this trainer cannot train, or one of another resolution factor.
        ModuleNotFoundError: LoRA needs the package peft.
    """
    try:
        pipe = SfumatoPipeline.from_pretrained(config.init_from, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from={config.init_from!r} cannot be opened: {error}") from error
    if type(pipe.scheduler) is not SfumatoDDPMScheduler:  # the sampler that the folder names; its schedule is what counts
        pipe.register_modules(scheduler=SfumatoDDPMScheduler.from_config(pipe.scheduler.config))
    channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels == latents == pipe.unet.config.out_channels and config.task == "inpainting":
        if is_identity(pipe.vae):
            pipe.register_modules(vae=identity_vae(config.data.resolution, pipe.vae.config.in_channels, 4))
            latents = 4
        widen(pipe.unet, _num_inputs(config, pipe.vae), latents)
    elif channels != _num_inputs(config, pipe.vae):
        model = f"init_from={config.init_from!r} has a UNet of {channels} channels for {latents} latents"
        raise ValueError(f"{model}, not one for {config.task}")
    if pipe.vae.config.in_channels != config.data.channels:
        raise ValueError(f"data.channels={config.data.channels}: init_from draws {pipe.vae.config.in_channels} channels")
    _divisible(config, pipe.vae_scale_factor)
    if pipe.unet.config.out_channels != latents:
        raise ValueError(f"init_from={config.init_from!r} also predicts its variance, which this trainer does not train")
    if pipe.scheduler.config.prediction_type == "epsilon" and config.objective.min_snr_floor:
        raise ValueError("objective.min_snr_floor: init_from predicts epsilon, on which a floor is unbounded; leave it out")
    pipe.unet.register_to_config(sample_size=config.data.resolution // pipe.vae_scale_factor)
    torch.manual_seed(config.seed)
    pipe.vae.requires_grad_(False).eval()
    train_text = bool(config.text_encoder.train) and not config.lora.rank
    pipe.text_encoder.requires_grad_(train_text).train(train_text)
    pipe.unet.requires_grad_(not config.lora.rank).train()
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


def _lists_to_tuples(arguments: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
