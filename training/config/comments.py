"""What the schema says about each setting: its default and the comments next to it."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sfumato.registries import TASKS, load_object
from sfumato.training.config import schema


@dataclass(frozen=True)
class Setting:
    """One setting of a config.

    Attributes:
        key: the dotted key, such as `train.max_steps`.
        default: as written in YAML.
        words: the comments before and beside it, and its allowed values.
    """

    key: str
    default: str
    words: str


@dataclass(frozen=True)
class Section:
    """Settings that belong together, and the docstring of their class; the first section has no name."""

    name: str
    words: str
    settings: tuple[Setting, ...]


def sections() -> Iterator[Section]:
    """The settings of a config by section, then those that tasks add."""
    parts: list[tuple[str, type]] = [("", schema.Config)]
    parts += [
        (field.name, type(value)) for field in dataclasses.fields(schema.Config) if _is_section(value := default_of(field))
    ]
    parts += [(task.section or name, load_object(task.settings)) for name, task in TASKS.items() if task.settings]
    for name, cls in parts:
        known = _comments(cls)
        settings = []
        for field in dataclasses.fields(cls):
            default = default_of(field)
            if not _is_section(default):
                kind = f"one of {', '.join(choices)}" if (choices := _choices(field.type)) else ""
                words = "; ".join(filter(None, [known.get(field.name, ""), kind]))
                settings.append(Setting(f"{name}.{field.name}".lstrip("."), _yaml(default), words))
        yield Section(name, (inspect.getdoc(cls) or "") if name else "", tuple(settings))


def default_of(field: dataclasses.Field) -> Any:
    """The default of a dataclass field."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _comments(cls: type) -> dict[str, str]:
    """Setting -> the comments before and beside it."""
    lines = inspect.getsource(inspect.getmodule(cls) or cls).splitlines()
    tree, found = ast.parse("\n".join(lines)), {}
    (node,) = (item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == cls.__name__)
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
        found[item.target.id] = " ".join([*before, beside]).strip()
    return found


def _choices(kind) -> list[str]:
    found = re.search(r"Literal\[([^\]]*)\]", str(kind))
    return [part.strip().strip("'") for part in found[1].split(",")] if found else []


def _yaml(value) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
