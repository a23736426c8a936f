"""Distances of sets of pictures, against independent implementations."""

import numpy as np
import pytest
import scipy.linalg

from sfumato.training import features


@pytest.mark.parametrize("count", [400, 20])  # more and fewer samples than dimensions
def test_the_frechet_distance_is_its_formula(count):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(count, 48)) @ rng.normal(size=(48, 48)), rng.normal(size=(count + 7, 48)) + 0.3
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T) + 0j)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    assert features.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert features.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_features_tell_spoilt_pictures_from_good_ones():
    rng = np.random.default_rng(0)
    true = np.zeros((12, 32, 32, 3), np.uint8)
    for i, picture in enumerate(true):
        picture[:] = rng.integers(0, 256, 3)
        picture[8:24, 4 + i : 16 + i] = rng.integers(0, 256, 3)
    little, much = (np.uint8(np.clip(true + rng.normal(0, s, true.shape), 0, 255)) for s in (4, 60))
    near, far = (features.feature_distances(true, made) for made in (little, much))
    assert near["FD"] < far["FD"] and near["LD"] < far["LD"]
    assert features.features(true[..., :1]).shape == (12, 1280)  # grey too
