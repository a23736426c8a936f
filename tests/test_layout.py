"""The package as it ships: what the wheel holds, who may import whom, which names are taken."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipelines", "schedulers", "training")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_wheel_holds_every_module_and_nothing_else(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"sfumato/{path.relative_to(ROOT)}" for path in SOURCES}
    assert names == expected | {"sfumato/__init__.py", "sfumato/cli.py", "sfumato/py.typed"}


def test_links_serve_the_checkout():
    for folder in FOLDERS:
        assert (ROOT / "sfumato" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_go_from_training_to_pipelines_to_schedulers(path):
    rank = {"schedulers": 0, "pipelines": 1, "training": 2}
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in FOLDERS, f"{path} imports {name}; say sfumato.{name}"
        if parts[0] == "sfumato" and len(parts) > 1 and parts[1] in rank:
            assert rank[parts[1]] <= rank[path.parent.name], f"{path} imports {name}"
        assert not re.match(r"sfumato\.(cli|training\.train)$", name), f"{path} imports the entry {name}"


@pytest.mark.parametrize(
    "path",
    [f"schedulers/scheduling_sfumato_{name}.py" for name in ("ddpm", "flow")]
    + [f"pipelines/{name}.py" for name in ("pipeline_sfumato", "trust", "inputs", "conditions", "stock", "guided")],
)
def test_what_travels_is_self_contained(path):
    ours = {name for name in imports(ROOT / path) if name.startswith("sfumato")}
    joined = ("sfumato.schedulers.scheduling_sfumato_",)
    joined += tuple(f"sfumato.pipelines.{name}" for name in ("trust", "inputs", "conditions", "stock", "guided"))
    assert all(name.startswith(joined) for name in ours) and (
        not ours or path in ("pipelines/pipeline_sfumato.py", "pipelines/stock.py")
    )
    roots = {name.split(".")[0] for name in imports(ROOT / path)} - {"sfumato"}
    assert roots <= {"torch", "numpy", "PIL", "safetensors", "diffusers", "transformers"} | set(sys.stdlib_module_names)


def test_config_knows_no_torch_and_omegaconf_is_known_there_only():
    assert not {name.split(".")[0] for name in imports(ROOT / "training/config.py")} & {"torch", "diffusers"}
    users = {path.name for path in SOURCES if any(name.startswith("omegaconf") for name in imports(path))}
    assert users == {"config.py"}


def test_no_training_module_hides_another():
    """`accelerate launch training/train.py` puts training/ first on sys.path."""
    needed = ("accelerate", "diffusers", "huggingface_hub", "numpy", "omegaconf", "torch", "transformers", "tqdm")
    installed = set(importlib.metadata.packages_distributions()) - {"build"}  # pip's front end, which nothing here imports
    assert installed > set(needed)
    for path in (ROOT / "training").glob("*.py"):
        if path.stem != "__init__":
            assert path.stem not in sys.stdlib_module_names
            assert path.stem not in installed, f"training/{path.name} hides an installed package"
    banned = {"utils", "helpers", "common", "base", "misc"}
    assert not banned & {path.stem for path in SOURCES}


def test_sizes_stay_readable():
    limits = {"train": 120, "__call__": 120, "check_inputs": 120, "__init__": 100}
    for path in [*SOURCES, ROOT / "sfumato/cli.py"]:
        source = path.read_text()
        assert len(source.splitlines()) <= 420, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= limits.get(node.name, 60), f"{path}: {node.name} has {length} lines"


def test_import_and_help_are_instant():
    code = "import sys, sfumato, sfumato.cli; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_every_config_in_configs_loads():
    from sfumato.training.config.load import load_config

    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        load_config(path)
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ") and path.name in path.read_text().split("\n\n")[0], f"{path} opens with its command"


def test_readme_names_every_module_and_its_config_keys_exist():
    readme = (ROOT / "README.md").read_text()
    for path in SOURCES:
        if path.name != "__init__.py":
            assert path.name in readme, f"README's tree lacks {path.name}"
    assert "make demo" in readme and "make test" in readme
