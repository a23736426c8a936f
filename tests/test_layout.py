"""The package as it ships: what the wheel holds, who may import whom, which names are taken."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipelines", "schedulers", "training")
LINKS = (*FOLDERS, "configs", "models")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OWN = sorted([*(ROOT / "sfumato").glob("*.py"), *(ROOT / "sfumato/app").glob("*.py")])

# From the top down: a room may import those after it, and what is in itself. Rooms on one line do not know one another.
ORDER = (
    ("sfumato.__main__",),
    ("sfumato.cli",),
    ("sfumato.app",),
    ("sfumato.api",),
    ("sfumato.training.train",),
    ("sfumato.training.loop", "sfumato.training.doctor"),
    ("sfumato.training.tasks",),
    ("sfumato.training.engine",),
    ("sfumato.training.quality",),
    ("sfumato.training.publish",),
    ("sfumato.training.data",),
    ("sfumato.training.models",),
    ("sfumato.training.config", "sfumato.training.objectives"),
    ("sfumato.pipelines",),
    ("sfumato.schedulers",),
    ("sfumato.figures",),
    ("sfumato.registries", "sfumato.files"),
)


def module_name(path):
    """`training/data/loader.py` -> `sfumato.training.data.loader`; a package's `__init__.py` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "sfumato" else ("sfumato", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in (*SOURCES, *OWN)}


def imports(path):
    """The modules that a file imports; of `from package import module`, the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"relative import in {path}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


def room(module):
    """The number of the room in `ORDER`, and its name; None for the package itself, which holds the version."""
    for number, rooms in enumerate(ORDER):
        for name in rooms:
            if module == name or module.startswith(f"{name}."):
                return number, name
    return None


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_only_downward(module):
    """Every file, sub-folders too, wherever in the file the import stands."""
    here = room(module)
    for name in imports(MODULES[module]):
        assert name.split(".")[0] not in (*FOLDERS, "configs", "models"), f"{module} imports {name}; say sfumato.{name}"
        there = room(name) if name.startswith("sfumato") else None
        if here and there and here != there:
            assert there[0] > here[0], f"{module} imports {name}, which is not below it"


def test_there_are_no_circles():
    """Rooms apart, within a room as well: files can be read in an order in which each knows only those before it."""
    left = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    while left:
        free = {module for module, needed in left.items() if not needed & left.keys() - {module}}
        assert free, f"these import one another: {', '.join(sorted(left))}"
        left = {module: needed for module, needed in left.items() if module not in free}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(folder),
        str(ROOT),
    ]
    config = folder / "build.cfg"  # elsewhere than build/, which may hold files that are gone
    config.write_text(f"[build]\nbuild_base = {folder / 'build'}\n")
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "DIST_EXTRA_CONFIG": str(config)})
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_tree_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"sfumato/{path.relative_to(ROOT)}" for path in SOURCES} | {str(path.relative_to(ROOT)) for path in OWN}
    expected |= {f"sfumato/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    expected |= {f"sfumato/{path.relative_to(ROOT)}" for path in (ROOT / "models").rglob("*") if path.is_file()}
    fonts = {f"sfumato/fonts/{path.name}" for path in (ROOT / "sfumato/fonts").iterdir()}
    assert names == expected | fonts | {"sfumato/py.typed"}


def test_the_wheel_says_what_it_is(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert "License-Expression: Apache-2.0 AND CC-BY-SA-4.0" in metadata
    for field in ("Author", "Keywords", "Classifier", "Project-URL"):
        assert re.search(rf"^{field}", metadata, flags=re.M), field
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    assert any(name.endswith("licenses/models/LICENSE-CC-BY-SA-4.0") for name in wheel.namelist())


def test_every_import_is_declared():
    """What a file imports is a dependency or in an extra, by its own name, never what another package happens to bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(row for rows in project["optional-dependencies"].values() for row in rows)]
    names = {re.split(r"[<>=\[ ]", row)[0].lower().replace("_", "-") for row in declared}
    distributions = importlib.metadata.packages_distributions()
    for module, path in MODULES.items():
        for name in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "sfumato" or top not in distributions:
                continue
            homes = {home.lower().replace("_", "-") for home in distributions[top]}
            assert homes & names, f"{module} imports {top} of {', '.join(homes)}, which pyproject.toml does not name"


def test_links_serve_the_checkout():
    for folder in LINKS:
        assert (ROOT / "sfumato" / folder).resolve() == ROOT / folder


TRAVELS = {f"schedulers/scheduling_sfumato_{name}.py" for name in ("ddpm", "flow")} | {
    f"pipelines/{name}.py" for name in ("pipeline_sfumato", "trust", "images", "inputs", "conditions", "stock", "guided")
}


@pytest.mark.parametrize("path", sorted(TRAVELS))
def test_what_travels_is_self_contained(path):
    """It imports of ours only what is joined with it into the `pipeline.py` of a shared folder."""
    joined = {module_name(ROOT / other) for other in TRAVELS}
    names = imports(ROOT / path)
    assert {name for name in names if name.startswith("sfumato")} <= joined
    roots = {name.split(".")[0] for name in names} - {"sfumato"}
    assert roots <= {"torch", "numpy", "PIL", "safetensors", "diffusers", "transformers"} | set(sys.stdlib_module_names)


def test_omegaconf_is_known_in_one_file():
    users = {module for module, path in MODULES.items() if any(name.startswith("omegaconf") for name in imports(path))}
    assert users == {"sfumato.training.config.load"}


def test_no_training_module_hides_a_package_of_ours_or_of_python():
    """`accelerate launch training/train.py` puts training/ first on sys.path; train.py takes it off before anything else."""
    source = (ROOT / "training/train.py").read_text()
    assert source.index("sys.path[:]") < source.index("import faulthandler")
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names, path
    banned = {"utils", "helpers", "common", "misc"}
    assert not banned & {path.stem for path in SOURCES}
    assert {path.parent.name for path in SOURCES if path.stem == "base"} <= {"tasks"}


def test_import_and_help_are_instant():
    """Neither the package nor the command line, nor a config that is read and checked, needs torch."""
    code = """
        import contextlib, io, sys, sfumato, sfumato.api, sfumato.cli
        assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            sfumato.cli.main(["--help"])
        sfumato.api.load_config("demo")
        assert not {'torch', 'diffusers'} & set(sys.modules)
    """
    code = "\n".join(line.strip() if "sfumato.cli.main" not in line else "    " + line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.filterwarnings("error")  # such as that a setting has no effect
def test_every_config_loads_by_path_and_by_name():
    from sfumato.training.config.load import config_names, load_config

    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert config_names() == [path.stem for path in paths] and len(paths) >= 3
    for path in paths:
        assert load_config(path) == load_config(path.stem)
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ") and path.name in path.read_text().split("\n\n")[0], f"{path} opens with its command"


def test_the_map_of_the_code_names_every_file_by_its_own_first_words():
    rooms = re.split(r"^### `(.+?)/`", (ROOT / "docs/architecture.md").read_text(), flags=re.M)
    table = {
        Path(room): dict(re.findall(r"^\| `(\w+\.py)` \| (.+) \|$", text, re.M))
        for room, text in zip(rooms[1::2], rooms[2::2])
    }
    told = {room / name: words for room, rows in table.items() for name, words in rows.items()}
    said = {}
    for path in (*SOURCES, *OWN):
        if path.name != "__init__.py":
            words = ast.get_docstring(ast.parse(path.read_text())) or ""
            said[path.relative_to(ROOT)] = words.split("\n\n")[0].replace("\n", " ")
    assert told == said
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme and "make test" in readme
