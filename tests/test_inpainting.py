"""From an image, and redrawing part of one, with any model and scheduler."""

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.conditions import renoise
from sfumato.pipelines.inputs import pad_for_outpainting, to_pixels
from sfumato.training.data.images import read_image

SAMPLERS = ["DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "HeunDiscrete", "DEISMultistep", "LCM"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(scope="module")
def base_image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def mask():
    values = np.zeros((16, 16), bool)
    values[4:12, 4:10] = True
    return values


def with_sampler(pipe, name):
    cls = getattr(diffusers, f"{name}Scheduler")
    changed = SfumatoPipeline.from_pipe(pipe, scheduler=cls.from_config(pipe.scheduler.config))
    changed.set_progress_bar_config(disable=True)
    return changed


def draw(pipe, **more):
    arguments = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0), "output_type": "np", **more}
    return pipe("a red circle", guidance_scale=2.0, **arguments).images


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_kept_is_kept_to_the_last_bit_with_every_sampler(pipe, base_image, mask, name):
    image = draw(with_sampler(pipe, name), image=base_image, mask_image=mask, output_type="pil")[0]
    same = (np.asarray(image) == np.asarray(base_image)).all(-1)
    assert same[~mask].all() and not same[mask].all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_strength_goes_from_the_image_to_a_new_one(pipe, base_image, name):
    changed = with_sampler(pipe, name)
    source = np.asarray(base_image) / 255
    far = [
        np.abs(draw(changed, image=base_image, strength=s, num_inference_steps=20) - source).mean() for s in (0.05, 0.5, 1.0)
    ]
    assert far[0] < far[1] and far[0] < 0.1
    # At full strength the image has no say.
    np.testing.assert_allclose(draw(changed, image=base_image, strength=1.0), draw(changed), atol=1e-6)


def test_image_to_image_equals_stock(pipe, base_image):
    """At guidance 2; diffusers' own pipeline first draws noise for the VAE, which has no use for it."""
    ddim = with_sampler(pipe, "DDIM")
    stock = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(ddim.to_stock(), requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 10, "strength": 0.5}
    expected = draw(stock, image=base_image, **steps)
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 3, 16, 16, generator=generator)
    np.testing.assert_allclose(draw(ddim, image=base_image, generator=generator, **steps), expected, atol=1e-5)


def test_a_mask_of_nothing_gives_the_image_and_of_everything_a_new_one(pipe, base_image):
    nothing, everything = np.zeros((16, 16)), np.ones((16, 16))
    assert draw(pipe, image=base_image, mask_image=nothing, output_type="pil")[0].tobytes() == base_image.tobytes()
    np.testing.assert_allclose(draw(pipe, image=base_image, mask_image=everything), draw(pipe), atol=1e-6)


def test_all_kinds_of_images_and_masks_mean_the_same(pipe, base_image, mask):
    array = np.asarray(base_image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = draw(pipe, image=base_image, mask_image=mask)
    images = [[base_image], array, array[None], array / 255, tensor, tensor[None], [tensor.float() / 255]]
    masks = [Image.fromarray(mask), mask.astype(np.uint8) * 255, mask.astype(float)[None, ..., None], torch.from_numpy(mask)]
    for given in images:
        np.testing.assert_allclose(draw(pipe, image=given, mask_image=mask), expected, atol=1e-6)
    for given in masks:
        np.testing.assert_allclose(draw(pipe, image=base_image, mask_image=given), expected, atol=1e-6)


def test_transparent_parts_of_an_image_lie_on_white_as_in_training(pipe, tmp_path):
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (4, 4, 12, 12))
    clear.save(tmp_path / "clear.png")
    read = read_image(tmp_path / "clear.png", (16, 16))
    assert tuple(read[0, 0]) == (255, 255, 255) and tuple(read[8, 8]) == (255, 0, 0)
    given = (to_pixels(clear, 3, 16, 16, 1, 1)[0] + 1) * 127.5
    np.testing.assert_allclose(given.permute(1, 2, 0), read, atol=1e-4)


def test_outpainting_keeps_the_image_within_the_larger_one(pipe, base_image):
    large, mask = pad_for_outpainting(base_image, left=4, right=12, bottom=8)
    image = draw(pipe, image=large, mask_image=mask, width=32, height=24, output_type="pil")[0]
    assert image.size == (32, 24) and image.crop((4, 0, 20, 16)).tobytes() == base_image.tobytes()
    assert image.tobytes() != large.tobytes()
    with pytest.raises(ValueError, match="must not be negative"):
        pad_for_outpainting(base_image, top=-1)


