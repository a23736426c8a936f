"""The structure of a checkout in figures: what a newcomer has to find, and what a reviewer would count.

    git worktree add ../before 2e65cf4
    python -m benchmarks.common.structure before=../before after=. [--out benchmarks/results/structure.json]

Counted over `sfumato`, `pipelines`, `schedulers` and `training`, without tests. An import is upward if it goes to a room
above, by the order of `tests/test_layout.py`; files of the flat layout before 0.2 count towards the room they are in now.
"""

import argparse
import ast
import json
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

ORDER = (
    ("__main__",), ("cli",), ("api",), ("training.train",), ("training.loop", "training.doctor"), ("training.tasks",),
    ("training.engine",), ("training.quality",), ("training.publish",), ("training.data",), ("training.models",),
    ("training.config", "training.objectives"), ("pipelines",), ("schedulers",), ("figures",), ("registries", "files"),
)  # fmt: skip
# Where the files of the flat layout are now.
FLAT = {
    "rules": "config", "build": "models", "autoencoders": "models", "latents": "models", "sources": "data",
    "pictures": "data", "openmoji": "data", "shapes": "data", "autoencoder_task": "tasks", "masks": "tasks", "edges": "tasks",
    "checkpoints": "engine", "ema": "engine", "optimizers": "engine", "tracking": "engine", "best": "engine",
    "evaluation": "quality", "held_out": "quality", "evaluate": "quality", "judge": "quality", "likelihood": "quality",
    "memorisation": "quality", "metrics": "quality", "features": "quality", "facts": "publish", "hub": "publish",
}  # fmt: skip
NAMES = ("text_to_image", "inpainting", "upscaling", "control", "autoencoder", "openmoji", "shapes", "webdataset", "parquet")
# Signatures that are diffusers' own: calls and constructors of its pipelines and schedulers.
STOCK = {"SfumatoPipeline.__init__", "SfumatoPipeline.__call__", "SfumatoDDPMScheduler.__init__"}


def source_files(root: Path) -> dict[str, Path]:
    """Module name without `sfumato.` -> file."""
    files = {}
    for folder in ("pipelines", "schedulers", "training"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in sorted((root / "sfumato").glob("*.py")):
        files[path.stem if path.stem != "__init__" else "sfumato"] = path
    return files


def imported(tree: ast.AST, files: dict[str, Path]) -> Counter:
    """Our modules that a file imports, with how often it does."""
    found = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("sfumato.") in files else node.module for name in inner]
        else:
            continue
        found.update({name.removeprefix("sfumato.") for name in names if name.removeprefix("sfumato.") in files})
    return found


def rank(module: str) -> int | None:
    """The number of a module's room, from the top down."""
    parts = module.split(".")
    if parts[0] == "training" and len(parts) == 2 and parts[1] in FLAT:
        module = f"training.{FLAT[parts[1]]}"
    for number, rooms in enumerate(ORDER):
        if any(module == room or module.startswith(f"{room}.") for room in rooms):
            return number
    return None


def num_circles(graph: dict[str, set[str]]) -> int:
    """The number of modules that are on a circle of imports."""

    def reach(start: str) -> set[str]:
        seen, queue = set(), list(graph[start])
        while queue:
            if (module := queue.pop()) not in seen:
                seen.add(module)
                queue += graph[module]
        return seen

    return sum(module in reach(module) for module in graph)


def long_signatures(tree: ast.AST) -> list[str]:
    """Functions with more than 8 parameters, not counting `self` and `**rest`."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [a.arg for a in (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs)]
                name = f"{prefix}{child.name}"
                if len([a for a in arguments if a not in ("self", "cls")]) > 8 and name not in STOCK:
                    found.append(name)
                name += "."
            elif isinstance(child, ast.ClassDef):
                name = f"{prefix}{child.name}."
            visit(child, name)

    visit(tree, "")
    return found


def lines_with_names(path: Path) -> int:
    """The number of lines of code (no comments or docstrings) that name a task or a source which is not the file's own."""
    lines, before = set(), None
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            is_docstring = token.type == tokenize.STRING and before in (tokenize.INDENT, tokenize.NEWLINE, tokenize.NL, None)
            if token.type in (tokenize.NAME, tokenize.STRING) and not is_docstring:
                words = token.string.lower().replace("_task", "").strip("\"'").replace("=", " ").split()
                if any(word in NAMES and word not in path.stem for word in words):
                    lines.add(token.start[0])
            if token.type not in (tokenize.COMMENT, tokenize.ENCODING):
                before = token.type
    return len(lines)


