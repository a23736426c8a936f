"""What one gets by `pip install`: configs, a model, the command; in an environment of its own, outside of any checkout."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from sfumato import __version__
from sfumato.cli import main

ROOT = Path(__file__).parent.parent


def test_init_writes_a_commented_config_that_loads(tmp_path, capsys):
    assert main(["init", str(tmp_path / "mine")]) == 0
    path = tmp_path / "mine" / "config.yaml"
    text = path.read_text()
    packaged = (ROOT / "configs/folder_cpu.yaml").read_text()
    assert text.startswith(f"# sfumato train {path} ") and yaml.safe_load(text) == yaml.safe_load(packaged)
    assert text.partition("\n")[2] == packaged.partition("\n")[2]  # all but the command is as it was
    assert f"sfumato train {path}" in capsys.readouterr().out
    assert main(["init", str(tmp_path / "mine")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "other"), "--preset", "nothing"]) == 2
    assert "there is no packaged config 'nothing'; there are clips, compositions, demo" in capsys.readouterr().err


def test_an_unknown_config_names_the_packaged_ones(capsys):
    assert main(["train", "nothing"]) == 2
    error = capsys.readouterr().err
    assert "no config file at nothing" in error and "demo" in error and "folder_cpu" in error


def test_the_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "sfumato", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"sfumato {__version__}"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_verbs(capsys, shell):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("train", "init", "sample", "evaluate", "doctor"))


def test_a_clone_in_the_working_folder_does_not_hide_the_package(tmp_path):
    (tmp_path / "sfumato").symlink_to(ROOT)
    code = (
        "import sfumato, sfumato.registries; from sfumato.training.config.load import config_names; print(sfumato.__version__)"
    )
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == __version__, done.stderr


STOCK = """
import sys, torch
from diffusers import DiffusionPipeline
assert "sfumato" not in sys.modules
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe("red heart", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0]
assert image.size == (32, 32) and "sfumato" not in sys.modules
"""


@pytest.mark.slow
def test_a_wheel_in_a_fresh_environment_trains_draws_and_shares(tmp_path):
    """With `[openmoji]` only. The size is printed: `pytest --slow -s`."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(ROOT)]
    config = tmp_path / "build.cfg"
    config.write_text(f"[build]\nbuild_base = {tmp_path / 'build'}\n")
    subprocess.run(build, check=True, env={**os.environ, "DIST_EXTRA_CONFIG": str(config)})
    (wheel,) = tmp_path.glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    assert wheel.stat().st_size < 40e6  # three models
    venv.create(tmp_path / "env", with_pip=True)
    bin_folder, work = tmp_path / "env" / "bin", tmp_path / "work"
    work.mkdir()
    constraints = str(ROOT / "constraints.txt")
    install = [str(bin_folder / "pip"), "install", "-q", "-c", constraints, f"{wheel}[openmoji]"]
    subprocess.run(install, check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ACCELERATE"))}
    env |= {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*command):
        return subprocess.run([str(c) for c in command], cwd=work, env=env, capture_output=True, text=True)

    sfumato = bin_folder / "sfumato"
    for command in (
        ("sample", "red heart", "--steps", "4"),
        ("init", "mine"),
        ("train", "demo", "train.max_steps=3", "validation.num_inference_steps=2", "output_dir=runs/demo"),
        ("sample", "red heart", "--model", "runs/demo", "--steps", "2", "--out", "own.png"),
        ("evaluate", "--help"),
    ):
        done = run(sfumato, *command)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    assert (work / "grid.png").is_file() and (work / "own.png").is_file() and (work / "mine" / "config.yaml").is_file()
    launched = run(
        bin_folder / "accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "-m", "sfumato.training.train", "demo", "train.max_steps=1", "output_dir=runs/launched",
        "validation.num_inference_steps=1",
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-2000:]
    (shipped,) = (tmp_path / "env/lib").glob("python*/site-packages/sfumato/models/openmoji")
    for folder in ("runs/demo/pipeline", shipped):
        stock = run(bin_folder / "python", "-c", STOCK, folder)
        assert stock.returncode == 0, stock.stderr[-2000:]
    (metadata,) = (tmp_path / "env/lib").glob("python*/site-packages/sfumato-*.dist-info/METADATA")
    assert "CC-BY-SA-4.0" in metadata.read_text()
