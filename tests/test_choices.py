"""Samplers, guiders and runtimes by name: each against what it claims to compute."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import RUNTIMES, replace_components, with_guider, with_sampler
from sfumato.pipelines.runtimes import with_runtime
from sfumato.registries import GUIDERS, SAMPLERS

SECOND = {name: guider.second for name, guider in GUIDERS.items() if guider.second}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("weak"), seed=1)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("learned"), scheduler={"variance_type": "learned_range"})


def draw(pipe, prompt="a red circle", **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0), **arguments}
    return pipe(prompt, **arguments).images


def test_the_module_of_names_loads_nothing_heavy():
    code = "import sys; import sfumato.pipelines.choices; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_every_sampler_draws(pipe, learned, name):
    """Also with a model that learned its variance, of which only DDPM knows; and back to DDPM it is known again."""
    for model in (pipe, learned):
        chosen = with_sampler(model, name)
        assert np.isfinite(draw(chosen)).all()
        assert with_sampler(chosen, "ddpm").scheduler.config.variance_type == model.scheduler.config.variance_type


@pytest.mark.parametrize("first", [*SAMPLERS])
def test_no_sampler_leaves_anything_behind(pipe, first, tmp_path):
    """Whatever was chosen before, in memory and through disk, a sampler is the same, and `ddpm` is what was trained."""
    chosen = with_sampler(pipe, first)
    chosen.scheduler.save_pretrained(tmp_path)
    stored = replace_components(pipe, scheduler=type(chosen.scheduler).from_pretrained(tmp_path))
    keys = ("thresholding", "clip_sample", "algorithm_type", "use_exponential_sigmas", "prediction_type", "trained_betas")
    for second in SAMPLERS:
        expected = with_sampler(pipe, second).scheduler.config
        for got in (with_sampler(chosen, second).scheduler.config, with_sampler(stored, second).scheduler.config):
            for key in keys:
                if key in expected:
                    assert got[key] == expected[key], (first, second, key)


def tiny_half(pipe):
    return copy.deepcopy(pipe).to(torch.bfloat16)


def test_a_choice_keeps_precision_and_quiet(tmp_path):
    half = tiny.pipeline(tmp_path).to(torch.bfloat16)
    for chosen in (with_sampler(half, "unipc"), with_guider(half, "apg")):
        assert chosen.unet.dtype == half.unet.dtype == torch.bfloat16
        assert chosen._progress_bar_config == {"disable": True}


@pytest.mark.parametrize("name", [*GUIDERS])
def test_every_guider_draws_and_is_idle_outside_its_interval(pipe, weak, name):
    given = {"weak": weak} if name == "autoguidance" else {f"{SECOND[name]}_scale": 0.0} if name in SECOND else {}
    chosen, passes = with_guider(pipe, name, start=0.25, stop=0.75, **given), []
    hooks = [p.unet.register_forward_pre_hook(lambda m, inputs: passes.append(len(inputs[0]))) for p in (pipe, weak)]
    image = draw(chosen, num_inference_steps=8)
    for hook in hooks:
        hook.remove()
    assert np.isfinite(image).all() and not np.array_equal(image, draw(pipe, guidance_scale=1.0, num_inference_steps=8))
    assert sum(passes) == chosen.num_passes == 12
    if name not in ("autoguidance", *SECOND):
        assert passes == [1, 1, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("name", [*SECOND])
def test_disturbed_attention_is_a_third_pass_that_leaves_the_network_as_it_was(tmp_path, name):
    pipe = tiny.pipeline(tmp_path)
    with torch.no_grad():  # of random weights, attention is nearly the same everywhere, and smoothing it changes nothing
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight *= 50
    before = draw(pipe)
    chosen = with_guider(pipe, name, guidance_scale=3.0, **{f"{SECOND[name]}_scale": 2.0})
    image = draw(chosen, num_inference_steps=4)
    assert 4 * 3 - 1 <= chosen.num_passes <= 4 * 3  # diffusers leaves pag and slg out of the very first step
    assert np.abs(image - draw(pipe, guidance_scale=3.0, num_inference_steps=4)).max() > 1e-4
    np.testing.assert_array_equal(draw(pipe), before)


@pytest.mark.parametrize("name", [*SECOND])
def test_both_guidances_have_one_interval_and_need_a_scale(pipe, name):
    """Where plain guidance is off, diffusers gives the other's pass the empty prompt, undisturbed."""
    chosen, sizes = with_guider(pipe, name, start=0.25, stop=0.75), []
    hook = pipe.unet.register_forward_pre_hook(lambda m, inputs: sizes.append(1))
    draw(chosen, num_inference_steps=8)
    hook.remove()
    assert sum(sizes) == chosen.num_passes == 4 * 1 + 2 + 3 * 3  # diffusers leaves the first step of the interval to one
    with pytest.raises(ValueError, match="works on top of plain guidance"):
        draw(chosen, guidance_scale=1.0)


