"""Pages of the handbook that are made from the code: every setting, every command, the measured tables."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path

from sfumato.cli import parser
from sfumato.registries import GUIDERS, METRICS, SAMPLERS, SOURCES, TASKS
from sfumato.training.config.comments import sections

FOLDER = Path(__file__).parent / "reference"


def settings_page() -> str:
    """Every setting of a config, by section."""
    lines = ["# Settings", "", "Every key of a config. Any can be set on the command line: `train.max_steps=100`.", ""]
    for section in sections():
        lines += [f"## {section.name or 'At the top'}", "", *([section.words, ""] if section.words else [])]
        lines += ["| setting | default | |", "|---|---|---|"]
        for setting in section.settings:
            words = setting.words.replace("|", "\\|")
            lines.append(f"| `{setting.key}` | `{setting.default}` | {words} |")
        lines.append("")
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
