"""The pipeline against stock Stable Diffusion, guidance, prompts, seeds and every refused input."""

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.guiders import ClassifierFreeGuidance, TangentialClassifierFreeGuidance
from PIL import Image

from sfumato.pipelines import SfumatoPipeline
from sfumato.schedulers import SfumatoDDPMScheduler


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("pipe"))


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def draw(pipe, prompt="a red circle", **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0), **arguments}
    return pipe(prompt, **arguments).images


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("prompt", ["a red circle", "", ["a red circle", "披萨 🍕"]])
def test_equals_stock_stable_diffusion(pipe, guidance_scale, prompt):
    stock = pipe.to_stock()
    stock.set_progress_bar_config(disable=True)
    ours, theirs = (draw(p, prompt, guidance_scale=guidance_scale, num_images_per_prompt=2) for p in (pipe, stock))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_default_call_equals_stock_default_call(pipe):
    stock = pipe.to_stock()
    stock.set_progress_bar_config(disable=True)
    images = [p("a red circle", output_type="np", generator=seeds(0)).images for p in (pipe, stock)]
    np.testing.assert_allclose(*images, atol=1e-5)


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "LCM"])
def test_any_scheduler_equals_stock(pipe, name):
    swapped = SfumatoPipeline.from_pipe(
        pipe, scheduler=getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    )
    stock = swapped.to_stock()
    for p in (swapped, stock):
        p.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(swapped, guidance_scale=3.0), draw(stock, guidance_scale=3.0), atol=1e-5)


def test_from_pipe_both_ways(pipe):
    stock = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    back = SfumatoPipeline.from_pipe(stock)
    for p in (stock, back):
        p.set_progress_bar_config(disable=True)
    assert isinstance(back.scheduler, SfumatoDDPMScheduler)
    assert back.vae is pipe.vae
    expected = draw(pipe, guidance_scale=3.0)
    np.testing.assert_allclose(draw(stock, guidance_scale=3.0), expected, atol=1e-5)
    np.testing.assert_allclose(draw(back, guidance_scale=3.0), expected, atol=1e-6)


def test_a_clipping_scheduler_survives_the_stock_form(pipe):
    clipping = SfumatoDDPMScheduler.from_config(pipe.scheduler.config, thresholding=False, clip_sample=True)
    ours = SfumatoPipeline.from_pipe(pipe, scheduler=clipping)
    stock = ours.to_stock()
    for p in (ours, stock):
        p.set_progress_bar_config(disable=True)
    assert ours.scheduler.config.clip_sample  # to_stock left ours alone
    np.testing.assert_allclose(draw(ours, guidance_scale=9.0), draw(stock, guidance_scale=9.0), atol=1e-5)


def test_own_seed_makes_an_image_independent_of_its_neighbours(pipe):
    prompts = ["a red circle", "", "a blue square"]
    together = draw(pipe, prompts, generator=seeds(1, 2, 3))
    for i, prompt in enumerate(prompts):
        np.testing.assert_allclose(draw(pipe, prompt, generator=seeds(i + 1))[0], together[i], atol=1e-5)


def test_num_images_per_prompt_repeats_each_prompt(pipe):
    images = draw(pipe, ["a red circle", "a blue square"], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    again = draw(pipe, ["a red circle"] * 2 + ["a blue square"] * 2, generator=seeds(0, 1, 2, 3))
    np.testing.assert_allclose(images, again, atol=1e-6)


def test_guidance_is_ho_and_salimans(pipe):
    """One prediction: uncond + s (cond - uncond), from single passes of the network."""
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    guider.set_state(0, 3, torch.tensor(999))
    x, t = torch.randn(1, 3, 16, 16), torch.tensor(500)
    cond, uncond = pipe.encode_prompt("a red circle")
    with torch.no_grad():
        got = pipe.predict(guider, x, t, cond, uncond)
        single = [pipe.unet(x, t, context).sample for context in (cond, uncond)]
    torch.testing.assert_close(got, single[1] + 3 * (single[0] - single[1]), atol=1e-5, rtol=1e-4)


def test_call_scale_overrides_the_guider_once(pipe):
    guided = SfumatoPipeline.from_pipe(pipe, guider=ClassifierFreeGuidance(guidance_scale=6.0))
    guided.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(guided), draw(pipe, guidance_scale=6.0))
    draw(guided, guidance_scale=2.0)
    assert guided.guider.guidance_scale == 6.0
    assert not np.array_equal(draw(guided, guidance_scale=2.0), draw(guided))


