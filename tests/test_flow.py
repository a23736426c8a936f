"""Flow matching: its formulas, the equality of its samplers, and a model trained with it, in ours and in stock pipelines."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import with_sampler
from sfumato.pipelines.edit import invert
from sfumato.pipelines.explain import explain
from sfumato.schedulers import SfumatoDDPMScheduler, SfumatoFlowScheduler, training_scheduler
from sfumato.training.objectives import loss_weight
from sfumato.training.train import main

FLOW = {"objective": {"target": "flow"}, "validation": {"sampler": "euler"}}


def config(folder, scheduler=None, **sections):
    path = tiny.config_file(folder, **{**FLOW, "scheduler": None, **sections})
    content = tiny.yaml.safe_load(open(path))
    content["scheduler"] = scheduler or {}
    path.write_text(tiny.yaml.safe_dump(content))
    return str(path)


def draw(pipe, prompt="a red circle", seed=0, **more):
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np", **more}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images


def test_the_path_its_velocity_and_what_a_prediction_means():
    scheduler = SfumatoFlowScheduler()
    x_0, noise = torch.randn(2, 5, 3, 4, 4)
    t = torch.tensor([0, 1, 250, 999, 1000])
    x_t, sigma = scheduler.add_noise(x_0, noise, t), (t / 1000).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, (1 - sigma) * x_0 + sigma * noise)
    torch.testing.assert_close(x_t[0], x_0[0])
    torch.testing.assert_close(x_t[4], noise[4])
    later = scheduler.add_noise(x_0, noise, t + 1)
    velocity = scheduler.training_target(x_0, noise, t)
    torch.testing.assert_close((later - x_t) * 1000, velocity, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(scheduler.denoised(velocity, x_t, t), x_0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scheduler.snr(t)[1:], ((1 - sigma) / sigma).flatten()[1:] ** 2)
    stock = FlowMatchEulerDiscreteScheduler()
    for one in t[1:]:
        theirs = stock.scale_noise(x_0, one.float().reshape(1), noise)
        torch.testing.assert_close(scheduler.add_noise(x_0, noise, one.expand(5)), theirs)


def test_a_weight_on_x_0_is_the_same_in_every_prediction():
    """An error d in the velocity is an error -sigma d in x_0, so weights must follow sigma^2."""
    scheduler = SfumatoFlowScheduler()
    t = torch.tensor([100, 500, 900])
    on_x_0 = loss_weight(scheduler.snr(t), "sample", "min_snr", gamma=5.0, floor=0.1)
    torch.testing.assert_close(
        loss_weight(scheduler.snr(t), "flow_prediction", "min_snr", gamma=5.0, floor=0.1), on_x_0 * (t / 1000) ** 2
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_solver_of_order_one_takes_eulers_steps(shift):
    """And Euler's steps reach the image in one step where the velocity is constant."""
    ours = SfumatoFlowScheduler(shift=shift)
    stock, field = ours.to_stock(), torch.nn.Conv2d(3, 3, 3, padding=1)
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(7)
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(field(x), t, x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    x_0, noise = torch.randn(2, 1, 3, 8, 8)
    ours.set_timesteps(1)
    x = ours.add_noise(x_0, noise, ours.timesteps)
    torch.testing.assert_close(ours.step(noise - x_0, ours.timesteps[0], x, return_dict=False)[0], x_0, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("flow")
    assert main([config(root, scheduler={"shift": 2.0})]) == 0
    return root / "run" / "pipeline"


def test_stock_stable_diffusion_opens_it_and_draws_the_same(folder):
    stock, ours = (cls.from_pretrained(folder) for cls in (DiffusionPipeline, SfumatoPipeline))
    assert type(stock) is StableDiffusionPipeline and type(stock.scheduler) is DPMSolverMultistepScheduler
    drawn = draw(stock)
    np.testing.assert_allclose(draw(ours), drawn, atol=1e-5)
    euler = with_sampler(ours, "euler")
    assert isinstance(euler.scheduler, FlowMatchEulerDiscreteScheduler) and euler.scheduler.config.shift == 2.0
    assert np.abs(draw(euler) - drawn).mean() < 0.01  # diffusers' solver tells the network whole timesteps
    theirs = SfumatoPipeline(**{**ours.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0)})
    np.testing.assert_allclose(draw(theirs), draw(euler), atol=1e-6)
    for name in ("unipc", "dpm++"):
        assert np.isfinite(draw(with_sampler(ours, name))).all()
    stock.scheduler = UniPCMultistepScheduler.from_config(stock.scheduler.config, solver_order=2)
    np.testing.assert_allclose(draw(stock), draw(with_sampler(ours, "unipc")), atol=1e-5)


def test_image_to_image_inpainting_and_explanation(folder):
    pipe = with_sampler(SfumatoPipeline.from_pretrained(folder), "euler")
    image, mask = np.full((16, 16, 3), 128, np.uint8), np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    near, far = (draw(pipe, image=image, strength=s, num_inference_steps=10) for s in (0.1, 1.0))
    assert np.abs(near - 128 / 255).mean() < np.abs(far - 128 / 255).mean()
    kept = draw(pipe, image=image, mask_image=mask)[0][~mask]
    np.testing.assert_allclose(kept, 128 / 255, atol=1e-6)
    stock = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    assert np.isfinite(draw(stock, image=image[None] / 255.0, strength=0.5)).all()
    found = explain(pipe, "a red circle", num_inference_steps=4)
    last = np.asarray(found.image) / 255
    np.testing.assert_allclose(found.expected[-1], last, atol=0.02)  # the last step goes all the way to x_0
    with pytest.raises(ValueError, match="not for flow matching"):
        invert(pipe, image, "a red circle")


def test_it_goes_on(tmp_path, folder):
    path = config(tmp_path, init_from=str(folder), objective={})
    content = tiny.yaml.safe_load(open(path)) | {"unet": {}, "text_encoder": {"train": True}}
    open(path, "w").write(tiny.yaml.safe_dump(content))
    assert main([path]) == 0
    assert DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").scheduler.config.flow_shift == 2.0


def test_every_scheduler_knows_what_its_model_was_trained_with(folder, tmp_path):
    stock = DiffusionPipeline.from_pretrained(folder)
    for scheduler in (stock.scheduler, UniPCMultistepScheduler.from_config(stock.scheduler.config)):
        known = training_scheduler(scheduler)
        assert type(known) is SfumatoFlowScheduler and known.config.shift == 2.0
    assert training_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)).config.shift == 3.0
    assert type(training_scheduler(tiny.pipeline(tmp_path).scheduler)) is SfumatoDDPMScheduler


@pytest.mark.parametrize(
    "change, message",
    [
        ("validation.sampler=ddpm", "choose one of dpm++, unipc, euler"),
        ("scheduler.beta_schedule=cosine", "takes num_train_timesteps and shift, not beta_schedule"),
        ("scheduler.use_karras_sigmas=true", "takes num_train_timesteps and shift, not use_karras_sigmas"),
        ("objective.target=floww", "objective.target"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, capsys, folder, change, message):
    assert main([config(tmp_path), change]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot draw with a model of flow matching"):
        with_sampler(SfumatoPipeline.from_pretrained(folder), "ddim")
