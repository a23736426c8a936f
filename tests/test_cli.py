"""The command `sfumato`, as a person types it."""

import json

import pytest
import tiny
from PIL import Image

from sfumato.cli import main
from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.runtimes import find_device


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return export_pipeline(tiny.pipeline(folder), folder / "run" / "pipeline")


def test_sample_draws_a_grid_that_its_seed_repeats(model, tmp_path):
    grids = []
    for name, seed in (("a", 0), ("new/b", 0), ("c", 1)):
        out = tmp_path / f"{name}.png"
        assert (
            main(
                ["sample", "--model", str(model), "red heart", "披萨", "--out", str(out), "--seed", str(seed), "--steps", "2"]
            )
            == 0
        )
        grids.append(Image.open(out).tobytes())
    assert grids[0] == grids[1] != grids[2]
    assert Image.open(tmp_path / "a.png").width > 2 * 128


def test_sampler_guider_and_settings_in_the_png(model, tmp_path):
    command = ["sample", "--model", str(model), "披萨", "--steps", "3", "--out", str(tmp_path / "a.png"), "--seed", "5"]
    command += ["--sampler", "unipc", "--guider", "apg", "--guidance-interval", "0.2", "0.8", "--gif", str(tmp_path / "a.gif")]
    assert main(command) == 0
    with Image.open(tmp_path / "a.png") as image:
        notes = json.loads(image.text["sfumato"])
    assert (
        notes["model"] == model.name
        and notes["prompts"] == ["披萨"]
        and notes["seed"] == 5
        and notes["sampler"] == "unipc"
        and notes["guider"] == "apg"
    )
    assert notes["guidance_scale"] == 3.0 and notes["passes"] == 5  # two of three steps are in the interval
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames >= 3


