"""What decides prepared bytes has a hand-raised version; these golden hashes say when it must be raised."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import tiny
from PIL import Image

from sfumato.registries import METRICS, SOURCES
from sfumato.training.config.schema import DataConfig
from sfumato.training.data import prepare
from sfumato.training.data.array_set import hash_content
from sfumato.training.train import main

# Content of prepared sets by FORMAT_VERSION 1, Pillow 12.3. A change here means: raise FORMAT_VERSION and say why.
GOLDEN = {
    "shapes": "fc60c91384743f27",
    "pairs": "ff27f555cbbcc7bb",
    "openmoji": "7adb347b22c002ee",
    "folder": "d5978bb933a17d29",
}


def folder_of_images(root):
    """Images of several formats, modes and shapes."""
    ramp = np.arange(20 * 30, dtype=np.uint32).reshape(20, 30)
    Image.fromarray((ramp % 256).astype(np.uint8)).save(root / "grey.png")
    Image.fromarray((ramp * 100).astype(np.uint16)).save(root / "deep.png")
    colour = np.stack([ramp % 256, ramp // 3 % 256, 255 - ramp % 256], axis=-1).astype(np.uint8)
    Image.fromarray(colour).save(root / "colour.bmp")
    Image.fromarray(np.dstack([colour, (ramp % 256).astype(np.uint8)])).save(root / "clear.png")
    Image.fromarray(colour).convert("P").save(root / "palette.gif")
    for path in list(root.iterdir()):
        path.with_suffix(".txt").write_text(f"a {path.stem} image")


def configs(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    folder_of_images(images)
    cache = {"cache_dir": str(tmp_path / "cache"), "resolution": 16}
    return {
        "shapes": DataConfig(name="shapes", num_pictures=8, **cache),
        "pairs": DataConfig(name="shapes", num_pictures=8, num_figures=2, **cache),
        "openmoji": DataConfig(name="openmoji", words=["heart"], colours=True, **cache),
        "folder": DataConfig(name=str(images), resize="pad", **cache),
    }


def test_prepared_bytes_are_the_golden_ones(tmp_path):
    assert prepare.FORMAT_VERSION == 2
    found = {name: prepare.prepare(config).fingerprint for name, config in configs(tmp_path).items()}
    assert found == GOLDEN, f"Pillow {version('pillow')}"


def test_the_key_follows_settings_and_files_and_not_what_changes_no_image(tmp_path):
    config = configs(tmp_path)["folder"]
    key = prepare.cache_key(config)
    config.random_flip, config.max_bad_share, config.cache_dir = True, 0.5, "elsewhere"
    assert prepare.cache_key(config) == key
    config.resolution = 24
    assert prepare.cache_key(config) != key
    config.resolution = 16
    (tmp_path / "images" / "grey.txt").write_text("another caption")
    assert prepare.cache_key(config) != key


def test_a_source_whose_code_changed_is_prepared_anew_and_no_other(monkeypatch):
    speech, notes = DataConfig(name="speech"), DataConfig(name="notes")
    keys = prepare.cache_key(speech), prepare.cache_key(notes)
    monkeypatch.setitem(SOURCES._entries, "speech", replace(SOURCES["speech"], version=SOURCES["speech"].version + 1))
    assert prepare.cache_key(speech) != keys[0] and prepare.cache_key(notes) == keys[1]


def test_the_same_bytes_are_the_same_data_wherever_they_lie(tmp_path):
    config = configs(tmp_path)["folder"]
    first = prepare.prepare(config)
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    config.name = str(tmp_path / "copy")
    assert prepare.prepare(config).fingerprint == first.fingerprint
    Image.new("RGB", (9, 9)).save(tmp_path / "copy" / "more.png")
    (tmp_path / "copy" / "more.txt").write_text("more")
    assert prepare.prepare(config).fingerprint != first.fingerprint


@pytest.mark.parametrize("changed", [False, True])
def test_data_of_an_older_version_are_accepted_where_the_bytes_agree(tmp_path, changed, capsys):
    """Before 0.2 a checkpoint named its data by a hash of settings and source code."""
    path = str(tiny.config_file(tmp_path, train={"max_steps": 4}))
    assert main([path, "train.max_steps=3"]) == 0
    (prepared,) = (folder for folder in (tmp_path / "cache").iterdir() if (folder / "report.json").is_file())
    older = prepared.with_name("shapes-16-0123456789abcdef")
    shutil.copytree(prepared, older)
    if changed:
        with open(older / "names.bin", "ab") as names:
            names.write(b"x")
    assert (hash_content(older) == hash_content(prepared)) != changed
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*3")
    state = json.loads((checkpoint / "state.json").read_text())
    del state["sha256"]
    state["data"] = older.name
    from sfumato.training.engine.checkpoints import _sha256_of

    (checkpoint / "state.json").write_text(json.dumps({**state, "sha256": _sha256_of(json.dumps(state))}))
    if changed:
        assert main([path, "checkpoint.resume=auto"]) == 0
        assert "the images are different" in capsys.readouterr().out
    else:
        with pytest.warns(UserWarning, match="prepared by an earlier version.*the bytes are the same"):
            assert main([path, "checkpoint.resume=auto"]) == 0
        assert "the images are different" not in capsys.readouterr().out


def test_features_are_the_golden_ones():
    """Of the network that a package carries, on a drawn ramp; a change means: raise features.FORMAT_VERSION."""
    from sfumato.training.quality import features

    assert features.FORMAT_VERSION == 2 and METRICS["distances"].needs
    ramp = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(1, 32, 32, 3) // 12
    found = features.compute_features(ramp.astype(np.uint8))[0]
    np.testing.assert_allclose([found.mean(), found.std(), found[7]], FEATURES, rtol=1e-3)


FEATURES = [0.0591172, 0.346447, 0]
