"""Arrays that are no pictures: what a codec encodes it decodes, strangers' code never runs, stock classes draw the same."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from stock_process import run_stock

from sfumato.cli import main as sfumato
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.codecs import open_codec, write_codec
from sfumato.pipelines.codecs.arrays import ArrayCodec
from sfumato.pipelines.codecs.clips import ClipCodec, film
from sfumato.pipelines.codecs.clips import everything as all_clips
from sfumato.pipelines.codecs.molecules import MoleculeCodec
from sfumato.pipelines.codecs.volumes import VolumeCodec, caption_of, ideal_solid
from sfumato.pipelines.codecs.volumes import everything as all_solids
from sfumato.pipelines.explain import explain
from sfumato.registries import CODECS, SOURCES
from sfumato.training.config.load import load_config
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.prepare import prepare
from sfumato.training.data.sources import moving_emoji
from sfumato.training.doctor import examine
from sfumato.training.publish.hub import files_to_push
from sfumato.training.train import main

SMILES = ["C", "CC(=O)O", "c1ccncc1", "C#N", "C[N+](C)(C)CC(=O)[O-]", "OC1CC1F", "CC12CC1C2=O", "O=C1C=CC=CN1C", "N#CC#CC#N"]
DRUGS = ["CCc1ccc(S(=O)(=O)NCC2CCCN2C(=O)c2ccc(Br)s2)cc1Cl", "CC(C)(C)C(=O)C(Oc1ccc(Cl)cc1)n1ccnc1"]
MOSES = {"atoms": 27, "elements": ("C", "N", "O", "F", "S", "Cl", "Br")}
FIELD = {"data": {"resolution": 16, "channels": 5}, "validation": {"num_judged": 2}}


def things(kind):
    """Captions and true objects of a kind, and the codec."""
    rng = np.random.default_rng(0)
    if kind == "volumes":
        return VolumeCodec(), {caption_of(words): ideal_solid(words, 16) for words in all_solids()}
    if kind == "clips":
        return ClipCodec(), {caption: film(words, 8, 32, rng) for caption, words in all_clips().items()}
    if kind == "moving_emoji":
        codec = moving_emoji.open_codec(None, [])
        records = list(moving_emoji.open_source(None, []))[::200]
        return codec, {record.captions[0]: record.image() for record in records}
    codec = MoleculeCodec(**(MOSES if kind == "moses" else {}))
    read = [codec.read(smiles) for smiles in (*SMILES, *(DRUGS if kind == "moses" else []))]
    return codec, {codec.caption(thing): thing for thing in read}


@pytest.mark.parametrize("kind", ["volumes", "clips", "moving_emoji", "molecules", "moses"])
def test_true_objects_are_judged_right_through_the_codec_and_noise(kind):
    """The judge by itself: what it finds wrong of a drawing is the drawing's fault."""
    codec, known = things(kind)
    rng = np.random.default_rng(1)
    assert open_codec(json.loads(json.dumps(codec.describe()))).describe() == codec.describe()
    for caption, thing in known.items():
        array = codec.encode(thing)
        assert array.shape == codec.shape and array.min() >= 0 and array.max() <= 1
        stored = np.round(array * 255) / 255 + 0.04 * rng.standard_normal(array.shape)
        assert codec.judge(codec.decode(stored), caption)["all"], caption
    captions = list(known)
    wrong = [codec.judge(known[one], other)["all"] for one, other in zip(captions, captions[1:])]
    assert not any(wrong)