def test_an_image_and_a_mask_from_files(model, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "in.png")
    Image.new("L", (16, 16), 0).save(tmp_path / "mask.png")
    command = ["sample", "--model", str(model), "x", "--steps", "3", "--out", str(tmp_path / "a.png")]
    assert main([*command, "--image", str(tmp_path / "in.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    assert Image.open(tmp_path / "a.png").getpixel((60, 60)) == (255, 0, 0)


def test_an_image_of_another_shape_is_cropped_not_squashed(model, tmp_path, capsys):
    wide = Image.new("RGB", (32, 16), "blue")
    wide.paste("red", (8, 0, 24, 16))
    wide.save(tmp_path / "in.png")
    command = ["sample", "--model", str(model), "x", "--steps", "3", "--out", str(tmp_path / "a.png")]
    Image.new("L", (16, 16), 0).save(tmp_path / "mask.png")
    assert main([*command, "--image", str(tmp_path / "in.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    drawn = Image.open(tmp_path / "a.png")
    assert {drawn.getpixel((x, 60)) for x in (10, 60, 120)} == {(255, 0, 0)}
    assert "in.png: cropped to its middle, 16 x 16 pixels" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--out", "grid"], ["--out", "."], ["--gif", "film.xyz"], ["--each", "file"]])
def test_where_images_cannot_be_kept_nothing_is_drawn(model, tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(SfumatoPipeline, "from_pretrained", lambda *a, **k: pytest.fail("opened before it was checked"))
    assert main(["sample", "--model", str(model), "x", *wrong]) == 2
    assert wrong[1] in capsys.readouterr().err


def test_a_negative_prompt_without_guidance_is_told(model, tmp_path, capsys):
    command = ["sample", "--model", str(model), "x", "--steps", "2", "--out", str(tmp_path / "a.png")]
    for scale, told in (("1", True), ("2", False)):
        assert main([*command, "--negative-prompt", "blue", "--guidance-scale", scale]) == 0
        assert ("no effect without guidance" in capsys.readouterr().err) == told


@pytest.mark.parametrize("flag, kind", [("--sampler", "sampler"), ("--guider", "guider"), ("--runtime", "runtime")])
def test_unknown_names_are_told_with_the_known_ones(model, capsys, flag, kind):
    assert main(["sample", "--model", str(model), "x", flag, "magic"]) == 2
    assert f"unknown {kind} 'magic'; choose one of" in capsys.readouterr().err


def test_the_device_may_be_named(model, tmp_path, capsys):
    command = ["sample", "--model", str(model), "x", "--steps", "2"]
    found = find_device()
    assert main([*command, "--out", str(tmp_path / "a.png")]) == 0
    assert main([*command, "--out", str(tmp_path / "b.png"), "--device", found.type]) == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    for name in ("nonsense", "meta", "cuda:99"):
        assert main([*command, "--device", name]) == 2
        assert f"device '{name}' cannot be used here; torch finds {found}" in capsys.readouterr().err
    assert main([*command, "--runtime", "onnx", "--device", "cuda"]) == 2
    assert "leave --device cuda out" in capsys.readouterr().err


def test_a_prompt_is_explained(model, tmp_path, capsys):
    sizes = []
    for more in ([], ["--without"]):
        out = tmp_path / "new" / f"why{len(more)}.png"
        assert main(["explain", "a red circle", "--model", str(model.parent), "--out", str(out), *more]) == 0
        sizes.append(Image.open(out).size)
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > 1.8 * sizes[0][1]  # a row more
    assert "below, what changes without it" in capsys.readouterr().out
    assert main(["explain", "", "--model", str(model), "--out", str(out)]) == 2


def test_a_model_is_opened_by_what_names_it(model):
    """From Python as on the command line: a run folder, its pipeline, the packaged model."""
    for name in (model.parent, model, "openmoji"):
        assert SfumatoPipeline.from_pretrained(name).unet is not None


def test_a_config_begins_with_its_own_command_and_its_run_is_looked_at(tmp_path, capsys):
    assert main(["init", str(tmp_path / "mine"), "--preset", "shapes"]) == 0
    path = tmp_path / "mine" / "config.yaml"
    assert path.read_text().splitlines()[0].startswith(f"# sfumato train {path}")
    assert main(["init", str(tmp_path / "other"), "--preset", "melodies"]) == 0
    first = (tmp_path / "other" / "config.yaml").read_text().splitlines()[0]
    assert "fluidsynth" in first and first.endswith(f"sfumato train {tmp_path / 'other' / 'config.yaml'}")
    assert main(["doctor", str(tiny.config_file(tmp_path))]) == 0
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.yaml").write_text(tiny.config_file(tmp_path).read_text())
    assert main(["doctor", str(tmp_path / "run")]) == 0
    assert "training images" in capsys.readouterr().out


def test_settings_may_follow_a_verbs_options(tmp_path, capsys):
    path = str(tiny.config_file(tmp_path))
    plan = ["doctor", path, "train.batch_size=2", "--gpu", "h100", "train.max_steps=7", "--gpus", "2", "seed=3"]
    assert main(plan) == 0
    assert "28 images are seen" in capsys.readouterr().out
    for wrong in (["doctor", path, "--gpu", "h100", "h200"], ["export", "a", "b", "--half", "seed=3"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_export_takes_a_run_folder(model, tmp_path, capsys):
    assert main(["export", str(model.parent), str(tmp_path / "shared")]) == 0
    assert (tmp_path / "shared" / "pipeline.py").is_file()
    card = (model / "README.md").read_text().replace(f'"{model.name}"', '"shared"')
    assert (tmp_path / "shared" / "README.md").read_text() == card  # licence and facts stay
    assert "from_pretrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sample", "--model", "/no/such", "x"], "there is no folder"),
        (["sample", "--model", ".", "x"], "contains no model"),
        (["export", "/no/such", "out"], "there is no folder"),
        (["train", "/no/such.yaml"], "no config file"),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_wrong_steps_are_refused(model, capsys):
    assert main(["sample", "--model", str(model), "x", "--steps", "0"]) == 2
    assert "num_inference_steps" in capsys.readouterr().err


def test_steps_and_scale_are_what_the_card_says(model, tmp_path):
    shared = tmp_path / "shared"
    export_pipeline(
        SfumatoPipeline.from_pretrained(model), shared, facts={"guidance_scale": 2.0, "num_inference_steps": 4, "data": "x"}
    )
    for folder, steps, scale in ((model, 30, 3.0), (shared, 4, 2.0)):
        assert recommended_settings(str(folder)) == {"num_inference_steps": steps, "guidance_scale": scale}
    assert main(["sample", "--model", str(shared), "x", "--out", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as image:
        notes = json.loads(image.text["sfumato"])
    assert (notes["steps"], notes["guidance_scale"], notes["passes"]) == (4, 2.0, 8)


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no front matter",
        "---\ninference: [1]\n---\n",
        "---\ninference: {parameters: 3}\n---\n",
        "---\ninference: {parameters: {num_inference_steps: [4], guidance_scale: .inf}}\n---\n",
        "---\ninference: {parameters: {num_inference_steps: null, guidance_scale: many}}\n---\n",
        "---\ninference: {parameters: {num_inference_steps: 1000000, guidance_scale: true}}\n---\n",
        "---\n{ : [\n---\n",
    ],
)
def test_a_card_of_another_form_is_no_hindrance(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert recommended_settings(str(tmp_path)) == {"num_inference_steps": 30, "guidance_scale": 3.0}


def test_autoguidance_by_an_earlier_checkpoint(model, tmp_path, capsys):
    weak = export_pipeline(tiny.pipeline(tmp_path, seed=1), tmp_path / "weak")
    command = [
        "sample",
        "--model",
        str(model),
        "x",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "a.png"),
        "--guider",
        "autoguidance",
    ]
    assert main([*command, "--weak", str(weak)]) == 0
    assert "2 steps, 4 passes" in capsys.readouterr().out
    assert main(command) == 2
    assert "an earlier checkpoint" in capsys.readouterr().err


def test_each_image_can_be_drawn_again_by_what_it_says(model, tmp_path):
    """Its own prompt and seed are in its PNG, and draw it again alone."""
    out = ["--steps", "2", "--out", str(tmp_path / "a.png"), "--each"]
    assert main(["sample", "--model", str(model), "red heart", "披萨", "--seed", "7", *out, str(tmp_path / "both")]) == 0
    with Image.open(tmp_path / "both" / "00008.png") as image:
        assert image.size == (16, 16)
        notes, pixels = json.loads(image.text["sfumato"]), image.tobytes()
    assert notes["prompts"] == ["披萨"] and notes["seed"] == 8
    again = [*notes["prompts"], "--seed", str(notes["seed"]), *out, str(tmp_path / "one")]
    assert main(["sample", "--model", str(model), *again]) == 0
    assert Image.open(tmp_path / "one" / "00008.png").tobytes() == pixels
