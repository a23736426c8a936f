"""Heat-maps are the attention that was there, and looking changes nothing."""

import threading

import numpy as np
import pytest
import tiny
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import with_sampler
from sfumato.pipelines.explain import _gather, explain

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("pipe"))


def seed(value=0):
    return torch.Generator().manual_seed(value)


@pytest.mark.parametrize("name", ["ddpm", "unipc", "euler"])
def test_looking_changes_nothing(pipe, name):
    chosen = with_sampler(pipe, name)
    chosen.set_progress_bar_config(disable=True)
    plain = chosen(PROMPT, num_inference_steps=4, generator=seed()).images[0]
    found = explain(chosen, PROMPT, num_inference_steps=4, generator=seed())
    assert found.image.tobytes() == plain.tobytes()
    assert not [m for m in chosen.unet.modules() if m._forward_hooks] and "predict" not in vars(chosen)


def test_heat_is_a_share_and_each_word_has_its_own(pipe):
    found = explain(pipe, PROMPT, num_inference_steps=3, generator=seed())
    assert found.words == PROMPT.split() and found.heat.shape == (3, 16, 16)
    assert (found.heat > 0).all() and (found.heat.sum(0) < 1).all()
    maps = [torch.rand(16, 7).softmax(1), torch.rand(64, 7).softmax(1)]
    np.testing.assert_allclose(_gather(maps, 16, 16).sum(0), 1, atol=1e-5)


def test_a_word_that_is_attended_to_in_one_corner_is_hot_there(pipe):
    """The scores are exactly those that the layer weighs its values with: set them by hand and find them again."""
    scores = torch.zeros(16, 4)
    scores[0, 2] = 1.0  # the first of 4 x 4 places
    heat = _gather([scores], 8, 8)
    assert heat[2].argmax() == 0 and heat[2, 4:, 4:].max() == 0 and heat[[0, 1, 3]].max() == 0


def test_recorded_attention_gives_the_output_of_the_layer(pipe):
    from diffusers.models.attention_processor import Attention

    from sfumato.pipelines.explain import _attention

    layer = next(m for m in pipe.unet.modules() if isinstance(m, Attention) and m.is_cross_attention and m.heads == 1 or
                 isinstance(m, Attention) and m.is_cross_attention)  # fmt: skip
    hidden, text = torch.randn(1, 16, layer.query_dim), torch.randn(1, 20, layer.cross_attention_dim)
    with torch.no_grad():
        probs = layer.get_attention_scores(*(layer.head_to_batch_dim(x) for x in (layer.to_q(hidden), layer.to_k(text))))
        expected = layer.to_out[0](layer.batch_to_head_dim(probs @ layer.head_to_batch_dim(layer.to_v(text))))
        output = layer(hidden, encoder_hidden_states=text)
        assert torch.allclose(output, expected + (hidden if layer.residual_connection else 0), atol=1e-5)
        recorded = _attention(layer, (hidden,), {"encoder_hidden_states": text}, None)
    assert torch.allclose(recorded, probs.mean(0), atol=1e-6)


def test_the_last_expected_image_is_the_result(pipe):
    found = explain(with_sampler(pipe, "ddim"), PROMPT, num_inference_steps=5, generator=seed())
    assert found.expected.shape == (5, 16, 16, 3)
    np.testing.assert_allclose(found.expected[-1], np.asarray(found.image) / 255, atol=1 / 255)


def test_ablation_is_the_change_without_the_word(pipe):
    found = explain(pipe, "a red circle red", ablate=True, num_inference_steps=3, generator=seed(3))
    plain = pipe("a red circle red", num_inference_steps=3, generator=seed(3)).images[0]
    other = pipe("a  circle red", num_inference_steps=3, generator=seed(3)).images[0]
    change = np.abs(np.asarray(plain, float) - np.asarray(other, float)).mean(-1) / 255
    np.testing.assert_allclose(found.ablation[1], change)
    assert found.figure().size[0] > 5 * 128


def test_foreign_folders_are_explained(pipe, tmp_path):
    pipe.to_stock().save_pretrained(tmp_path)
    found = explain(SfumatoPipeline.from_pretrained(tmp_path), PROMPT, num_inference_steps=2)
    assert found.heat.shape == (3, 16, 16)


@pytest.mark.parametrize("prompt, more", [("", {}), (["a"], {}), ("a", {"num_images_per_prompt": 2})])
def test_what_cannot_be_explained_is_told(pipe, prompt, more):
    with pytest.raises(ValueError, match="one text|one image"):
        explain(pipe, prompt, **more)


def test_another_thread_that_draws_is_not_in_the_heat(tmp_path):
    pipe = tiny.pipeline(tmp_path)
    alone = explain(pipe, "a red circle", num_inference_steps=4).heat
    other = threading.Thread(target=lambda: [pipe("a blue square", num_inference_steps=2) for _ in range(4)])
    other.start()
    beside = explain(pipe, "a red circle", num_inference_steps=4).heat
    other.join()
    assert np.array_equal(alone, beside)