def test_molecules_come_back_as_they_were():
    codec = MoleculeCodec()
    for smiles in SMILES:
        thing = codec.read(smiles)
        assert codec.smiles(codec.decode(codec.encode(thing))) == codec.smiles(thing) is not None
    drugs = MoleculeCodec(**MOSES)
    for smiles in DRUGS:
        thing = drugs.read(smiles)
        assert drugs.smiles(drugs.decode(drugs.encode(thing))) == drugs.smiles(thing) is not None
    assert drugs.caption(drugs.read(DRUGS[1])) == (
        "20 atoms, two nitrogen, two oxygen, one chlorine, two rings, aromatic, carbonyl"
    )
    with pytest.raises(ValueError, match="2 to 1024"):
        MoleculeCodec(atoms=1)
    with pytest.raises(ValueError, match="arrays are version 1; this sfumato has 3"):
        open_codec({"kind": "molecules", "version": 1, "settings": {"atoms": 9}})
    assert codec.caption(codec.read("Oc1ccncc1N")) == "eight atoms, two nitrogen, one oxygen, one ring, aromatic"
    assert codec.judge(codec.read("CCO"), "three atoms, one oxygen, no ring, alcohol")["all"]
    # A fifth bond of carbon, two pieces, nothing at all: no molecule, and nothing is mended.
    methane = {"elements": ["C"] * 6, "charges": [0] * 6, "bonds": [(0, k, 1) for k in range(1, 6)]}
    pieces = {"elements": ["C", "C"], "charges": [0, 0], "bonds": []}
    nothing = {"elements": [], "charges": [], "bonds": []}
    found = [codec.judge(thing, "two atoms, no ring") for thing in (methane, pieces, nothing)]
    assert [(each["valid"], each["valid, one piece"], each["all"]) for each in found] == [
        (False, False, False), (True, False, False), (False, False, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        ("not a molecule", "no molecule"),
        ("CCCCCCCCCC", "10 heavy atoms"),
        ("CS", "an element that is not"),
        ("[CH3]", "radical"),
    ],
)
def test_molecules_that_have_no_place_are_told(smiles, reason):
    with pytest.raises(ValueError, match=reason):
        MoleculeCodec().read(smiles)


def test_solids_and_clips_of_another_form_are_told():
    for codec, thing in ((VolumeCodec(), np.full((16, 16, 16), np.nan)), (VolumeCodec(), np.zeros((8, 8, 8)))):
        with pytest.raises(ValueError, match="finite numbers"):
            codec.encode(thing)
    with pytest.raises(ValueError, match="bytes"):
        ClipCodec().encode(np.zeros((8, 32, 32, 3), np.float32))


def test_files_that_people_open(tmp_path):
    import trimesh
    from PIL import Image

    solid = ideal_solid(all_solids()[0], 16)
    VolumeCodec().write(solid, tmp_path / "a.glb")
    VolumeCodec().write(solid, tmp_path / "a.stl")
    mesh = trimesh.load(tmp_path / "a.stl")
    assert abs(mesh.volume - solid.mean()) < 0.15 * solid.mean()
    assert trimesh.load(tmp_path / "a.glb").geometry
    with pytest.raises(ValueError, match="nothing in this solid"):
        VolumeCodec().write(np.zeros((16, 16, 16)), tmp_path / "b.glb")
    caption, words = next(iter(all_clips().items()))
    ClipCodec().write(film(words, 8, 32, np.random.default_rng(0)), tmp_path / "a.gif")
    assert Image.open(tmp_path / "a.gif").n_frames == 8
    codec = MoleculeCodec()
    for ending in codec.endings:
        codec.write(codec.read("CCO"), tmp_path / f"a{ending}")
    assert (tmp_path / "a.smi").read_text() == "CCO\n" and "V2000" in (tmp_path / "a.sdf").read_text()
    with pytest.raises(ValueError, match="is not a valid molecule"):
        codec.write({"elements": [], "charges": [], "bonds": []}, tmp_path / "b.sdf")


@pytest.fixture
def fields(tmp_path):
    """A folder of fields of five channels with odd ones among them."""
    folder = tmp_path / "fields"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["file_name,text"]
    for i in range(40):
        field = rng.normal(size=(5, 16, 16)) * [[[1]], [[10]], [[100]], [[0.1]], [[1e-3]]] + (i % 2) * 3
        np.save(folder / f"{i}.npy", field.astype(np.float32 if i % 3 else np.float64))
        lines.append(f"{i}.npy,{'warm' if i % 2 else 'cold'} field")
    np.savez(folder / "one.npz", array=field, other=field)
    np.savez(folder / "two.npz", a=field, b=field)
    np.save(folder / "nan.npy", np.full((5, 16, 16), np.nan))
    np.save(folder / "small.npy", np.zeros((5, 8, 8)))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "words.npy", np.array(["a"]))
    (folder / "torn.npy").write_bytes((folder / "0.npy").read_bytes()[:300])
    odd = ("one.npz", "two.npz", "nan.npy", "small.npy", "objects.npy", "words.npy", "torn.npy", "gone.npy")
    (folder / "metadata.csv").write_text("\n".join([*lines, *(f"{name},odd field" for name in odd)]) + "\n")
    (folder / "forgotten.npy").write_bytes((folder / "0.npy").read_bytes())
    return folder


