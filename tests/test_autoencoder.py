"""A VAE trained by the same loop, and a latent model on it."""

import json

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file

from sfumato.cli import main as cli
from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.models.autoencoder import VariationalAutoencoder, normalise_channels
from sfumato.training.objectives import autoencoder_loss
from sfumato.training.quality.fidelity import image_quality
from sfumato.training.train import main

MODEL = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def vae_config(folder, **sections):
    folder.mkdir(exist_ok=True)
    sections = {
        "task": "autoencoder",
        "autoencoder": {"model": MODEL},
        "unet": {},
        "text_encoder": {},
        "scheduler": {},
        **sections,
    }
    return str(tiny.config_file(folder, **sections))


def test_the_loss_is_its_formula():
    """MSE + w KL(N(m, s^2) || N(0, 1)) + sharpness x error of neighbours' differences."""
    rng = torch.Generator().manual_seed(0)
    rebuilt, pixels = torch.randn(2, 2, 3, 8, 8, generator=rng)
    mean, logvar = torch.randn(2, 2, 4, 4, 4, generator=rng)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).mean()
    plain = (rebuilt - pixels).square().mean()
    torch.testing.assert_close(autoencoder_loss(rebuilt, mean, logvar, pixels, 0.3, 0.0), plain + 0.3 * kl)
    # A constant shift blurs nothing; a moved edge does.
    shifted = autoencoder_loss(pixels + 1, mean * 0, logvar * 0, pixels, 0.0, 5.0)
    torch.testing.assert_close(shifted, torch.tensor(1.0))
    assert autoencoder_loss(rebuilt, mean, logvar, pixels, 0.0, 1.0) > plain
    # The latents' first channels are to be the image made smaller; what the others are does not matter.
    small = torch.nn.functional.avg_pool2d(pixels, 2)
    latents = torch.cat([small + 0.5, mean[:, 3:]], 1)
    loss = autoencoder_loss(rebuilt, latents, logvar, pixels, 0.0, 0.0, thumbnail=2.0)
    torch.testing.assert_close(loss, plain + 2 * torch.tensor(0.25))


def test_image_quality_is_psnr_and_ssim():
    true = np.random.default_rng(0).integers(0, 236, (3, 16, 16, 3), dtype=np.uint8)
    assert image_quality(true, true)["PSNR"] == pytest.approx(100)
    found = image_quality(true, true + 20)
    assert found["PSNR"] == pytest.approx(20 * np.log10(255 / 20))
    assert image_quality(true, true)["SSIM"] == pytest.approx(1) and 0.5 < found["SSIM"] < 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    assert main([vae_config(folder), "train.max_steps=60", "optim.lr=3e-3", "checkpoint.every_steps=30"]) == 0
    return folder / "run"


