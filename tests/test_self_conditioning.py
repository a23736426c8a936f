"""Models that read their own last estimate: trained, drawn, and opened by their own class where no stock one knows them."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from stock_process import run_stock

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.conditions import x0_estimator
from sfumato.schedulers import SfumatoDDPMScheduler
from sfumato.training.train import main


def draw(pipe, **more):
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np", **more}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    path = tiny.config_file(
        folder,
        objective={"self_conditioning": True},
        train={"max_steps": 40, "batch_size": 8},
        optim={"lr": 3e-3, "lr_warmup_steps": 0},
        checkpoint={"every_steps": 20},
    )
    assert main([str(path)]) == 0
    return folder / "run" / "pipeline"


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_estimate_is_x_0_of_the_prediction(kind):
    scheduler = SfumatoDDPMScheduler(beta_schedule="cosine", prediction_type=kind, clip_sample=False)
    x_0, noise = torch.randn(2, 3, 3, 4, 4)
    t = torch.tensor([10, 400, 900])
    x_t = scheduler.add_noise(x_0, noise, t)
    target = scheduler.training_target(x_0, noise, t)
    torch.testing.assert_close(x0_estimator(scheduler)(target, x_t, t), x_0, rtol=1e-2, atol=1e-2)


def test_drawing_feeds_each_estimate_into_the_next_step(folder):
    """By hand: zeros first, then x_0 of the step before, clipped to [-1, 1] as the pixels are."""
    pipe, inputs = SfumatoPipeline.from_pretrained(folder), []
    assert pipe.reads == "estimate" and pipe.unet.config.in_channels == 6
    seen = lambda module, args: inputs.append(args[0][:1].clone())  # noqa: E731
    hook = pipe.unet.register_forward_pre_hook(seen)
    outputs = []
    after = pipe.unet.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    draw(pipe, guidance_scale=1.0)
    hook.remove(), after.remove()
    assert inputs[0][:, 3:].abs().max() == 0
    for x, output, t, following in zip(inputs, outputs, pipe.scheduler.timesteps, inputs[1:]):
        expected = pipe.scheduler.denoised(output, x[:, :3], t).clamp(-1, 1)
        torch.testing.assert_close(following[:, 3:], expected, rtol=1e-4, atol=1e-5)


def test_every_sampler_draws_it(folder):
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        pipe = SfumatoPipeline.from_pretrained(folder)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        assert np.isfinite(draw(pipe)).all()
    image = Image.new("RGB", (16, 16), "red")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    kept = draw(SfumatoPipeline.from_pretrained(folder), image=image, mask_image=mask)
    np.testing.assert_allclose(kept[0, :, 8:, 0], 1, atol=1e-6)


def test_it_opens_by_its_own_class_only(folder, tmp_path):
    """With the flag and without sfumato, the same image; without the flag, an error; with sfumato, no code of it runs."""
    code = f"""
import numpy as np, torch
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained({str(folder)!r})
    raise SystemExit("opened without the flag")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
call = dict(num_inference_steps=4, guidance_scale=2.0, output_type="np", generator=torch.Generator().manual_seed(0))
np.save({str(tmp_path / "drawn.npy")!r}, pipe("a red circle", **call).images)
"""
    run_stock(code)
    ours = draw(SfumatoPipeline.from_pretrained(folder))
    np.testing.assert_allclose(np.load(tmp_path / "drawn.npy"), ours, atol=1e-5)
    (folder / "pipeline.py").write_text((folder / "pipeline.py").read_text() + "\nraise SystemExit('ran')\n")
    np.testing.assert_allclose(draw(SfumatoPipeline.from_pretrained(folder)), ours, atol=1e-6)
    with pytest.raises(ValueError, match="self-conditioning"):
        SfumatoPipeline.from_pretrained(folder).to_stock()
    assert "trust_remote_code=True" in (folder / "README.md").read_text()


def test_saved_again_it_is_the_same(folder, tmp_path):
    pipe = SfumatoPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "again")
    np.testing.assert_allclose(draw(SfumatoPipeline.from_pretrained(tmp_path / "again")), draw(pipe), atol=1e-6)
    assert isinstance(pipe, DiffusionPipeline)


def test_it_is_refused_where_it_does_not_go(tmp_path, capsys):
    for sections in ({"task": "inpainting"}, {"objective": {"target": "flow"}, "scheduler": {}}):
        own = {**sections, "objective": {**sections.get("objective", {}), "self_conditioning": True}}
        assert main([str(tiny.config_file(tmp_path, **own))]) == 2
        assert "self_conditioning" in capsys.readouterr().err
