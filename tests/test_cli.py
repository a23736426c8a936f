"""The command `sfumato`, as a person types it."""

import pytest
import tiny
from PIL import Image

from sfumato.cli import main
from sfumato.pipelines import export_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return export_pipeline(tiny.pipeline(folder), folder / "run" / "pipeline")


def test_sample_draws_a_grid_that_its_seed_repeats(model, tmp_path):
    grids = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
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


def test_export_takes_a_run_folder(model, tmp_path, capsys):
    assert main(["export", str(model.parent), str(tmp_path / "shared")]) == 0
    assert (tmp_path / "shared" / "pipeline.py").is_file()
    assert (tmp_path / "shared" / "README.md").read_text() == (model / "README.md").read_text()  # licence and facts stay
    assert "from_pretrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sample", "--model", "/no/such", "x"], "there is no folder"),
        (["sample", "--model", ".", "x"], "holds no model"),
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
