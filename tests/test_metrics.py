"""The checker must be right on true images, and must say no to wrong ones."""

import dataclasses

import numpy as np
import pytest

from sfumato.training.data.sources.shapes import (
    COLOURS,
    GROUNDS,
    NUM_HELD_OUT,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    coverage,
    draw,
    scenes,
)
from sfumato.training.quality.obedience import read_scene, shapes_obedience


@pytest.mark.parametrize("resolution", [24, 32, 64])
def test_true_images_score_over_99_percent(resolution):
    rng = np.random.default_rng(1)
    everything = (scenes(held_out=False) + scenes(held_out=True))[:: 5 if resolution == 64 else 1]
    scores = shapes_obedience([draw(scene, resolution, rng) for scene in everything], everything)
    assert min(v for k, v in scores.items() if k != "unreadable") > 0.99


def test_slight_noise_is_forgiven():
    rng = np.random.default_rng(1)
    some = scenes(held_out=True)
    noisy = [np.clip(draw(s, 32, rng) + rng.normal(0, 6, (32, 32, 3)), 0, 255).astype(np.uint8) for s in some]
    assert shapes_obedience(noisy, some)["all"] > 0.98


def test_each_wrong_attribute_is_seen():
    rng = np.random.default_rng(2)
    tables = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES, "ground": GROUNDS}
    for scene in scenes(held_out=True)[::16]:
        for attribute, table in tables.items():
            other = next(value for value in table if value != getattr(scene, attribute))
            lie = dataclasses.replace(scene, **{attribute: other})
            scores = shapes_obedience([draw(scene, 32, rng)], [lie])
            assert scores["all"] == 0 and scores[attribute] == 0
            assert all(scores[name] == 1 for name in tables if name != attribute)


def test_empty_noisy_and_doubled_images_are_unreadable():
    rng = np.random.default_rng(3)
    assert read_scene(np.full((32, 32, 3), 255, np.uint8)) is None
    assert read_scene(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) is None
    two = np.maximum(coverage("circle", 0.25, 0.25, 0.125, 32), coverage("circle", 0.75, 0.75, 0.125, 32))[..., None]
    image = (two * np.array(COLOURS["red"]) + (1 - two) * 255).round().astype(np.uint8)
    assert read_scene(image) is None


def test_held_out_scenes_are_apart_and_cover_every_value():
    train, held_out = scenes(held_out=False), scenes(held_out=True)
    assert len(held_out) == NUM_HELD_OUT and not set(train) & set(held_out)
    assert len(train) + len(held_out) == 6 * 4 * 2 * 9 * 4
    for field in dataclasses.fields(Scene):
        assert {getattr(s, field.name) for s in train} == {getattr(s, field.name) for s in train + held_out}
    assert len({s.caption for s in train + held_out}) == len(train) + len(held_out)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_centred(shape):
    mask = coverage(shape, 0.5, 0.5, 0.3, 64)
    centres = (np.arange(64) + 0.5) / 64
    assert mask.sum(0) @ centres / mask.sum() == pytest.approx(0.5, abs=1e-3)
    assert mask.sum(1) @ centres / mask.sum() == pytest.approx(0.5, abs=0.01)


def test_pairs_are_read_in_any_quarters_and_binding_is_judged():
    rng = np.random.default_rng(4)
    everything = scenes(held_out=False, num_figures=2) + scenes(held_out=True, num_figures=2)
    images = [draw(scene, 24, rng) for scene in everything]
    assert shapes_obedience(images, everything)["all"] > 0.99
    for scene, image in list(zip(everything, images))[::37]:
        (a, b), (c, d) = scene.figures
        swapped = dataclasses.replace(scene, figures=((a, d), (c, b)))  # the right colours and shapes, wrongly bound
        scores = shapes_obedience([image], [swapped])
        assert (scores["colours"], scores["shapes"], scores["all"]) == (1, 1, 0)
        assert shapes_obedience([image], [dataclasses.replace(scene, figures=scene.figures[::-1])])["all"] == 1


def test_held_out_pairs_are_never_seen_together():
    train, held_out = scenes(held_out=False, num_figures=2), scenes(held_out=True, num_figures=2)
    assert len(held_out) == NUM_HELD_OUT and len(train) == 2 * (180 * 4 - NUM_HELD_OUT)
    assert not {frozenset(s.figures) for s in train} & {frozenset(s.figures) for s in held_out}
    assert {figure for s in held_out for figure in s.figures} <= {figure for s in train for figure in s.figures}
    assert all(a != c and b != d for (a, b), (c, d) in (s.figures for s in train + held_out))