def num_pyright_errors(root: Path) -> int | None:
    """Errors of `pyright --basic` over the package; None where it is not installed."""
    if shutil.which("pyright") is None:
        return None
    settings = {"include": ["sfumato/*.py", "pipelines", "schedulers", "training"], "reportPrivateImportUsage": False}
    file = root / "structure.pyrightconfig.json"
    file.write_text(json.dumps({**settings, "typeCheckingMode": "basic"}))
    try:
        done = subprocess.run(
            ["pyright", "-p", str(file), "--pythonpath", sys.executable, "--outputjson"], capture_output=True, text=True
        )
    finally:
        file.unlink()
    return json.loads(done.stdout)["summary"]["errorCount"]


def measure(root: Path) -> dict:
    """All figures of a checkout."""
    files = source_files(root)
    trees = {module: ast.parse(path.read_text()) for module, path in files.items()}
    edges = {module: imported(tree, files) for module, tree in trees.items()}
    upward = [
        f"{module} -> {other}"
        for module, others in edges.items()
        for other in others
        if rank(module) is not None and rank(other) is not None and rank(other) < rank(module)
    ]
    folders = Counter(str(path.parent.relative_to(root)) for path in files.values() if path.stem != "__init__")
    num_lines = Counter()
    for path in files.values():
        num_lines[str(path.parent.relative_to(root))] += len(path.read_text().splitlines())
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    packed = [
        node
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and len(node.value.elts) >= 3
        if any(isinstance(target, ast.Tuple) for target in node.targets)
    ]
    return {
        "files": sum(folders.values()),
        "lines": sum(num_lines.values()),
        "folders": {folder: {"files": count, "lines": num_lines[folder]} for folder, count in sorted(folders.items())},
        "most files in one folder": max(folders.values()),
        "upward imports": len(upward),
        "files on a circle of imports": num_circles({module: set(others) - {module} for module, others in edges.items()}),
        "functions with more than 8 parameters": len([n for tree in trees.values() for n in long_signatures(tree)]),
        "tuple assignments of three and more": len(packed),
        "walruses": sum(isinstance(node, ast.NamedExpr) for node in nodes),
        "pyright errors": num_pyright_errors(root),
        "lines that name a task or a source outside of its file": sum(
            lines_with_names(path) for path in files.values() if path.stem != "registries"
        ),
    }


def main() -> None:
    """Measure the checkouts and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", default="benchmarks/results/structure.json")
    options = parser.parse_args()
    figures = {}
    for checkout in options.checkouts:
        name, _, folder = checkout.partition("=")
        figures[name] = measure(Path(folder).resolve())
    Path(options.out).write_text(json.dumps(figures, indent=1) + "\n")
    rows = [key for key in next(iter(figures.values())) if key != "folders"]
    table = [f"| | {' | '.join(figures)} |", "|---" * (1 + len(figures)) + "|"]
    table += [f"| {row} | {' | '.join(str(figures[name][row]) for name in figures)} |" for row in rows]
    folders = sorted({folder for name in figures for folder in figures[name]["folders"]})
    for folder in folders:
        cells = [figures[name]["folders"].get(folder) for name in figures]
        text = [f"{cell['files']} files, {cell['lines']} lines" if cell else "" for cell in cells]
        table.append(f"| `{folder}/` | {' | '.join(text)} |")
    Path(options.out).with_suffix(".md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