def field_config(tmp_path, fields, **sections):
    data = {"name": str(fields), "max_bad_share": 0.9, **FIELD["data"], **sections.pop("data", {})}
    validation = {"prompts": ["warm field", "cold field"], **sections.pop("validation", {})}
    return tiny.config_file(tmp_path, data=data, validation=validation, **sections)


def test_arrays_are_found_used_or_named(tmp_path, fields):
    with pytest.warns(UserWarning, match="skipped 7 of 48"):
        images = prepare(load_config(field_config(tmp_path, fields)).data)
    assert len(images) == 41 and images.dtype == np.float16
    reasons = {name: reason for reason, names in images.skipped.items() for name in names}
    assert {name: reasons[name][:20] for name in sorted(reasons)} == {
        "gone.npy": "missing",
        "nan.npy": "numbers that are not",
        "objects.npy": "pickled objects, whi",
        "small.npy": "an array of shape (5",
        "torn.npy": reasons["torn.npy"][:20],
        "two.npz": "several arrays, none",
        "words.npy": "<U1 are not real num",
    }
    assert images.left_out == {"not in metadata.csv": ["forgotten.npy"]}
    codec = open_codec(images.codec)
    again = codec.decode(images.image(0).astype(np.float32) / 2 + 0.5)
    name = images[0]["id"]
    true = np.load(fields / name)
    assert np.abs(again - true).max((1, 2)).max() / codec.scale.max() < 1e-3 and again.dtype == np.float32
    with pytest.raises(ValueError, match=r"no array in .* is \(3, 16, 16\).*there are"):
        prepare(load_config(field_config(tmp_path, fields, data={"channels": 3})).data)