def test_negative_prompt_steers(pipe):
    plain = draw(pipe, guidance_scale=4.0)
    assert np.abs(plain - draw(pipe, guidance_scale=4.0, negative_prompt="a blue square")).max() > 1e-5
    np.testing.assert_allclose(plain, draw(pipe, guidance_scale=4.0, negative_prompt=""), atol=1e-6)


def test_other_guiders_and_the_guidance_interval(pipe, monkeypatch):
    widths = []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, *a, **k: (widths.append(len(x)), forward(x, *a, **k))[1])
    guided = SfumatoPipeline.from_pipe(pipe, guider=ClassifierFreeGuidance(guidance_scale=3.0, start=0.0, stop=0.5))
    guided.set_progress_bar_config(disable=True)
    draw(guided, num_inference_steps=4)
    assert widths == [2, 2, 1, 1]  # no unconditional pass outside the interval
    tangential = SfumatoPipeline.from_pipe(pipe, guider=TangentialClassifierFreeGuidance(guidance_scale=3.0))
    tangential.set_progress_bar_config(disable=True)
    assert np.isfinite(draw(tangential)).all()
    guided.guider.disable()
    widths.clear()
    draw(guided)
    assert widths == [1, 1, 1]


def test_output_types_and_sizes(pipe):
    assert isinstance(draw(pipe, output_type="pil")[0], Image.Image)
    assert draw(pipe).shape == (1, 16, 16, 3)
    assert draw(pipe, output_type="pt").shape == (1, 3, 16, 16)
    assert draw(pipe, output_type="latent", height=8, width=24).shape == (1, 3, 8, 24)
    assert isinstance(pipe("a red circle", num_inference_steps=1, return_dict=False), tuple)


def test_callbacks_see_and_change_tensors(pipe):
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append((step, int(t), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "prompt_embeds"]
    latents = draw(pipe, output_type="latent", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][2] == names
    assert (latents == 0).all()


def test_embeddings_stand_in_for_prompts(pipe):
    cond, uncond = pipe.encode_prompt("a red circle", negative_prompt="a blue square")
    given = draw(pipe, None, prompt_embeds=cond, negative_prompt_embeds=uncond, guidance_scale=3.0)
    np.testing.assert_allclose(given, draw(pipe, negative_prompt="a blue square", guidance_scale=3.0), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    pipe = tiny.pipeline(tmp_path).to(dtype)
    assert np.isfinite(draw(pipe, guidance_scale=3.0)).all()


def test_what_does_not_fit_is_cut_and_named(pipe, caplog):
    import logging

    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        draw(pipe, "a red circle " * 20)
    assert "cut off" in caplog.text and "red circle" in caplog.text
    assert np.isfinite(draw(pipe, "nul \x00 and " + "x" * 100_000, num_inference_steps=1)).all()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"prompt": 3}, TypeError, "string or a list"),
        ({"prompt": ["a", None]}, TypeError, "list of strings"),
        ({"prompt": []}, ValueError, "empty list"),
        ({"prompt": None}, ValueError, "exactly one"),
        ({"prompt_embeds": torch.zeros(1, 20, 32)}, ValueError, "exactly one"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": 1}, TypeError, "negative_prompt"),
        ({"num_inference_steps": 0}, ValueError, "at least 1"),
        ({"num_inference_steps": 2.5}, ValueError, "whole number"),
        ({"num_inference_steps": 1001}, ValueError, "1000"),
        ({"num_images_per_prompt": 0}, ValueError, "at least 1"),
        ({"height": 0}, ValueError, "height"),
        ({"width": -8}, ValueError, "width"),
        ({"height": 16.0}, ValueError, "height"),
        ({"guidance_scale": "3"}, TypeError, "number"),
        ({"guidance_scale": float("nan")}, ValueError, "finite"),
        ({"guidance_scale": -1}, ValueError, "at least 0"),
        ({"generator": 3}, TypeError, "torch.Generator"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "2 generators for 1 images"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, ValueError, r"\(1, 3, 16, 16\)"),
        ({"output_type": "jpg"}, ValueError, "output_type"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "noise"),
    ],
)
def test_wrong_input_is_refused_before_any_compute(pipe, arguments, error, message, monkeypatch):
    monkeypatch.setattr(pipe.unet, "forward", None)
    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    with pytest.raises(error, match=message):
        pipe(**{"prompt": "a red circle", "num_inference_steps": 2, **arguments})