def test_perturbed_attention_is_the_identity_in_the_middle(pipe):
    """PAG (Ahn et al. 2024): cond + 2 (cond - cond with the values as the self-attention's result), beside plain guidance."""
    x, t = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    cond, uncond = pipe.encode_prompt("a red circle")
    guider = with_guider(pipe, "pag", guidance_scale=3.0, perturbed_guidance_scale=2.0).guider
    guider.set_state(1, 3, t)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with torch.no_grad():
        got = pipe.predict(guider, x, t, cond, uncond)
        plain, none = (pipe.unet(x, t, c).sample for c in (cond, uncond))
        hook = layer.register_forward_hook(lambda m, inputs, output: m.to_out[0](m.to_v(inputs[0])))
        disturbed = pipe.unet(x, t, cond).sample
        hook.remove()
    torch.testing.assert_close(got, none + 3 * (plain - none) + 2 * (plain - disturbed), atol=1e-5, rtol=1e-4)


def test_apg_is_its_formula(pipe):
    """cond + (s - 1) times what of cond - uncond is orthogonal to cond, for each image (Sadat et al. 2024, eta 0)."""
    cond, uncond = 0.3 * torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # too short for its limit
    guider = with_guider(pipe, "apg", guidance_scale=5.0).guider
    guider.set_state(0, 3, torch.tensor(500))
    flat, moved = cond.flatten(1), (cond - uncond).flatten(1)
    orthogonal = moved - (moved * flat).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True) * flat
    expected = cond + 4 * orthogonal.reshape(cond.shape)
    torch.testing.assert_close(guider.forward(pred_cond=cond, pred_uncond=uncond).pred, expected)
    assert guider.guidance_scale == 5.0


def test_magnitude_aware_guidance_is_its_formula(pipe):
    """MAMBO-G: uncond + (1 + (s - 1) exp(-alpha |cond - uncond| / |uncond|)) (cond - uncond), for each image."""
    guider = with_guider(pipe, "magnitude-aware", guidance_scale=5.0, alpha=2.0).guider
    guider.set_state(0, 3, torch.tensor(500))
    cond, uncond = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ratio = (cond - uncond).flatten(1).norm(dim=1) / uncond.flatten(1).norm(dim=1)
    factor = (1 + 4 * torch.exp(-2 * ratio)).reshape(3, 1, 1, 1)
    torch.testing.assert_close(guider.forward(pred_cond=cond, pred_uncond=uncond).pred, uncond + factor * (cond - uncond))


def test_autoguidance_steers_away_from_the_weaker_model(pipe, weak):
    """D_weak + s (D - D_weak), each model reading the same prompt with its own text encoder (Karras et al. 2024)."""
    chosen = with_guider(pipe, "autoguidance", weak, guidance_scale=3.0)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    (cond, _), (theirs, _) = (p.encode_prompt(["a red circle"] * 2) for p in (pipe, weak))
    chosen.guider.set_state(0, 3, t)
    with torch.no_grad():
        got = chosen.predict(chosen.guider, x, t, cond, theirs)
        strong, poor = (p.unet(x, t, c).sample for p, c in ((pipe, cond), (weak, theirs)))
    torch.testing.assert_close(got, poor + 3 * (strong - poor), atol=1e-5, rtol=1e-4)
    # Away from itself is nowhere.
    itself = with_guider(pipe, "autoguidance", pipe, guidance_scale=3.0)
    np.testing.assert_allclose(draw(itself), draw(pipe, guidance_scale=1.0), atol=1e-5)
    with pytest.raises(ValueError, match="not from a negative prompt"):
        draw(chosen, negative_prompt="a blue square")
    half = with_guider(tiny_half(pipe), "autoguidance", copy.deepcopy(weak))
    assert np.isfinite(draw(half)).all()  # the weaker model follows in precision