def test_it_learns_and_hands_over_a_stock_folder(trained):
    vae = AutoencoderKL.from_pretrained(trained / "vae")
    scores = json.loads((trained / "evaluation.json").read_text())
    assert scores["scaling factor"] == vae.config.scaling_factor
    assert scores["PSNR"] > 12 and len(scores["latent mean"]) == 4
    losses = [json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert (trained / "samples" / "step-00000060.png").is_file()
    early = AutoencoderKL.from_pretrained(trained / "checkpoints" / "step-00000060" / "vae")
    assert early.config.scaling_factor == pytest.approx(vae.config.scaling_factor, rel=0.05)  # from fewer images
    assert (trained / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mode & 0o044  # others may read it
    assert not list(trained.glob(".vae*"))


def test_channels_are_normalised_and_images_stay_as_they_are():
    torch.manual_seed(0)
    vae, images = tiny.vae().eval(), torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        drawn = vae.decode(before.mean).sample
        details = before.mean[:, 3:]
        normalise_channels(vae, 3, details.mean((0, 2, 3)), details.std((0, 2, 3)), target=0.5)
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, drawn, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.mean[:, :3], before.mean[:, :3])
    torch.testing.assert_close(after.mean[:, 3:].std(), torch.tensor(0.5))
    torch.testing.assert_close(after.mean[:, 3:].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close((after.std / before.std)[:, 3:], (0.5 / details.std()).expand(8, 1, 8, 8))


def test_a_decoder_is_trained_alone_and_latents_stay(trained, tmp_path, capsys):
    own = {"model": {}, "train_encoder": False, "latent_noise": 0.05}
    empty = ["unet={}", "scheduler={}", "text_encoder={}"]
    assert main([vae_config(tmp_path / "x", autoencoder=own, init_from=str(trained), train={"max_steps": 3}), *empty]) == 0
    before, after = (load_file(run / "vae" / "diffusion_pytorch_model.safetensors") for run in (trained, tmp_path / "x/run"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    configs = [AutoencoderKL.load_config(run / "vae") for run in (trained, tmp_path / "x/run")]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"]
    assert main([vae_config(tmp_path / "y", autoencoder=own, init_from=str(tmp_path / "nothing")), *empty]) == 2
    assert "init_from=" in capsys.readouterr().err
    (tmp_path / "greys" / "one").mkdir(parents=True)
    Image.new("L", (16, 16)).save(tmp_path / "greys" / "one" / "grey.png")
    grey = vae_config(
        tmp_path / "y", autoencoder=own, init_from=str(trained), data={"name": str(tmp_path / "greys"), "channels": 1}
    )
    assert main([grey, *empty]) == 2
    assert "init_from takes 3" in capsys.readouterr().err


def test_noise_on_latents_is_as_large_as_said():
    torch.manual_seed(0)
    vae = tiny.vae()
    images = torch.rand(2, 3, 16, 16)
    noise = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        drawn, mean, logvar = VariationalAutoencoder(vae, latent_noise=0.5)(images, noise)
        torch.testing.assert_close(drawn, vae.decode(mean + 0.5 * noise).sample)
        drawn = VariationalAutoencoder(vae)(images, noise)[0]
        torch.testing.assert_close(drawn, vae.decode(mean + (logvar / 2).exp() * noise).sample)


def test_latents_can_be_a_small_image_and_details(tmp_path):
    config = vae_config(tmp_path / "x", autoencoder={"model": MODEL, "thumbnail_weight": 10.0})
    assert main([config, "train.max_steps=100", "optim.name=muon", "optim.lr=1e-2"]) == 0
    run = tmp_path / "x" / "run"
    vae, scores = AutoencoderKL.from_pretrained(run / "vae"), json.loads((run / "evaluation.json").read_text())
    assert vae.config.scaling_factor == 1.0
    assert scores["latent mean"][3] == pytest.approx(0, abs=1e-4)
    images = torch.stack([torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1) for image in shapes_of(tmp_path)]).float()
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
    small = torch.nn.functional.avg_pool2d(images, 2)
    assert (latents[:, :3] - small).square().mean() < 0.3 * small.var()


def shapes_of(folder):
    images = prepare(load_config(tiny.config_file(folder)).data)
    return [images.image(i) for i in range(16)]


def test_resume_is_exact(tmp_path):
    whole, parts = (vae_config(tmp_path / name, optim={"lr_decay": "constant"}) for name in ("whole", "parts"))
    assert main([whole]) == 0
    assert main([parts, "train.max_steps=3"]) == 0
    assert main([parts, "checkpoint.resume=auto"]) == 0
    a, b = (load_file(tmp_path / f / "run/checkpoints/step-00000006/state.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cached", [False, True])
def test_a_latent_model_on_it_is_a_plain_stable_diffusion_folder(trained, tmp_path, cached):
    path = str(tiny.config_file(tmp_path, vae={"pretrained": str(trained)}, data={"cache_latents": cached}))
    assert main([path]) == 0
    folder = tmp_path / "run" / "pipeline"
    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock) is StableDiffusionPipeline and stock.unet.config.sample_size == 8
    assert stock.vae.config.scaling_factor == AutoencoderKL.from_pretrained(trained / "vae").config.scaling_factor
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    images = []
    for pipe in (stock, SfumatoPipeline.from_pretrained(folder)):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images)
    assert images[0].shape == (1, 16, 16, 3)
    np.testing.assert_allclose(*images, atol=1e-5)
    mask = np.ones((1, 16, 16, 1), np.float32)
    for cls, more in ((StableDiffusionImg2ImgPipeline, {}), (StableDiffusionInpaintPipeline, {"mask_image": mask})):
        other = cls.from_pipe(stock)
        other.set_progress_bar_config(disable=True)
        size = {"height": 16, "width": 16} if more else {}
        drawn = other("a red circle", image=images[0], strength=0.7, **more, **size, **call).images
        assert drawn.shape == (1, 16, 16, 3) and np.isfinite(drawn).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ("autoencoder.model.latent_chanels=4", "has no argument latent_chanels"),
        ("autoencoder.model.in_channels=4", "contradicts what data says"),
        ("data.resolution=17", "must be a multiple of 8"),
        ("autoencoder.kl_weight=-1", "must not be negative"),
        ("hub.push=true", "which task=autoencoder does not make"),
        ("init_from=somewhere", "comes from init_from; leave it out"),
        ("autoencoder.train_encoder=false", "set init_from"),
        ("autoencoder.latent_noise=-1", "must not be negative"),
        ("autoencoder={thumbnail_weight: 1.0, model: {latent_channels: 2}}", "at least 3 latent channels"),
        ("autoencoder={thumbnail_weight: 1.0, model: {use_quant_conv: false}}", "no quant_conv"),
        ("task=magic", "choose one of text_to_image, inpainting, upscaling, control, motion, distillation, autoencoder"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, capsys, change, message):
    more = ["hub.repo_id=x"] if "hub" in change else []
    assert main([vae_config(tmp_path / "x"), change, *more]) == 2
    assert message in capsys.readouterr().err


def test_the_doctor_looks_at_its_data(tmp_path, capsys):
    path = vae_config(tmp_path / "x")
    assert cli(["doctor", path]) == 0
    assert "images" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_another_task_cannot_go_on_from_it(tmp_path, capsys):
    path = vae_config(tmp_path / "x")
    assert main([path]) == 0
    assert main([path, "task=text_to_image", "checkpoint.resume=auto", "train.max_steps=9"]) == 2
    assert "belongs to a task other than text_to_image" in capsys.readouterr().err