def test_a_soft_mask_blends(pipe, base_image):
    half = draw(pipe, image=base_image, mask_image=np.full((16, 16), 0.5))
    kept, new = np.asarray(base_image) / 255, draw(pipe, image=base_image, mask_image=np.ones((16, 16)))
    assert 0 < np.abs(half - kept).mean() < np.abs(new - kept).mean()


def test_an_image_does_not_depend_on_its_neighbours(pipe, base_image, mask):
    other = Image.fromarray(255 - np.asarray(base_image))
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np", "num_resamples": 2}
    both = pipe(["a", "b"], image=[base_image, other], mask_image=mask, generator=seeds, **arguments).images
    alone = pipe("b", image=other, mask_image=mask, generator=[torch.Generator().manual_seed(1)], **arguments).images
    np.testing.assert_allclose(both[1], alone[0], atol=1e-5)


def test_repaint_takes_each_step_again(pipe, base_image, mask):
    for name in ("DDPM", "DDIM"):
        changed, steps = with_sampler(pipe, name), []
        taken = changed.scheduler.step
        changed.scheduler.step = lambda *a, taken=taken, steps=steps, **k: steps.append(int(a[1])) or taken(*a, **k)
        image = draw(changed, image=base_image, mask_image=mask, num_resamples=3, output_type="pil")[0]
        assert len(steps) == 4 * 3 + 1  # the last step is taken once
        assert (np.asarray(image) == np.asarray(base_image))[~mask].all()


def test_noising_up_again_is_the_forward_process(pipe):
    """q(x_t | x_0) by way of x_s: the variance of both noises adds up to 1 - abar_t."""
    x_0 = torch.full((200, 3, 16, 16), 0.5)
    s, t = torch.tensor(300), torch.tensor(600)
    generator = torch.Generator().manual_seed(0)
    x_s = pipe.add_noise(x_0, torch.randn(x_0.shape, generator=generator), s)
    x_t = renoise(pipe.scheduler, x_s, s, t, generator)
    abar = pipe.scheduler.alphas_cumprod[t]
    assert abs(x_t.mean() - 0.5 * abar.sqrt()) < 0.01 and abs(x_t.var() - (1 - abar)) < 0.01


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"mask_image": np.ones((16, 16))}, ValueError, "pass `image` too"),
        ({"strength": 0.5}, ValueError, "pass `image` too"),
        ({"image": 0, "strength": 0.0}, ValueError, "above 0 and at most 1"),
        ({"image": 0, "strength": 1.5}, ValueError, "above 0 and at most 1"),
        ({"image": 0, "strength": True}, ValueError, "above 0 and at most 1"),
        ({"image": 0, "strength": 0.01}, ValueError, "leaves no step to take"),
        ({"image": 0, "num_resamples": 2}, ValueError, "is for inpainting"),
        ({"image": 0, "num_resamples": 0}, ValueError, "at least 1"),
        ({"image": "x.png"}, TypeError, "must contain PIL images, arrays or tensors, got str"),
        ({"image": np.zeros((8, 8, 3))}, ValueError, "must be 3 x 16 x 16, got"),
        ({"image": np.full((16, 16, 3), 2.0)}, ValueError, "values from 0 to 1"),
        ({"image": np.full((16, 16, 3), np.nan)}, ValueError, "values from 0 to 1"),
        ({"image": [np.zeros((16, 16, 3)), np.zeros((8, 8, 3))]}, ValueError, "several sizes"),
        ({"image": np.zeros((3, 16, 16, 3))}, ValueError, "3 images in `image` for 1 prompts"),
        ({"image": 0, "mask_image": np.zeros((8, 8))}, ValueError, "`mask_image` must be 16 x 16"),
        ({"image": 0, "mask_image": np.full((16, 16), -1.0)}, ValueError, "values from 0"),
        ({"image": 0, "mask_image": "mask.png"}, TypeError, "got str"),
    ],
)
def test_wrong_images_and_masks_are_told(pipe, base_image, arguments, error, message):
    if isinstance(arguments.get("image"), int):
        arguments = {**arguments, "image": base_image}
    with pytest.raises(error, match=message):
        draw(pipe, **arguments)


def test_repaint_with_a_sampler_that_remembers_is_refused(pipe, base_image, mask):
    with pytest.raises(ValueError, match="needs a DDPM or DDIM scheduler, not UniPCMultistepScheduler"):
        draw(with_sampler(pipe, "UniPCMultistep"), image=base_image, mask_image=mask, num_resamples=2)
