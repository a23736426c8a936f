"""Change an image by changing its caption: DDIM inversion, on any model.

SDEdit (Meng et al. 2022), which starts from fresh noise, is `pipe(prompt, image=..., strength=...)`.
"""

import torch

from sfumato.pipelines.choices import with_sampler
from sfumato.pipelines.guided import guidance_width
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.schedulers import SfumatoFlowScheduler, training_scheduler


@torch.no_grad()
def invert(
    pipe: SfumatoPipeline, image, prompt: str, strength: float = 0.8, num_inference_steps: int = 50, iterations: int = 3
) -> torch.Tensor:
    """The noise from which DDIM draws `image` for `prompt` without guidance (Song et al. 2021, arXiv 2010.02502, section 4.3).

    Each DDIM step x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps is inverted by fixed-point iteration: x_t is the point from
    which the step leads back to x_s (Pan et al. 2023, arXiv 2309.04907).

    Args:
        image, prompt: one image as `inputs.to_pixels` takes it, and what it shows.
        strength, num_inference_steps: those of the call that will follow.
        iterations: network evaluations per step.

    Returns:
        `(1, C, h, w)` for `edit`'s call: `pipe(other_prompt, image=image, strength=strength, latents=noise)` with DDIM.
    """
    if pipe.reads or pipe.controlnet is not None:
        raise ValueError("inversion is for models that read only noise and text")
    if guidance_width(pipe.unet) is not None:
        raise ValueError("a distilled model predicts the end of a path, not its direction; invert with its teacher")
    if isinstance(training_scheduler(pipe.scheduler), SfumatoFlowScheduler):
        raise ValueError("DDIM inversion is for diffusion, not for flow matching; use `image` and `strength`")
    pipe = with_sampler(pipe, "ddim")
    scheduler, device = training_scheduler(pipe.scheduler), pipe._execution_device
    pipe.scheduler.set_timesteps(num_inference_steps, device=device)
    num_taken = max(1, round(strength * num_inference_steps))
    text, _ = pipe.encode_prompt(prompt, device, do_classifier_free_guidance=False)
    x_0 = pipe.prepare_image(image, None, pipe.trained_size, (1, 1), text.dtype).x_0
    prediction, abar = scheduler.config["prediction_type"], scheduler.alphas_cumprod.to(device, torch.float32)
    stride, x_s = scheduler.config["num_train_timesteps"] // num_inference_steps, x_0
    for t in reversed(pipe.scheduler.timesteps[-num_taken:]):
        # The step that diffusers' DDIM takes, which is not always the next one in its list.
        abar_s = abar[t - stride] if t >= stride else pipe.scheduler.final_alpha_cumprod.to(abar)
        x_t = x_s
        for _ in range(iterations):
            eps = scheduler.convert(pipe.unet(x_t, t, text, return_dict=False)[0], x_t, t, prediction, "epsilon")
            x_t = (abar[t] / abar_s).sqrt() * (x_s - (1 - abar_s).sqrt() * eps) + (1 - abar[t]).sqrt() * eps
        x_s = x_t
    if num_taken == num_inference_steps:  # the call starts from the noise as it is
        return x_s
    return (x_s - abar[t].sqrt() * x_0) / (1 - abar[t]).sqrt()


def edit(pipe: SfumatoPipeline, image, source: str, prompt: str, strength: float = 0.8, num_inference_steps: int = 50, **call):
    """Redraw `image`, which shows `source`, as `prompt`: what the two have in common stays where it is.

    Args:
        call: further arguments of the pipeline's call, such as `guidance_scale`.

    Returns:
        The result of the pipeline's call.
    """
    noise = invert(pipe, image, source, strength, num_inference_steps)
    arguments = {"image": image, "strength": strength, "latents": noise, "num_inference_steps": num_inference_steps}
    return with_sampler(pipe, "ddim")(prompt, **arguments, **call)