def test_bytes_stay_bytes(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        np.save(folder / f"{i}.npy", rng.integers(0, 255, (2, 16, 16), dtype=np.uint8))
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.npy,noise\n" for i in range(8)))
    images = prepare(load_config(tiny.config_file(tmp_path, data={"name": str(folder), "channels": 2})).data)
    assert images.dtype == np.uint8
    first = open_codec(images.codec).decode(images.image(0) / 255.0)
    assert first.dtype == np.uint8 and np.array_equal(first, np.load(folder / images[0]["id"]))
    (folder / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="arrays but no captions"):
        prepare(load_config(tiny.config_file(tmp_path, data={"name": str(folder), "channels": 2})).data)


@pytest.mark.filterwarnings("ignore:skipped", "ignore:left out")
def test_a_model_of_fields_is_trained_drawn_redrawn_and_explained(tmp_path, fields):
    path = field_config(tmp_path, fields)
    assert main([str(path)]) == 0
    folder = tmp_path / "run" / "pipeline"
    pipe = SfumatoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    field = pipe("warm field", num_inference_steps=2, output_type="decoded").images[0]
    assert field.shape == (5, 16, 16) and isinstance(pipe.codec, ArrayCodec)
    array = pipe.codec.encode(field)
    mask = np.zeros((16, 16), np.float32)
    mask[:8] = 1
    kept = pipe("cold field", image=array, mask_image=mask, num_inference_steps=2, output_type="np").images[0]
    assert np.abs(kept[8:] - array[8:]).max() < 1e-5 < np.abs(kept[:8] - array[:8]).max()
    assert pipe("cold field", image=array, strength=0.5, num_inference_steps=2, output_type="np").images[0].shape == (
        16,
        16,
        5,
    )
    assert explain(pipe, "warm field", num_inference_steps=2).heat.shape[0] == 2
    assert examine(load_config(path)) and (tmp_path / "run" / "doctor.png").is_file()
    out = tmp_path / "drawn.npy"
    assert sfumato(["sample", "warm field", "--model", str(folder), "--steps", "2", "--out", str(out)]) == 0
    assert np.load(out).shape == (5, 16, 16) and out.with_suffix(".png").is_file()
    many = ["sample", "warm field", "cold field", "--model", str(folder), "--steps", "2", "--out", str(out)]
    assert sfumato(many) == 2


STOCK = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
sys.path.insert(0, sys.argv[1])
from codec import open_codec
pipe, codec = DiffusionPipeline.from_pretrained(sys.argv[1]), open_codec()
pipe.set_progress_bar_config(disable=True)
array = pipe(sys.argv[2], output_type="np", num_inference_steps=2, guidance_scale=2.0,
             generator=torch.Generator().manual_seed(0)).images[0]
np.save(sys.argv[3], array)
np.save(sys.argv[4], codec.decode(array))
"""


def test_stock_classes_and_the_folders_own_code_give_the_same(tmp_path):
    """Without sfumato; and with it, no code of the folder runs."""
    few = {"num_judged": 8}
    assert main([str(tiny.config_file(tmp_path, data={"name": "volumes", "channels": 16}, validation=few))]) == 0
    folder, caption = tmp_path / "run" / "pipeline", caption_of(all_solids()[0])
    arguments = [str(folder), caption, str(tmp_path / "array.npy"), str(tmp_path / "thing.npy")]
    run_stock(STOCK, *arguments)
    (folder / "codec.py").write_text("raise SystemExit('a folder\\'s code ran')\n")
    pipe = SfumatoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 2.0}
    array, thing = (
        pipe(caption, output_type=kind, generator=torch.Generator().manual_seed(0), **call).images[0]
        for kind in ("np", "decoded")
    )
    assert np.abs(array - np.load(tmp_path / "array.npy")).max() < 1e-5
    assert np.abs(thing - np.load(tmp_path / "thing.npy")).max() < 1e-5
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {"all", "solid", "top"} <= set(scores)
    assert {"codec.json", "codec.py"} <= set(files_to_push(folder))
    card = (folder / "README.md").read_text()
    assert "text-to-volumes" in card and "from codec import open_codec" in card
    assert sfumato(["export", str(folder), str(tmp_path / "copy")]) == 0
    assert "open_codec" in (tmp_path / "copy/codec.py").read_text() and (tmp_path / "copy/codec.json").is_file()
    assert sfumato(["evaluate", "--model", str(tmp_path / "copy"), "--images", "4", "--steps", "2"]) == 0
    assert "judged" in (tmp_path / "copy" / "README.md").read_text().lower()


ALONE = """
import json, sys
from pathlib import Path
import numpy as np
for folder in sorted(Path(sys.argv[1]).iterdir()):
    space = {"__file__": str(folder / "codec.py"), "__name__": "codec"}
    exec((folder / "codec.py").read_text(), space)
    thing = space["open_codec"](folder).decode(np.load(folder / "array.npy"))
    (folder / "thing.json").write_text(json.dumps(thing, default=lambda array: array.tolist()))
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "diffusers", "sfumato", "rdkit", "librosa")]
"""


def test_every_kind_is_decoded_by_the_folders_own_code_and_numpy_alone(tmp_path):
    """`codec.py` and `codec.json` of every kind, in a process that has nothing of ours."""
    opened = {name: open_codec({"kind": name, "settings": {}}) for name in CODECS if name != "arrays"}
    opened |= {"arrays": ArrayCodec((16, 16, 5), [0.0] * 5, [1.0] * 5), "moses": MoleculeCodec(**MOSES)}
    rng = np.random.default_rng(0)
    for name, codec in opened.items():
        (tmp_path / name).mkdir()
        write_codec(codec.describe(), tmp_path / name)
        np.save(tmp_path / name / "array.npy", rng.random(codec.shape, np.float32))
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path)]  # -I: no path of this checkout, no environment
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, codec in opened.items():
        ours = codec.decode(np.load(tmp_path / name / "array.npy"))
        same = json.loads(json.dumps(ours, default=lambda array: array.tolist()))
        assert json.loads((tmp_path / name / "thing.json").read_text()) == same, name


@pytest.mark.parametrize(
    "facts", [{"kind": "os"}, {"kind": "volumes", "settings": {"side": "x"}}, {"kind": "volumes"}, [], "x"]
)
def test_strangers_facts_are_an_error_in_words(facts):
    with pytest.raises(ValueError):
        open_codec(facts)


def test_what_a_source_needs_is_told_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match=r"volumes has arrays of 16 x 16 and data.channels=16"):
        load_config(tiny.config_file(tmp_path, data={"name": "volumes"}))
    with pytest.raises(ValueError, match="images have 1, 3 or 4"):
        from PIL import Image

        (tmp_path / "set").mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "set" / "a.png")
        (tmp_path / "set" / "a.txt").write_text("black")
        prepare(load_config(tiny.config_file(tmp_path, data={"name": str(tmp_path / "set"), "channels": 5})).data)


def test_molecules_are_prepared_with_their_captions_held_out(tmp_path, monkeypatch):
    from sfumato.training.data.sources import molecules

    monkeypatch.setattr(molecules, "qm9_smiles", lambda: [*SMILES, "not a molecule"])
    data = {"name": "molecules", "resolution": 24, "channels": 29}
    config = load_config(tiny.config_file(tmp_path, data=data, vae={"repeat": 8}))
    config.data.max_bad_share = 0.2
    with pytest.warns(UserWarning, match="1 no molecule"):
        images = prepare(config.data)
    assert len(images) == len(SMILES) and images.picture(0).shape == (128, 128, 3)
    # Of each square of 8 x 8 pixels that say the same, one is kept.
    assert images.image(0).shape == (24, 24, 29)
    assert sum(path.stat().st_size for path in images.folder.glob("pictures-*.bin")) == len(images) * 3 * 3 * 29
    assert all(SOURCES[name].codec for name in CODECS if name != "texts")


@pytest.mark.filterwarnings("ignore:validation.prompts")
def test_a_model_of_squares_works_on_one_number_of_each(tmp_path, monkeypatch):
    """`vae.repeat`: nine atoms are nine places, and stock pipelines still draw sides that are multiples of 8."""
    from sfumato.training.data.sources import molecules

    monkeypatch.setattr(molecules, "qm9_smiles", lambda: list(SMILES))
    unet = {
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    }
    settings = {"data": {"name": "molecules", "resolution": 24, "channels": 29}, "vae": {"repeat": 8}, "unet": unet}
    path = str(tiny.config_file(tmp_path, **settings))
    assert main([path]) == 0
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    ours = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert stock.unet.config.sample_size == 3 and "sfumato" not in type(stock).__module__
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "works on one value per square of 8 x 8 pixels, which its VAE repeats over the square" in card
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    drawn = [pipe("four atoms", generator=torch.Generator().manual_seed(0), **call).images[0] for pipe in (stock, ours)]
    assert drawn[0].shape == (24, 24, 29)
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5)
    squares = drawn[1].reshape(3, 8, 3, 8, 29)
    np.testing.assert_allclose(squares, np.broadcast_to(squares[:, :1, :, :1], squares.shape), atol=1e-5)
    with pytest.raises(ValueError, match="vae.repeat=1: must be 8 here"):
        load_config(tiny.config_file(tmp_path, **{**settings, "vae": {}}))
    with pytest.raises(ValueError, match="vae.repeat=8: must be 1 here"):
        load_config(tiny.config_file(tmp_path, vae={"repeat": 8}))
    (tmp_path / "fields").mkdir()
    for name in ("one", "two"):
        np.save(tmp_path / "fields" / f"{name}.npy", np.zeros((29, 24, 24), np.uint8))
    (tmp_path / "fields" / "metadata.csv").write_text("file_name,text\none.npy,four atoms\ntwo.npy,four atoms")
    data = {"name": str(tmp_path / "fields"), "resolution": 24, "channels": 29}
    plain = {"init_from": str(tmp_path / "run"), "data": data}
    with pytest.raises(ValueError, match="reads one value per 8 x 8 pixels"):
        tiny.task(load_config(tiny.config_file(tmp_path, **plain), ["unet={}", "scheduler={}", "text_encoder={}"]))


@pytest.mark.parametrize("name", ["molecules", "moses"])
def test_the_shape_of_molecules_is_what_the_registry_says(name):
    from sfumato.training.data.sources.molecules import open_codec

    codec = open_codec(DataConfig(name=name), [])
    assert (codec.shape, codec.repeat) == (SOURCES[name].shape, SOURCES[name].repeat)
    with pytest.raises(ValueError, match="an array of"):
        codec.decode(np.zeros((8, 8, 8)))


@pytest.mark.filterwarnings("ignore:skipped", "ignore:left out", "ignore:validation.prompts")
def test_what_is_for_pictures_alone_is_refused(tmp_path, fields, capsys):
    path = str(field_config(tmp_path, fields))
    assert main([path, "task=inpainting"]) == 2 and "inpainting is for images" in capsys.readouterr().err
    assert main([path, "checkpoint.best_by=FD", "validation.every_steps=3"]) == 2
    assert "best_by=FD is for images" in capsys.readouterr().err
