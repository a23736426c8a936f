"""The arguments of a pipeline call: checked before anything is computed; images and masks are turned into tensors.

Self-contained on purpose (torch, numpy, PIL and diffusers only): this file travels inside shared model folders.
"""

import functools
import re
import threading
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils import logging
from PIL import Image

from sfumato.pipelines.images import UnsupportedImage, to_8_bits

logger = logging.get_logger(__name__)

CAPTION_WORDS = "caption_words"  # key in the tokenizer's settings: all words of the training captions


_TOKENIZING = threading.Lock()


def tokenize(tokenizer, text: str | list[str], **settings):
    """`tokenizer(text, **settings)`, one thread at a time: padding and truncation are state that all callers share."""
    with _TOKENIZING:
        return tokenizer(text, **settings)


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning about a prompt once per process, since the same prompt is often drawn many times."""
    logger.warning(message)


def split_words(text: str) -> list[str]:
    """The words of a text in lower case; single characters for scripts without spaces between words."""
    return re.findall(r"[\u2e80-\u9fff]|[^\W\d_\u2e80-\u9fff]+", text.lower())


def warn_of_unknown_words(tokenizer, prompts: list[str]) -> None:
    """Warn of words that are in no training caption; does nothing if the tokenizer does not list the caption words."""
    listed = tokenizer.init_kwargs.get(CAPTION_WORDS)
    known = {word for word in listed if isinstance(word, str)} if isinstance(listed, list) else set()
    unknown = dict.fromkeys(word for prompt in prompts for word in split_words(prompt) if word not in known)
    if known and unknown:
        words = ", ".join(repr(word) for word in list(unknown)[:10])
        has = "that are in no caption this model was trained on"
        warn_once(f"Words of the prompts {has}: {words}. The model can only guess what they mean.")


@dataclass(frozen=True, kw_only=True)
class CallInputs:
    """The arguments of a pipeline call that are checked, as in `SfumatoPipeline.__call__` with the sizes filled in."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    image: object
    mask_image: object
    strength: float | None
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float | None
    num_images_per_prompt: int
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    output_type: str
    callback_tensors: list[str]
    num_resamples: int
    noise_level: int | None
    control_image: object
    control_scale: object = 1.0
    callback: object = None
    cross_attention_kwargs: object = None


