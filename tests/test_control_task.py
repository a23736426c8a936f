"""A ControlNet beside a trained model: trained by the same loop, opened by stock Stable Diffusion with ControlNet."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL import Image
from safetensors.torch import load_file

from sfumato.pipelines import SfumatoPipeline
from sfumato.training.models.controlnet import build_controlnet
from sfumato.training.tasks.control import edge_f1, find_edges
from sfumato.training.train import main


def draw(pipe, prompt="a red circle", seed=0, **more):
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", **more}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images


def config(folder, base, **sections):
    """The tiny config, for control of `base`."""
    folder.mkdir(exist_ok=True)
    path = tiny.config_file(folder, init_from=str(base), **{"task": "control", **sections})
    content = {k: v for k, v in tiny.yaml.safe_load(open(path)).items() if k not in ("unet", "scheduler", "text_encoder")}
    path.write_text(tiny.yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    # A time embedding of its own width, which diffusers' ControlNet cannot have.
    assert main([str(tiny.config_file(folder, unet={"time_embedding_dim": 48}))]) == 0
    return folder / "run" / "pipeline"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("control")
    assert main([config(folder, base, train={"max_steps": 12}, optim={"lr": 1e-2}, validation={"every_steps": 3})]) == 0
    return folder / "run"


MAP = Image.fromarray(np.uint8(255 * (np.arange(256).reshape(16, 16) % 5 == 0))).convert("RGB")


def test_stock_controlnet_opens_it_and_draws_the_same(trained):
    stock, ours = (cls.from_pretrained(trained / "pipeline") for cls in (DiffusionPipeline, SfumatoPipeline))
    assert type(stock) is StableDiffusionControlNetPipeline and ours.controlnet is not None
    for scale in (1.0, 0.3):
        theirs = draw(stock, image=MAP, controlnet_conditioning_scale=scale)
        mine = draw(ours, control_image=MAP, controlnet_conditioning_scale=scale)
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert np.abs(mine - draw(ours, control_image=Image.new("RGB", (16, 16)))).max() > 1e-4  # the map is read
    assert type(ControlNetModel.from_pretrained(trained / "pipeline", subfolder="controlnet")) is ControlNetModel


def test_the_model_beside_stays_as_it_was(trained, base):
    for part in ("unet", "text_encoder", "vae"):
        a, b = (load_file(next((f / part).glob("*.safetensors"))) for f in (base, trained / "pipeline"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    alone = SfumatoPipeline.from_pretrained(trained / "pipeline", controlnet=None)
    np.testing.assert_allclose(draw(alone), draw(SfumatoPipeline.from_pretrained(base)), atol=1e-6)


def test_a_new_controlnet_changes_nothing_and_begins_with_what_fits(base):
    pipe = SfumatoPipeline.from_pretrained(base)
    new = build_controlnet(pipe.unet, pipe.vae_scale_factor)
    x, t, (text, _) = torch.randn(1, 3, 16, 16), torch.tensor(500), pipe.encode_prompt("a red circle")
    with torch.no_grad():
        down, mid = new(x, t, text, torch.rand(1, 3, 16, 16), return_dict=False)
    assert all((part == 0).all() for part in (*down, mid))
    assert torch.equal(new.conv_in.weight, pipe.unet.conv_in.weight)
    with torch.no_grad():
        for_latents, _ = build_controlnet(pipe.unet, 4)(x, t, text, torch.rand(1, 3, 64, 64), return_dict=False)
    assert [part.shape for part in for_latents] == [part.shape for part in down]


@pytest.mark.parametrize("width, heads", [(96, 4), (128, 4)])
def test_a_controlnet_reads_pooled_text_as_its_unet_does(width, heads):
    unet = tiny.unet(cross_attention_dim=width, addition_embed_type="text", addition_embed_type_num_heads=heads)
    new, text = build_controlnet(unet, 1), torch.randn(2, 5, width)
    with torch.no_grad():
        torch.testing.assert_close(new.add_embedding(text), unet.add_embedding(text))


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_images(tmp_path, channels):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("noise")
    data = {"name": str(images), "channels": channels}
    for name in ("base", "control", "upscaling"):
        (tmp_path / name).mkdir()
    assert main([str(tiny.config_file(tmp_path / "base", data=data))]) == 0
    assert main([config(tmp_path / "control", tmp_path / "base/run/pipeline", data=data), "validation.num_judged=1"]) == 0
    path = str(tiny.config_file(tmp_path / "upscaling", task="upscaling", data=data))
    assert main([path, "validation.num_judged=1", "upscaling.max_noise_level=10"]) == 0
    told = (tmp_path / "control/run/pipeline/README.md").read_text()
    assert "dges of 1 training images followed" in told  # of so few, none is held out


def test_resume_is_exact(tmp_path, base):
    whole, parts = (config(tmp_path / name, base, optim={"lr_decay": "constant"}) for name in ("whole", "parts"))
    assert main([whole]) == 0
    assert main([parts, "train.max_steps=3"]) == 0
    assert main([parts, "checkpoint.resume=auto"]) == 0
    a, b = (load_file(tmp_path / f / "run/checkpoints/step-00000006/state.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a) and all("controlnet" in name for name in a)


def test_its_scores_grid_and_card(trained, monkeypatch):
    monkeypatch.chdir(trained)  # the card names no path of this machine
    scores = json.loads((trained / "evaluation.json").read_text())
    assert set(scores) == {"F1", "F1 without control"} and list((trained / "samples").glob("*.png"))
    card = (trained / "pipeline" / "README.md").read_text()
    assert "A controlled text-to-image diffusion model" in card
    for snippet in re.findall(r"```python\n(.*?)```", card, re.S):
        scope = {}
        exec(snippet.replace("num_inference_steps=12", "num_inference_steps=2"), scope)
        assert scope["image"].size == (16, 16)


def test_edges_are_where_colours_change():
    image = np.full((8, 8, 3), 200, np.uint8)
    assert not find_edges(image).any()
    image[2:5, 3:6] = (200, 0, 200)
    found = find_edges(image)
    assert found[2:5, 2].all() and found[2:5, 5].all() and found[1, 3:6].all() and found[4, 3:6].all()
    assert found.sum() == 3 + 3 + 3 + 2  # the lower right corner belongs to two sides
    np.testing.assert_array_equal(find_edges(image[..., 1:2]), found)  # the channel that differs decides


def test_agreement_of_edges():
    line, none = np.zeros((16, 16), bool), np.zeros((16, 16), bool)
    line[:, 5] = True
    assert edge_f1(line, line) == 1 and edge_f1(np.roll(line, 1, 1), line) == 1 and edge_f1(np.roll(line, 3, 1), line) == 0
    assert edge_f1(none, none) == 1 and edge_f1(none, line) == 0
    half = line.copy()
    half[8:] = False
    assert edge_f1(half, line) == pytest.approx(2 * 9 / 16 / (1 + 9 / 16))  # precision 1; 8 of 16 found and one beside


def test_what_cannot_be_is_told(tmp_path, capsys, trained, base):
    pipe = SfumatoPipeline.from_pretrained(trained / "pipeline")
    with pytest.raises(ValueError, match="needs `control_image`"):
        draw(pipe)
    with pytest.raises(ValueError, match="has no ControlNet"):
        draw(SfumatoPipeline.from_pretrained(base), control_image=MAP)
    assert main([str(tiny.config_file(tmp_path, task="control"))]) == 2
    assert "task=control needs a trained model" in capsys.readouterr().err
    assert main([config(tmp_path / "x", trained / "pipeline", task="text_to_image")]) == 2
    assert "has a ControlNet, which only task=control trains" in capsys.readouterr().err
