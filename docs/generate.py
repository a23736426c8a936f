"""Pages of the handbook that are generated from the code: every setting, every command, the measured tables."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from sfumato.cli import parser
from sfumato.registries import GUIDERS, METRICS, SAMPLERS, SOURCES, TASKS
from sfumato.training.config.comments import sections

FOLDER = Path(__file__).parent / "reference"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MAX_ROWS = 40


def settings_page() -> str:
    """Every setting of a config, by section."""
    lines = ["# Settings", "", "Every key of a config. Each can be set on the command line: `train.max_steps=100`.", ""]
    for section in sections():
        lines += [f"## {section.name or 'Top level'}", "", *([section.words, ""] if section.words else [])]
        lines += ["| setting | default | |", "|---|---|---|"]
        for setting in section.settings:
            words = setting.words.replace("|", "\\|")
            lines.append(f"| `{setting.key}` | `{setting.default}` | {words} |")
        lines.append("")
    lines += ["## Names", "", "| setting | possible values |", "|---|---|"]
    for key, registry in (
        ("task", TASKS),
        ("data.name, besides folders, files and Hub ids", {n: s for n, s in SOURCES.items() if s.named}),
        ("validation.sampler", SAMPLERS),
        ("validation.guider", {name: guider for name, guider in GUIDERS.items() if not guider.weak}),
        ("metrics of `sfumato evaluate`", METRICS),
    ):
        lines.append(f"| {key} | {', '.join(f'`{name}`' for name in registry)} |")
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """The help of every verb."""
    lines = ["# Commands", "", "Exit codes of a training run: [Long runs](../guide/running.md).", ""]
    os.environ["COLUMNS"] = "100"
    top = parser()
    verbs = next(action for action in top._actions if getattr(action, "choices", None) and action.dest == "verb")
    for name, verb in verbs.choices.items():  # pyright: ignore[reportOptionalMemberAccess]
        text = io.StringIO()
        with redirect_stdout(text):
            verb.print_help()  # as wide as COLUMNS says
        lines += [f"## sfumato {name}", "", "```text", text.getvalue().rstrip(), "```", ""]
    return "\n".join(lines)


def figures_page() -> str:
    """Every file in `benchmarks/results`, as a table of its figures, with the script that wrote it."""
    scripts = {path: path.read_text(encoding="utf-8") for path in sorted(BENCHMARKS.rglob("*.py"))}
    lines = [
        "# All figures",
        "",
        "The contents of `benchmarks/results`, as measured. [Measured](../measured.md) explains what they mean.",
        "",
    ]
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        lines += [f"## {path.stem.replace('_', ' ')}", ""]
        written = f"`benchmarks/results/{path.name}`"
        if script := next((script for script, text in scripts.items() if f"/{path.name}" in text), None):
            about = scripts[script].split('"""')[1].strip().splitlines()[0]
            written += f", by `{script.relative_to(BENCHMARKS.parent)}`: {about}"
        rows = list(_leaves(json.loads(path.read_text(encoding="utf-8"))))
        lines += [written, "", "| | |", "|---|---|"]
        lines += [f"| {name.replace('|', '/')} | {str(value).replace('|', '/')} |" for name, value in rows[:MAX_ROWS]]
        lines += ["", f"And {len(rows) - MAX_ROWS} more in the file.", ""] if len(rows) > MAX_ROWS else [""]
    return "\n".join(lines)


def _leaves(content, name: str = "") -> Iterator[tuple[str, object]]:
    """The numbers and texts of a JSON file with the path to each; a list of numbers is one, and so are those of one name."""
    if isinstance(content, dict) and name and not any(isinstance(value, dict | list) for value in content.values()):
        yield name, "; ".join(f"{key} {_short(value)}" for key, value in content.items())
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, f"{name}, {key}" if name else key)
    elif isinstance(content, list) and any(isinstance(value, dict | list) for value in content):
        for number, value in enumerate(content):
            yield from _leaves(value, f"{name} {number + 1}".strip())
    else:
        yield name, ", ".join(map(_short, content)) if isinstance(content, list) else _short(content)


def _short(value) -> str:
    """A number in four digits, or as many as it has before the decimal point."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "settings.md").write_text(settings_page(), encoding="utf-8")
    (FOLDER / "commands.md").write_text(commands_page(), encoding="utf-8")
    (FOLDER / "figures.md").write_text(figures_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
