"""Pages of the handbook that are made from the code: every setting, every command, the measured tables."""

import ast
import dataclasses
import inspect
import io
import os
import re
from contextlib import redirect_stdout
from pathlib import Path

from sfumato.cli import parser
from sfumato.registries import GUIDERS, METRICS, SAMPLERS, SOURCES, TASKS
from sfumato.training.config import schema
from sfumato.training.tasks import settings as task_settings

FOLDER = Path(__file__).parent / "reference"


def comments(module) -> dict[str, dict[str, str]]:
    """Class -> setting -> the comments before and beside it, of a module of dataclasses."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = found[node.name] = {}
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            first = item.lineno - 1
            before = []
            while lines[first - 1].strip().startswith("#"):
                first -= 1
                before.insert(0, lines[first].strip().lstrip("# "))
            own = lines[item.lineno - 1 : item.end_lineno or item.lineno]
            beside = " ".join(line.partition("  # ")[2] for line in own)
            fields[item.target.id] = " ".join([*before, beside]).strip()
    return found


def section(name: str, cls: type, known: dict[str, dict[str, str]]) -> list[str]:
    """A heading, what the class says of itself, and a table of its settings."""
    lines = [f"## {name}", "", inspect.getdoc(cls) or "", "", "| setting | default | |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            continue
        words = known.get(cls.__name__, {}).get(field.name, "").replace("|", "\\|")
        kind = f"one of {', '.join(map(str, args))}" if (args := _choices(field.type)) else ""
        lines.append(f"| `{name}.{field.name}` | `{_yaml(default)}` | {'; '.join(filter(None, [words, kind]))} |")
    return [*lines, ""]


def _choices(kind) -> list:
    found = re.search(r"Literal\[([^\]]*)\]", str(kind))
    return [part.strip().strip("'") for part in found[1].split(",")] if found else []


def _yaml(value) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def settings_page() -> str:
    """Every setting of a config, by section."""
    known = comments(schema) | comments(task_settings)
    lines = ["# Settings", "", "Every key of a config. Any can be set on the command line: `train.max_steps=100`.", ""]
    top = [f for f in dataclasses.fields(schema.Config) if not dataclasses.is_dataclass(_default(f))]
    lines += ["## At the top", "", "| setting | default | |", "|---|---|---|"]
    for field in top:
        words = known["Config"].get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{_yaml(_default(field))}` | {words} |")
    lines.append("")
    for field in dataclasses.fields(schema.Config):
        if dataclasses.is_dataclass(default := _default(field)):
            lines += section(field.name, type(default), known)
    for name, task in TASKS.items():
        if task.settings:
            cls = getattr(task_settings, task.settings.rpartition(":")[2])
            lines += section(task.section or name, cls, known)
    lines += ["## Names", "", "| setting | may be |", "|---|---|"]
    for key, registry in (
        ("task", TASKS),
        ("data.name, beside folders, files and Hub ids", {n: s for n, s in SOURCES.items() if s.named}),
        ("validation.sampler", SAMPLERS),
        ("validation.guider", GUIDERS),
        ("metrics of `sfumato evaluate`", METRICS),
    ):
        lines.append(f"| {key} | {', '.join(f'`{name}`' for name in registry)} |")
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field):
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def commands_page() -> str:
    """The help of every verb."""
    lines = ["# Commands", "", "Exit codes of a training run: [Leave it alone](../guide/running.md).", ""]
    os.environ["COLUMNS"] = "100"
    top = parser()
    verbs = next(action for action in top._actions if getattr(action, "choices", None) and action.dest == "verb")
    for name, verb in verbs.choices.items():  # pyright: ignore[reportOptionalMemberAccess]
        text = io.StringIO()
        with redirect_stdout(text):
            verb.print_help()  # as wide as COLUMNS says
        lines += [f"## sfumato {name}", "", "```text", text.getvalue().rstrip(), "```", ""]
    return "\n".join(lines)


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "settings.md").write_text(settings_page(), encoding="utf-8")
    (FOLDER / "commands.md").write_text(commands_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
