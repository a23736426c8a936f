"""One guided prediction of the network: which passes it takes, how they run, and what they are given.

Self-contained on purpose (torch and diffusers only): this file travels inside shared model folders.
"""

from types import SimpleNamespace

import torch
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.utils import logging

logger = logging.get_logger(__name__)


def guided_prediction(
    pipe,
    guider: BaseGuidance,
    latents: torch.Tensor,
    t: torch.Tensor,
    prompt_embeds,
    negative_prompt_embeds,
    given: dict | None,
) -> torch.Tensor:
    """`(B, C, h, w)`: the guider says which passes are needed and combines them.

    The passes run as one batch; one after another where a guider changes the network between passes or has a `weak` model for
    the second, or once a batch of them has not fitted into memory. `given` is what `run_network` takes.
    """
    # Before diffusers 0.36 this was called prepare_inputs.
    prepare = getattr(guider, "prepare_inputs_from_block_state", guider.prepare_inputs)
    embeds = SimpleNamespace(cond=prompt_embeds, uncond=negative_prompt_embeds)
    states = prepare(embeds, {"encoder_hidden_states": ("cond", "uncond")})
    pipe._num_passes += len(states)
    weak = getattr(guider, "weak", None)
    alike = type(guider).prepare_models is BaseGuidance.prepare_models and weak is None
    if alike and not pipe._one_by_one:
        context = torch.cat([state.encoder_hidden_states for state in states])
        try:
            output = run_network(pipe.unet, pipe.controlnet, latents, t, context, given)
            for state, part in zip(states, output.chunk(len(states))):
                guider.prepare_models(pipe.unet)
                state.noise_pred = part
            return guider(states)[0]
        except torch.OutOfMemoryError:
            if len(states) == 1:
                raise
            logger.warning("The passes of guidance do not fit into memory as one batch: from here on one by one.")
            pipe._one_by_one = True
    for i, state in enumerate(states):
        guider.prepare_models(pipe.unet)
        model = weak if weak is not None and i > 0 else pipe
        try:
            state.noise_pred = run_network(model.unet, model.controlnet, latents, t, state.encoder_hidden_states, given)
        finally:  # or the network would stay changed for all who share it
            guider.cleanup_models(pipe.unet)
    return guider(states)[0]


def weak_embeds(pipe, weak, prompt, prompt_embeds, device) -> torch.Tensor:
    """What a weaker model's text encoder makes of the prompt; the model follows this one in device and precision."""
    for part in filter(None, (weak.unet, weak.text_encoder, weak.controlnet)):
        part.to(device, pipe.unet.dtype)
    return weak.encode_prompt(prompt, device, 1, False, prompt_embeds=prompt_embeds)[0]


def run_network(unet, controlnet, latents: torch.Tensor, t: torch.Tensor, context: torch.Tensor, given: dict | None = None):
    """The network's prediction for each row of `context`, which has one or several for each of `latents`.

    `given`: `class_labels` `(B,)`, the noise level of an upscaling model's picture; `map` `(B, C, H, W)` in [0, 1] and
    `map_scale` for the ControlNet.
    """
    times, more, given = len(context) // len(latents), {}, given or {}
    latents = latents.repeat(times, 1, 1, 1)
    if "class_labels" in given:
        more["class_labels"] = given["class_labels"].repeat(times)
    if "map" in given:
        hint = given["map"].repeat(times, 1, 1, 1)
        down, mid = controlnet(latents, t, context, hint, given.get("map_scale", 1.0), return_dict=False)
        more |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return unet(latents, t, context, **more, return_dict=False)[0]
