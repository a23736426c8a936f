"""DDIM inversion leads back to the image it came from, and elsewhere under another caption."""

import numpy as np
import pytest
import tiny
import torch

from sfumato.pipelines.choices import with_sampler
from sfumato.pipelines.edit import edit, invert


# 30 does not divide 1,000; at strength 1 eps of random weights is too rough to lead back.
@pytest.mark.parametrize(
    "prediction_type, strength, steps",
    [
        ("v_prediction", 0.5, 20),
        ("epsilon", 0.5, 20),
        ("v_prediction", 1.0, 50),
        ("v_prediction", 0.6, 30),
        ("epsilon", 0.6, 30),
    ],
)
def test_what_is_inverted_is_drawn_again(tmp_path, prediction_type, strength, steps):
    # A schedule that leaves a trace of the image at its end; cosine's leaves none.
    pipe = tiny.pipeline(tmp_path, scheduler={"prediction_type": prediction_type, "beta_schedule": "scaled_linear"})
    image = np.random.default_rng(0).uniform(0.2, 0.8, (16, 16, 3)).astype(np.float32)
    call = {"strength": strength, "num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"}
    again = edit(pipe, image, "a red circle", "a red circle", **call).images[0]
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    anew = with_sampler(pipe, "ddim")("a red circle", image=image, latents=noise, **call).images[0]
    error, other = (float(np.sqrt(np.square(drawn - image).mean())) for drawn in (again, anew))
    assert error < 0.03 * other, (error, other)
    changed = edit(pipe, image, "a red circle", "a blue square", **{**call, "guidance_scale": 5.0}).images[0]
    assert np.abs(changed - again).max() > 1e-3


def test_the_noise_is_that_of_the_exact_step(tmp_path):
    """One step: DDIM from the noise that inversion found gives the image, whatever the network says."""
    pipe = tiny.pipeline(tmp_path)
    image = np.random.default_rng(0).uniform(0.2, 0.8, (16, 16, 3)).astype(np.float32)
    noise = invert(pipe, image, "a red circle", strength=0.1, num_inference_steps=10, iterations=30)
    given = {"image": image, "strength": 0.1, "latents": noise, "num_inference_steps": 10}
    drawn = with_sampler(pipe, "ddim")("a red circle", guidance_scale=1.0, output_type="np", **given).images[0]
    np.testing.assert_allclose(drawn, image, atol=1e-4)
