"""One guided prediction of the network: which passes it takes, how they run and what their inputs are.

Self-contained on purpose (torch and diffusers only): this file travels inside shared model folders.
"""

import functools
import math
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.utils import logging

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class NetworkInputs:
    """What a network reads besides noise, time and text.

    Attributes:
        class_labels: `(B,)`, the noise level of the small image of an upscaling model.
        control: `(B, C, H, W)` in [0, 1], the map that a ControlNet follows.
        control_scale: how strongly it follows the map.
        attention: `cross_attention_kwargs` of the UNet.
        guidance: `(B, D)`, the guidance scale as input of a distilled network; see `guidance_embedding`.
    """

    class_labels: torch.Tensor | None = None
    control: torch.Tensor | None = None
    control_scale: float = 1.0
    attention: dict | None = None
    guidance: torch.Tensor | None = None


@dataclass
class CallState:
    """What a pipeline call counts and finds out along the way.

    Attributes:
        num_passes: network passes so far.
        one_by_one: whether the passes of one step did not fit into memory as one batch.
        num_timesteps: steps of the scheduler.
        guidance_scale: that of the guider; 1 if it has none.
        guided: whether an unconditional prediction is needed.
        guidance_ended: whether a callback has ended guidance.
        cross_attention_kwargs: those of the call.
    """

    num_passes: int = 0
    one_by_one: bool = False
    num_timesteps: int = 0
    guidance_scale: float = 1.0
    guided: bool = False
    guidance_ended: bool = False
    cross_attention_kwargs: dict | None = None


@dataclass(frozen=True, kw_only=True)
class Embeds:
    """Text as the network reads it, each `(B, L, D)`; `negative` is None without guidance."""

    positive: torch.Tensor
    negative: torch.Tensor | None = None


@dataclass
class Turn:
    """Which thread is using a scheduler or a network, since both keep state while drawing."""

    lock: Any = field(default_factory=threading.Lock)
    thread: int | None = None


_TURNS: WeakKeyDictionary = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def one_at_a_time(call: Callable) -> Callable:
    """Make pipeline calls in several threads wait for each other if they share a scheduler or a network.

    Raises (from the call):
        RuntimeError: the same thread is already drawing with one of them, because the call comes from a callback.
    """

    @functools.wraps(call)
    def wait_and_call(pipe, *arguments, **named):
        me = threading.get_ident()
        with _TURNS_LOCK:
            shared = {id(each): _TURNS.setdefault(each, Turn()) for each in (pipe.scheduler, pipe.unet) if each is not None}
        if any(turn.thread == me for turn in shared.values()):
            raise RuntimeError("a callback may not draw with the pipeline that called it; give it one of its own")
        with ExitStack() as stack:
            for _, turn in sorted(shared.items()):
                stack.enter_context(turn.lock)
                turn.thread = me
                stack.callback(setattr, turn, "thread", None)
            return call(pipe, *arguments, **named)

    return wait_and_call


def build_guider(cls: type, **settings) -> BaseGuidance:
    """Build a guider of diffusers without its warning that guiders are experimental: the versions we tested are pinned."""

    def is_other(record) -> bool:
        return "experimental" not in str(record.msg)

    guider_logger = logging.get_logger("diffusers.guiders.guider_utils")
    guider_logger.addFilter(is_other)
    try:
        return cls(**settings)
    finally:
        guider_logger.removeFilter(is_other)


def guidance_width(unet) -> int | None:
    """Width of the embedding of the guidance scale that a distilled network reads; None for any other network."""
    return unet.config.get("time_cond_proj_dim")


def guidance_embedding(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Embed guidance scales `(B,)` for a distilled network, `(B, width)`: sines and cosines of 1000 (scale - 1).

    Like `StableDiffusionPipeline.get_guidance_scale_embedding`, which only works on the CPU.
    """
    frequencies = torch.exp(torch.arange(width // 2, device=scale.device) * (-math.log(10000.0) / (width // 2 - 1)))
    angles = 1000.0 * (scale.float() - 1)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def guided_prediction(
    pipe,
    guider: BaseGuidance,
    latents: torch.Tensor,
    t: torch.Tensor,
    *,
    embeds: Embeds,
    inputs: NetworkInputs,
    state: CallState,
) -> torch.Tensor:
    """The guided prediction, `(B, C, h, w)`: the guider says which passes are needed and combines them.

    The passes run as one batch. They run one after another if the guider changes the network between passes or has a `weak`
    model for the second, or once a batch has not fitted into memory.
    """
    # Before diffusers 0.36 this was called prepare_inputs.
    prepare: Callable = getattr(guider, "prepare_inputs_from_block_state", guider.prepare_inputs)
    pair = SimpleNamespace(cond=embeds.positive, uncond=embeds.negative)
    passes = prepare(pair, {"encoder_hidden_states": ("cond", "uncond")})
    state.num_passes += len(passes)
    weak = getattr(guider, "weak", None)
    batchable = type(guider).prepare_models is BaseGuidance.prepare_models and weak is None
    if batchable and not state.one_by_one:
        context = torch.cat([each.encoder_hidden_states for each in passes])
        try:
            output = run_network(pipe.unet, pipe.controlnet, latents, t, context, inputs)
            for each, part in zip(passes, output.chunk(len(passes))):
                guider.prepare_models(pipe.unet)
                each.noise_pred = part
            return guider(passes)[0]
        except torch.OutOfMemoryError:
            if len(passes) == 1:
                raise
            logger.warning("The guidance passes do not fit into memory as one batch; from here on they run one by one.")
            state.one_by_one = True
    for i, each in enumerate(passes):
        guider.prepare_models(pipe.unet)
        model = weak if weak is not None and i > 0 else pipe
        try:
            each.noise_pred = run_network(model.unet, model.controlnet, latents, t, each.encoder_hidden_states, inputs)
        finally:  # or the network would stay changed for everyone who shares it
            guider.cleanup_models(pipe.unet)
    return guider(passes)[0]


def weak_embeds(pipe, weak, prompt, prompt_embeds, device) -> torch.Tensor:
    """The prompt as a weaker model's text encoder encodes it; the model is moved to this one's device and precision."""
    for part in filter(None, (weak.unet, weak.text_encoder, weak.controlnet)):
        part.to(device, pipe.unet.dtype)
    return weak.encode_prompt(prompt, device, 1, False, prompt_embeds=prompt_embeds)[0]


def run_network(
    unet, controlnet, latents: torch.Tensor, t: torch.Tensor, context: torch.Tensor, inputs: NetworkInputs | None = None
) -> torch.Tensor:
    """The network's prediction for each row of `context`, which has one or more rows for each of `latents`."""
    times = len(context) // len(latents)
    more = {}
    inputs = inputs or NetworkInputs()
    latents = latents.repeat(times, 1, 1, 1)
    if inputs.class_labels is not None:
        more["class_labels"] = inputs.class_labels.repeat(times)
    if inputs.control is not None:
        hint = inputs.control.repeat(times, 1, 1, 1)
        down, mid = controlnet(latents, t, context, hint, inputs.control_scale, return_dict=False)
        more |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    if inputs.attention is not None:
        more["cross_attention_kwargs"] = inputs.attention
    if inputs.guidance is not None:
        more["timestep_cond"] = inputs.guidance.to(latents.dtype).repeat(times, 1)
    return unet(latents, t, context, **more, return_dict=False)[0]