def test_no_guider_but_autoguidance_takes_a_weak_model(pipe, weak, tmp_path):
    with pytest.raises(ValueError, match="an earlier checkpoint"):
        with_guider(pipe, "autoguidance")
    with pytest.raises(ValueError, match="and no other guider"):
        with_guider(pipe, "cfg", weak)
    other = tiny.pipeline(tmp_path, scheduler={"prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="weaker model has prediction_type epsilon, this one v_prediction"):
        with_guider(pipe, "autoguidance", other)


def test_passes_that_do_not_fit_together_are_done_one_by_one(pipe, caplog):
    """Memory for two images, four wanted: the same image, told once."""
    expected, sizes = draw(pipe, ["a red circle", "a blue square"], guidance_scale=3.0), []

    def limited(module, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("no memory for four")

    hook = pipe.unet.register_forward_pre_hook(limited)
    try:
        got = draw(pipe, ["a red circle", "a blue square"], guidance_scale=3.0)
        assert sizes == [4, 2, 2, 2, 2, 2, 2] and pipe.num_passes == 6
        with pytest.raises(torch.OutOfMemoryError):  # one pass alone does not fit either
            draw(pipe, ["a red circle"] * 3, guidance_scale=1.0)
    finally:
        hook.remove()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def check_runtime(pipe, name, tolerance):
    other = with_runtime(with_sampler(pipe, "euler"), name)  # timesteps that are not whole numbers
    for prompt in ("a red circle", ["a blue square", ""]):
        expected = draw(with_sampler(pipe, "euler"), prompt, guidance_scale=2.0)
        np.testing.assert_allclose(draw(other, prompt, guidance_scale=2.0), expected, atol=tolerance)
    assert "forward" not in vars(pipe.unet)


def test_bfloat16_draws_nearly_the_same_images(pipe):
    check_runtime(pipe, "bf16", 0.05)
    assert with_runtime(pipe, "torch") is pipe


def test_engines_draw_the_same_images(tmp_path):
    """In a process of its own: after OpenVINO 2026.4 has run, Python's memory is at times found corrupted (docs/notebook)."""
    for name in ("onnx", "openvino"):
        pytest.importorskip(RUNTIMES[name])
    code = f"""
import pathlib, test_choices as t
pipe = t.tiny.pipeline(pathlib.Path({str(tmp_path)!r}))
for name in ("onnx", "openvino"):
    t.check_runtime(pipe, name, 1e-4)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_runtimes_refuse_what_they_cannot(pipe):
    with pytest.raises(ValueError, match="unknown runtime 'magic'; choose one of torch, bf16, onnx, openvino"):
        with_runtime(pipe, "magic")
    with pytest.raises(ValueError, match="reaches into the network"):
        with_runtime(with_guider(pipe, "pag"), "bf16")
    with pytest.raises(ValueError, match="reaches into the network"):
        with_guider(with_runtime(pipe, "bf16"), "pag")
    from sfumato.pipelines.explain import explain

    with pytest.raises(ValueError, match="runtime"):
        explain(with_runtime(pipe, "bf16"), "a red circle")


def test_a_sampler_that_cannot_draw_with_the_model_is_told(tmp_path):
    pipe = tiny.pipeline(tmp_path, scheduler={"prediction_type": "sample"})
    with pytest.raises(ValueError, match="use dpm\\+\\+-sde"):
        with_sampler(pipe, "euler-a")


def test_the_same_weights_serve_every_choice(pipe):
    chosen = with_guider(with_sampler(pipe, "unipc"), "apg")
    assert isinstance(chosen, SfumatoPipeline) and chosen.unet is pipe.unet and chosen.text_encoder is pipe.text_encoder
