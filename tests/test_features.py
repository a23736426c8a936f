"""Distances of sets of images."""

import numpy as np

from sfumato.training.quality import features, fidelity


def test_features_tell_spoilt_images_from_good_ones():
    rng = np.random.default_rng(0)
    true = np.zeros((12, 32, 32, 3), np.uint8)
    for i, image in enumerate(true):
        image[:] = rng.integers(0, 256, 3)
        image[8:24, 4 + i : 16 + i] = rng.integers(0, 256, 3)
    little, much = (np.uint8(np.clip(true + rng.normal(0, s, true.shape), 0, 255)) for s in (4, 60))
    near, far = (fidelity.feature_distances(true, made) for made in (little, much))
    assert near["FD"] < far["FD"] and near["LD"] < far["LD"]
    assert features.compute_features(true[..., :1]).shape == (12, 1280)  # grey too