def check_inputs(pipe, call: CallInputs) -> None:
    """Reject wrong types, sizes and ranges before anything is computed.

    Raises:
        TypeError, ValueError: the message names the value, what is allowed and what to do.
    """
    num_images = _check_prompts(pipe, call) * call.num_images_per_prompt
    _check_steps_and_size(pipe, call)
    _check_guidance(pipe, call)
    _check_generator(call, num_images)
    if call.latents is not None:
        factor = pipe.vae_scale_factor
        _check_floats("latents", call.latents)
        expected = (num_images, pipe.vae.config.latent_channels, call.height // factor, call.width // factor)
        if tuple(call.latents.shape) != expected:
            raise ValueError(f"`latents` must have shape {expected}, got {tuple(call.latents.shape)}")
    _check_images(pipe, call)
    _check_conditions(pipe, call)
    output_types = ["pil", "np", "pt", "latent"]
    if pipe.codec is not None:
        output_types.append("decoded")
    if call.output_type not in output_types:
        raise ValueError(f"`output_type` must be one of {output_types}, got {call.output_type!r}")
    if call.callback is not None and not callable(call.callback):
        raise TypeError(f"`callback_on_step_end` must be a function, got {type(call.callback).__name__}")
    if call.cross_attention_kwargs is not None and not isinstance(call.cross_attention_kwargs, dict):
        raise TypeError(f"`cross_attention_kwargs` must be a dict, got {type(call.cross_attention_kwargs).__name__}")
    names = call.callback_tensors
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`callback_on_step_end_tensor_inputs` must be a list of names, got {names!r}")
    if unknown := [k for k in call.callback_tensors if k not in pipe._callback_tensor_inputs]:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` may name {pipe._callback_tensor_inputs}, found {unknown}")


def _check_floats(name: str, value, ndim: int = 4) -> None:
    """Reject anything but a dense tensor of finite floats with `ndim` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.device.type == "meta" or not value.is_floating_point():
        raise TypeError(f"`{name}` must be a dense tensor of floats, got {value.dtype}, {value.layout}, on {value.device}")
    if value.ndim != ndim or not value.numel():
        raise ValueError(f"`{name}` must have {ndim} dimensions and values, got the shape {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"`{name}` contains values that are not finite")


def _check_embeds(pipe, call: CallInputs) -> None:
    """Reject embeddings that the network cannot read, or that do not match the unconditional ones."""
    width = pipe.unet.config.cross_attention_dim
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if (value := getattr(call, name)) is not None:
            _check_floats(name, value, 3)
            if isinstance(width, int) and value.shape[-1] != width:
                raise ValueError(f"`{name}` must have the width that the network reads, {width}, got {value.shape[-1]}")
    positive, negative = call.prompt_embeds, call.negative_prompt_embeds
    if positive is None and negative is None:
        return
    if positive is not None and negative is not None:
        if positive.shape != negative.shape and negative.shape != (1, *positive.shape[1:]):
            raise ValueError(
                f"`prompt_embeds` {tuple(positive.shape)} and `negative_prompt_embeds` "
                f"{tuple(negative.shape)} must have the same shape"
            )
        return
    if pipe.text_encoder is None:
        if positive is None or call.guidance_scale != 1:
            given, missing = ("negative_prompt_embeds", "prompt_embeds")[:: 1 if positive is None else -1]
            raise ValueError(f"without a text encoder, `{given}` also needs `{missing}`, or `guidance_scale`=1")
        return
    length = min(pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings)
    name, given = ("prompt_embeds", positive) if positive is not None else ("negative_prompt_embeds", negative)
    other = "negative_prompt_embeds" if positive is not None else "prompt_embeds"
    if given is not None and given.shape[1] != length and call.guidance_scale != 1:
        raise ValueError(
            f"`{name}` has {given.shape[1]} tokens, but the text encoder's own output has {length}; "
            f"pass `{other}` of {given.shape[1]} tokens too"
        )


def _is_count(value) -> bool:
    """Whether a value is an integer of at least 1; True does not count."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_prompts(pipe, call: CallInputs) -> int:
    """Check prompts and embeddings; return the number of prompts."""
    for name, text in (("prompt", call.prompt), ("negative_prompt", call.negative_prompt)):
        if text is not None and not isinstance(text, str):
            if not isinstance(text, list) or not all(isinstance(item, str) for item in text):
                raise TypeError(f"`{name}` must be a string or a list of strings, got {type(text).__name__}: {text!r}")
            if not text:
                raise ValueError(f"`{name}` is an empty list; pass at least one string ('' for no condition)")
    if (call.prompt is None) == (call.prompt_embeds is None):
        raise ValueError("pass exactly one of `prompt` and `prompt_embeds`")
    if call.negative_prompt is not None and call.negative_prompt_embeds is not None:
        raise ValueError("pass at most one of `negative_prompt` and `negative_prompt_embeds`")
    _check_embeds(pipe, call)
    if call.prompt_embeds is not None:
        batch_size = len(call.prompt_embeds)
    else:
        batch_size = 1 if isinstance(call.prompt, str) else len(call.prompt or ())
    if isinstance(call.negative_prompt, list) and len(call.negative_prompt) != batch_size:
        raise ValueError(
            f"{len(call.negative_prompt)} negative prompts for {batch_size} prompts; pass one string, or one for each prompt"
        )
    steered = call.negative_prompt_embeds is not None or any(call.negative_prompt or ())
    if steered and getattr(pipe.guider, "weak", None) is not None:
        raise ValueError("autoguidance steers away from a weaker model, not from a negative prompt; leave it out")
    if not _is_count(call.num_images_per_prompt):
        value = call.num_images_per_prompt
        raise ValueError(f"`num_images_per_prompt` must be a whole number of at least 1, got {value!r}")
    return batch_size


def _check_steps_and_size(pipe, call: CallInputs) -> None:
    steps, trained_steps = call.num_inference_steps, pipe.scheduler.config.num_train_timesteps
    if not _is_count(steps):
        raise ValueError(f"`num_inference_steps` must be a whole number of at least 1, got {steps!r}")
    if steps > trained_steps:
        raise ValueError(f"`num_inference_steps`={steps} is more than the {trained_steps} steps the model was trained with")
    factor = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    for name, value in (("height", call.height), ("width", call.width)):
        if not isinstance(value, int) or not 0 < value <= MAX_SIDE or value % pipe.vae_scale_factor:
            multiple = f"a positive multiple of {pipe.vae_scale_factor} pixels, at most {MAX_SIDE}"
            raise ValueError(f"`{name}` must be {multiple}, got {value!r}")
        if value % factor:
            logger.warning(f"`{name}`={value} is not a multiple of {factor}; the UNet pads internally, which may be visible.")


def _check_guidance(pipe, call: CallInputs) -> None:
    scale = call.guidance_scale
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"`guidance_scale` must be a number, got {type(scale).__name__}: {scale!r}")
    if not 0 <= scale <= MAX_GUIDANCE:
        raise ValueError(f"`guidance_scale` must be finite, at least 0 and at most {MAX_GUIDANCE}, got {scale}")
    settings = {"guidance_scale"} if pipe.guider is None else set(pipe.guider.config)
    second = {"perturbed_guidance_scale", "skip_layer_guidance_scale", "seg_guidance_scale"} & settings
    if scale == 1 and second:
        raise ValueError(f"{type(pipe.guider).__name__} works on top of plain guidance: `guidance_scale` must not be 1")
    if "guidance_scale" not in settings:
        raise ValueError(f"{type(pipe.guider).__name__} takes no `guidance_scale`; set up `pipe.guider` instead")


def _check_generator(call: CallInputs, num_images: int) -> None:
    generator = call.generator
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"{len(generator)} generators for {num_images} images; pass one, or one for each image")
    if generator is not None and not all(
        isinstance(g, torch.Generator) for g in (generator if isinstance(generator, list) else [generator])
    ):
        raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}")


def _check_images(pipe, call: CallInputs) -> None:
    strength = call.strength
    if call.mask_image is not None and call.image is None:
        raise ValueError("`mask_image` says which part of `image` to redraw; pass `image` too")
    if call.image is None and strength is not None:
        raise ValueError("`strength` says how much of `image` to redraw; pass `image` too")
    if strength is not None:
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
            raise ValueError(f"`strength` must be a number above 0 and at most 1, got {strength!r}")
        if round(strength * call.num_inference_steps) < 1:
            raise ValueError(f"`strength`={strength} of {call.num_inference_steps} steps leaves no step to take; raise either")
    if not _is_count(call.num_resamples):
        raise ValueError(f"`num_resamples` must be a whole number of at least 1, got {call.num_resamples!r}")
    if call.num_resamples > 1:
        if call.mask_image is None:
            raise ValueError("`num_resamples` is for inpainting; pass `image` and `mask_image`")
        if not isinstance(pipe.scheduler, (DDPMScheduler, DDIMScheduler)):
            raise ValueError(f"`num_resamples` needs a DDPM or DDIM scheduler, not {type(pipe.scheduler).__name__}")


def _check_conditions(pipe, call: CallInputs) -> None:
    """Check the arguments that upscaling models and ControlNets need and that other models do not take."""
    scale = call.control_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= MAX_GUIDANCE:
        raise ValueError(f"`controlnet_conditioning_scale` must be a number, at most {MAX_GUIDANCE}, got {scale!r}")
    if (pipe.controlnet is None) != (call.control_image is None):
        missing = "has no ControlNet; leave `control_image` out" if pipe.controlnet is None else "needs `control_image`"
        raise ValueError(f"this model {missing}")
    if pipe.reads != "low_res":
        if call.noise_level is not None:
            raise ValueError("`noise_level` is for upscaling models; leave it out")
        return
    if pipe.low_res_scheduler is None:
        raise ValueError("this upscaling model has no low_res_scheduler; it needs one such as DDPMScheduler")
    if call.image is None or call.mask_image is not None or call.strength is not None:
        raise ValueError("an upscaling model takes `image`, the smaller image, and neither `mask_image` nor `strength`")
    limit, level = pipe.config.max_noise_level, call.noise_level
    if level is not None and not (type(level) is int and level == 0 or _is_count(level) and level <= limit):
        raise ValueError(f"`noise_level` must be a whole number from 0 to {limit}, got {level!r}")


MAX_SIDE = 32768
MAX_GUIDANCE = 1000  # beyond this, half precision overflows and nothing is drawn
# Largest value of each integer type whose range is unambiguous.
RANGES = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}


def _stack(name: str, value, one_has: int) -> torch.Tensor:
    """An array, a tensor or a list of them as one float tensor with a batch dimension; uint8, uint16 and bool in [0, 1]."""
    parts = value if isinstance(value, list) else [value]
    tensors = []
    for part in parts:
        if not isinstance(part, (np.ndarray, torch.Tensor)):
            raise TypeError(f"`{name}` must contain PIL images, arrays or tensors, got {type(part).__name__}")
        try:
            tensor = torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part
        except TypeError as error:
            raise TypeError(f"`{name}` is an array of {part.dtype}, not of numbers") from error
        if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
            raise ValueError(f"`{name}` must be a dense tensor with values; this one is empty, sparse or has no data")
        if tensor.dtype not in RANGES and not tensor.is_floating_point():
            raise ValueError(f"`{name}` has {tensor.dtype}, whose range is unknown; pass uint8, uint16 or float in [0, 1]")
        tensor = tensor.float() / RANGES.get(tensor.dtype, 1)
        if isinstance(part, np.ndarray) and tensor.ndim >= 3:  # channels last, as everywhere in diffusers
            tensor = tensor.movedim(-1, -3)
        tensors.append(tensor.float() if tensor.ndim == one_has + 1 else tensor.float()[None])
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        raise ValueError(f"`{name}` contains images of several sizes: {[tuple(t.shape[1:]) for t in tensors]}")
    return torch.cat(tensors)


def _eight_bits(image: Image.Image, channels: int, name: str) -> Image.Image:
    try:
        return to_8_bits(image, channels)
    except UnsupportedImage as error:
        raise ValueError(f"`{name}`: {error}") from error


def _fit_batch(name: str, tensor: torch.Tensor, batch_size: int, num_images_per_prompt: int) -> torch.Tensor:
    if len(tensor) not in (1, batch_size):
        raise ValueError(f"{len(tensor)} images in `{name}` for {batch_size} prompts; pass one, or one for each prompt")
    return tensor.expand(batch_size, *tensor.shape[1:]).repeat_interleave(num_images_per_prompt, dim=0)


def to_pixels(
    image,
    channels: int,
    height: int,
    width: int,
    batch_size: int = 1,
    num_images_per_prompt: int = 1,
    *,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    name: str = "image",
) -> torch.Tensor:
    """`image` as `(B, C, height, width)` in [-1, 1].

    Args:
        image: PIL images of any mode (see `images.to_8_bits`), resized if needed; arrays `(H, W, C)` or tensors `(C, H, W)`,
            uint8, uint16 or float in [0, 1], with or without a batch dimension; or a list of them.
        channels: C; 1 is grey, 3 RGB, 4 RGBA.
        resample: how PIL images are resized.
        name: the argument's name, for error messages.

    Raises:
        TypeError, ValueError: another type or size, values out of range, or neither one image nor one for each prompt.
    """
    parts = image if isinstance(image, list) else [image]
    if all(isinstance(part, Image.Image) for part in parts):
        sized = [_eight_bits(part, channels, name) for part in parts]
        sized = [p if p.size == (width, height) else p.resize((width, height), resample) for p in sized]
        image = [np.asarray(part).reshape(height, width, channels) for part in sized]
    pixels = _stack(name, image, one_has=3)
    if tuple(pixels.shape[1:]) != (channels, height, width):
        raise ValueError(
            f"`{name}` must be {channels} x {height} x {width}, got {tuple(pixels.shape[1:])}; or pass a PIL image"
        )
    if not (torch.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"`{name}` must contain values from 0 to 1 (or be uint8 or uint16)")
    return _fit_batch(name, pixels * 2 - 1, batch_size, num_images_per_prompt)


def to_mask(
    mask, height: int, width: int, batch_size: int = 1, num_images_per_prompt: int = 1, *, channels: int = 1
) -> torch.Tensor:
    """`mask` as `(B, 1, height, width)` in [0, 1]: 1 is redrawn, 0 is kept, values between are blended.

    Args:
        mask: PIL images, which are resized if needed; arrays or tensors `(H, W)` or `(1, H, W)` (arrays `(H, W, 1)`), bool,
            uint8, uint16 or float in [0, 1], with or without a batch dimension; or a list of them.
        channels: those of a model that draws arrays. The mask may have as many, for example to select the frames of a clip
            that are to be drawn; the result then has them too.

    Raises:
        TypeError, ValueError: as for `to_pixels`.
    """
    parts = mask if isinstance(mask, list) else [mask]
    if all(isinstance(part, Image.Image) for part in parts):
        sized = [_eight_bits(part, 1, "mask_image") for part in parts]
        sized = [p if p.size == (width, height) else p.resize((width, height), Image.Resampling.BOX) for p in sized]
        mask = [np.asarray(part)[..., None] for part in sized]
    parts = mask if isinstance(mask, list) else [mask]
    flat = [part[..., None] if isinstance(part, np.ndarray) and part.ndim == 2 else part for part in parts]
    flat = [part[None] if isinstance(part, torch.Tensor) and part.ndim == 2 else part for part in flat]
    values = _stack("mask_image", flat, one_has=3)
    if tuple(values.shape[1:]) not in ((1, height, width), (channels, height, width)):
        raise ValueError(f"`mask_image` must be {height} x {width}, got {tuple(values.shape[1:])}; or pass a PIL image")
    if not (torch.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError("`mask_image` must contain values from 0 (keep) to 1 (redraw)")
    if values.max() == 0:
        logger.warning("`mask_image` is 0 everywhere, so no part of `image` is redrawn. White (1) marks what to redraw.")
    return _fit_batch("mask_image", values, batch_size, num_images_per_prompt)


def pad_for_outpainting(image: Image.Image, left=0, top=0, right=0, bottom=0) -> tuple[Image.Image, Image.Image]:
    """A larger image and its mask, for `pipe(prompt, image=image, mask_image=mask, height=..., width=...)`.

    Args:
        image: the image to continue beyond its edges.
        left, top, right, bottom: pixels to add; they repeat the nearest edge, and the mask marks them to be redrawn.
    """
    if min(left, top, right, bottom) < 0:
        raise ValueError(f"the number of pixels to add must not be negative, got {(left, top, right, bottom)}")
    values = np.asarray(image)
    more = [(top, bottom), (left, right)]
    mask = np.pad(np.zeros(values.shape[:2], np.uint8), more, constant_values=255)
    return Image.fromarray(np.pad(values, more + [(0, 0)] * (values.ndim - 2), mode="edge")), Image.fromarray(mask)
