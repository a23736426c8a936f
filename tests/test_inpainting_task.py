"""A UNet that sees masks: trained by the same loop, opened by stock Stable Diffusion inpainting."""

import re

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline, UniPCMultistepScheduler
from PIL import Image

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import with_sampler
from sfumato.pipelines.conditions import inpainting_condition
from sfumato.training.models.finetune import widen
from sfumato.training.tasks.inpainting import random_mask
from sfumato.training.train import main


def draw(pipe, prompt="a red circle", seed=0, **more):
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", **more}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images


def test_masks_are_of_every_kind_and_both_sides():
    masks = np.stack([random_mask(np.random.default_rng(i), 24, 32) for i in range(300)])
    assert masks.shape == (300, 24, 32) and set(np.unique(masks)) == {0.0, 1.0}
    share = masks.mean((1, 2))
    assert (share > 0).all() and 0.05 < (share == 1).mean() < 0.2 and 0.3 < share.mean() < 0.6
    assert 0.2 < masks.mean(0).min()  # every place is drawn at times
    np.testing.assert_array_equal(random_mask(np.random.default_rng(7), 24, 32), masks[7])


def test_new_channels_change_nothing_before_training(tmp_path):
    pipe = tiny.pipeline(tmp_path)
    x, t, (text, _) = torch.randn(1, 3, 16, 16), torch.tensor(500), pipe.encode_prompt("a red circle")
    with torch.no_grad():
        before = pipe.unet(x, t, text).sample
        widen(pipe.unet, 9, 4)
        after = pipe.unet(torch.cat([x, torch.randn(1, 6, 16, 16)], 1), t, text).sample
    torch.testing.assert_close(after[:, :3], before)
    assert (after[:, 3] == 0).all() and pipe.unet.config.in_channels == 9


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inpainting")
    assert main([str(tiny.config_file(folder, task="inpainting", validation={"every_steps": 3}))]) == 0
    return folder / "run"


def test_stock_inpainting_opens_it_and_draws_the_same(trained):
    stock, ours = (
        DiffusionPipeline.from_pretrained(trained / "pipeline"),
        SfumatoPipeline.from_pretrained(trained / "pipeline"),
    )
    assert type(stock) is StableDiffusionInpaintPipeline and stock.unet.config.in_channels == 9
    # Stock draws numbers while it encodes the masked image, so a sampler that draws its own would get others.
    stock.scheduler = UniPCMultistepScheduler.from_config(stock.scheduler.config)
    ours = with_sampler(ours, "unipc")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    mask = Image.fromarray(np.uint8(255 * (np.arange(256).reshape(16, 16) % 16 < 9)))
    given = {"image": image, "mask_image": mask}
    theirs = draw(stock, **given, height=16, width=16, strength=1.0)
    inside = np.asarray(mask) > 0
    drawn = draw(ours, **given)
    np.testing.assert_allclose(drawn[0][inside], theirs[0][inside], atol=1e-5)
    assert (np.uint8(np.round(drawn[0] * 255)) == np.asarray(image))[~inside].all()  # ours keeps the rest exactly
    everything = Image.new("L", (16, 16), 255)
    stock_all = draw(stock, image=image, mask_image=everything, height=16, width=16, strength=1.0)
    np.testing.assert_allclose(draw(ours), stock_all, atol=1e-5)  # no mask: all is drawn
    assert list((trained / "samples").glob("*.png"))


def test_every_snippet_of_its_card_runs(trained, monkeypatch):
    monkeypatch.chdir(trained)
    card = (trained / "pipeline" / "README.md").read_text()
    assert "An inpainting diffusion model, trained from random weights" in card and "image-to-image" in card
    snippets = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(snippets) == 4
    for snippet in snippets:
        scope = {}
        exec(snippet.replace("num_inference_steps=12", "num_inference_steps=2"), scope)
        assert scope["image"].size == (16, 16)


def test_the_network_reads_what_is_outside_the_mask_and_not_what_is_inside(trained):
    pipe = SfumatoPipeline.from_pretrained(trained / "pipeline")
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    pixels, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.zeros(1, 4, 16, 16)
    with torch.no_grad():
        seen = inpainting_condition(pipe.vae, pixels, mask, noise)
    torch.testing.assert_close(seen[:, :1], mask)
    torch.testing.assert_close(seen[:, 1:4], pixels * (1 - mask), atol=1e-5, rtol=1e-5)
    assert seen[:, 4].abs().max() < 1e-5  # the channel that pads the image to four


def test_it_grows_from_a_text_to_image_model_and_goes_on(tmp_path, trained):
    base = tmp_path / "base"
    base.mkdir()
    assert main([str(tiny.config_file(base))]) == 0
    for number, source in enumerate((base / "run" / "pipeline", trained / "pipeline")):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = str(tiny.config_file(folder, task="inpainting", init_from=str(source)))
        config = tiny.yaml.safe_load(open(path))
        config["unet"], config["scheduler"], config["text_encoder"] = {}, {}, {"train": True}
        open(path, "w").write(tiny.yaml.safe_dump(config))
        assert main([path]) == 0
        assert type(DiffusionPipeline.from_pretrained(folder / "run" / "pipeline")) is StableDiffusionInpaintPipeline


def test_wrong_models_are_told(tmp_path, trained, capsys):
    config = tiny.yaml.safe_load(open(tiny.config_file(tmp_path)))
    config |= {"unet": {}, "scheduler": {}, "text_encoder": {}, "init_from": str(trained / "pipeline")}
    path = tmp_path / "x.yaml"
    path.write_text(tiny.yaml.safe_dump(config))
    assert main([str(path)]) == 2
    assert "9 channels for 4 latents, not one for text_to_image" in capsys.readouterr().err
    assert main([str(tiny.config_file(tmp_path, task="inpainting", data={"cache_latents": True}))]) == 2
    assert "task=inpainting needs the images" in capsys.readouterr().err
