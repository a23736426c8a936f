"""A UNet that sees a smaller image: trained by the same loop, opened by stock Stable Diffusion upscaling."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionUpscalePipeline
from PIL import Image

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.conditions import low_res_condition
from sfumato.training.models.autoencoder import identity_vae, set_scaling_factor
from sfumato.training.train import main


def draw(pipe, prompt="a red circle", seed=0, **more):
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", **more}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upscaling")
    assert main([str(tiny.config_file(folder, task="upscaling", validation={"every_steps": 3}))]) == 0
    return folder / "run"


SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_stock_upscaling_opens_it_and_draws_the_same(trained):
    stock, ours = (cls.from_pretrained(trained / "pipeline") for cls in (DiffusionPipeline, SfumatoPipeline))
    assert type(stock) is StableDiffusionUpscalePipeline and stock.unet.config.in_channels == 6 and ours.reads == "low_res"
    for level in (0, 20, 350):
        theirs = draw(stock, image=SMALL, noise_level=level)
        np.testing.assert_allclose(draw(ours, image=SMALL, noise_level=level), theirs, atol=1e-5)
    assert np.abs(draw(ours, image=SMALL, noise_level=0) - theirs).max() > 1e-3
    smaller = SMALL.resize((8, 8))
    assert draw(ours, image=smaller).shape == (1, 16, 16, 3)  # ours enlarges any image first
    assert list((trained / "samples").glob("*.png"))


def test_latent_upscaling_reads_the_small_image_as_it_is(tmp_path):
    """With a VAE of factor 2, images of 8 pixels lie beside latents of 8 x 8, as in Stable Diffusion's x4 upscaler."""
    model = {
        "block_out_channels": [8, 16],
        "latent_channels": 4,
        "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    first = {"task": "autoencoder", "autoencoder": {"model": model}, "unet": {}, "text_encoder": {}, "scheduler": {}}
    for name in ("vae", "latent"):
        (tmp_path / name).mkdir()
    assert main([str(tiny.config_file(tmp_path / "vae", **first))]) == 0
    vae = {"pretrained": str(tmp_path / "vae" / "run")}
    assert main([str(tiny.config_file(tmp_path / "latent", task="upscaling", vae=vae))]) == 0
    stock, ours = (cls.from_pretrained(tmp_path / "latent/run/pipeline") for cls in (DiffusionPipeline, SfumatoPipeline))
    assert stock.unet.config.in_channels == 7 and stock.vae.config.scaling_factor == 0.08333
    for size in ((8, 8), (16, 12)):
        drawn = draw(stock, image=SMALL.resize(size))
        assert drawn.shape == (1, 2 * size[1], 2 * size[0], 3)
        np.testing.assert_allclose(draw(ours, image=SMALL.resize(size)), drawn, atol=1e-5)


def test_latents_in_another_scale_are_the_same_images():
    for vae in (identity_vae(8, use_quant_conv=True), tiny.vae()):
        pixels = torch.rand(2, 3, 8, 8) * 2 - 1
        with torch.no_grad():
            before = vae.encode(pixels).latent_dist
            scaled = before.mean * vae.config.scaling_factor
            drawn = vae.decode(before.mean).sample
            set_scaling_factor(vae, 0.08333)
            after = vae.encode(pixels).latent_dist
            torch.testing.assert_close(after.mean * 0.08333, scaled, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(after.std / after.mean, before.std / before.mean, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(vae.decode(after.mean).sample, drawn, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no quant_conv"):
        set_scaling_factor(identity_vae(8), 0.08333)


def test_noise_on_the_small_image_is_that_of_its_level():
    scheduler, pixels = DDPMScheduler(beta_schedule="squaredcos_cap_v2"), torch.zeros(4, 3, 64, 64)
    levels = torch.tensor([0, 20, 350, 999])
    found = low_res_condition(scheduler, pixels, levels, torch.Generator().manual_seed(0)).std((1, 2, 3))
    torch.testing.assert_close(found, (1 - scheduler.alphas_cumprod[levels]).sqrt(), atol=0.02, rtol=0.02)


def test_it_learns_to_read_the_small_image(tmp_path):
    path = str(tiny.config_file(tmp_path, task="upscaling", objective={"weight": "min_snr"}))
    settings = [
        "train.max_steps=160",
        "checkpoint.every_steps=null",
        "optim.lr=5e-3",
        "optim.lr_warmup_steps=10",
        "validation.num_judged=8",
    ]
    settings += ["scheduler.prediction_type=sample", "ema.decay=0.9", "validation.guidance_scale=1", "validation.sampler=ddim"]
    assert main([path, *settings]) == 0
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["PSNR of model"] > 14 and scores["PSNR of bicubic"] > 18
    assert {"FD of model", "LD of model", "SSIM of bicubic"} < set(scores)
    pipe = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    small = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    small[:, :8], small[:, 8:] = small[:, :8] // 2, small[:, 8:] // 2 + 127  # dark on the left
    left, right = np.split(draw(pipe, image=Image.fromarray(small))[0], 2, axis=1)
    assert right.mean() > left.mean() + 0.1  # layout, not only brightness
    white, black = (draw(pipe, image=Image.new("RGB", (16, 16), name)).mean() for name in ("white", "black"))
    assert white > black + 0.2


def test_every_snippet_of_its_card_runs(trained, monkeypatch):
    monkeypatch.chdir(trained)  # the card names no path of this machine
    card = (trained / "pipeline" / "README.md").read_text()
    assert "An upscaling diffusion model, trained from random weights" in card and "image-to-image" in card
    for snippet in re.findall(r"```python\n(.*?)```", card, re.S):
        scope = {}
        exec(snippet.replace("num_inference_steps=12", "num_inference_steps=2"), scope)
        assert scope["image"].size == (16, 16)


def test_it_goes_on_and_resumes_exactly(tmp_path, trained):
    folder = tmp_path / "on"
    folder.mkdir()
    path = tiny.config_file(folder, task="upscaling", init_from=str(trained / "pipeline"))
    config = tiny.yaml.safe_load(open(path))
    config |= {"unet": {}, "scheduler": {}, "text_encoder": {"train": True}, "optim": {"lr_decay": "constant"}}
    open(path, "w").write(tiny.yaml.safe_dump(config))
    assert main([str(path), "train.max_steps=3"]) == 0
    assert main([str(path), "checkpoint.resume=auto"]) == 0
    assert main([str(path), f"output_dir={tmp_path / 'whole'}"]) == 0
    from safetensors.torch import load_file

    a, b = (load_file(f / "checkpoints/step-00000006/state.safetensors") for f in (folder / "run", tmp_path / "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "call, message",
    [
        ({}, "takes `image`, the smaller image"),
        ({"image": SMALL, "strength": 0.5}, "neither `mask_image` nor `strength`"),
        ({"image": SMALL, "noise_level": 351}, "from 0 to 350"),
        ({"image": SMALL, "noise_level": 1.5}, "from 0 to 350"),
        ({"image": SMALL, "noise_level": 0.0}, "from 0 to 350"),
        ({"image": SMALL, "noise_level": False}, "from 0 to 350"),
    ],
)
def test_wrong_calls_are_told(trained, call, message):
    pipe = SfumatoPipeline.from_pretrained(trained / "pipeline")
    with pytest.raises(ValueError, match=message):
        draw(pipe, **call)


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize(
    "change, message",
    [
        ("upscaling.factor=1", "must be at least 2"),
        ("upscaling.factor=3", "must divide data.resolution=16"),
        ("upscaling.max_noise_level=1000", "must be below 1000"),
        ("data.cache_latents=true", "task=upscaling needs the images"),
        ("lora.rank=4", "is for task=text_to_image"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, capsys, change, message):
    assert main([str(tiny.config_file(tmp_path, task="upscaling")), change]) == 2
    assert message in capsys.readouterr().err
