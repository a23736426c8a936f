"""From YAML and the command line to a config, with OmegaConf, which is used only here."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sfumato.registries import CODECS, METRICS, SOURCES, TASKS, load_object
from sfumato.training.config.rules import check, named_source, read_key, settings_without_effect
from sfumato.training.config.schema import Config, DataConfig


def config_class() -> type[Config]:
    """`Config` with the sections that entries of the registries mount, including those of installed packages.

    Raises:
        ValueError: two entries mount different sections under the same name.
    """
    sections: dict[str, type] = {}
    for registry in (SOURCES, TASKS, METRICS, CODECS):
        for name, entry in registry.items():
            if entry.settings is not None:
                section, kind = entry.section or name, load_object(entry.settings)
                if section in {f.name for f in fields(Config)} or sections.get(section, kind) is not kind:
                    raise ValueError(f"the {registry.kind} {name!r} mounts a section {section!r}, which already exists")
                sections[section] = kind
    return _mount(tuple(sections.items()))


@cache  # so that two configs with the same sections can be equal
def _mount(sections: tuple[tuple[str, type], ...]) -> type[Config]:
    mounted = [(section, kind, field(default_factory=kind)) for section, kind in sections]
    return make_dataclass("Config", mounted, bases=(Config,))


def config_names() -> list[str]:
    """The names, without ending, of the configs that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _packaged().iterdir() if path.name.endswith(".yaml"))


def config_text(name: str) -> str:
    """The YAML of a packaged config.

    Raises:
        ValueError: there is no config of this name.
    """
    if name not in config_names():
        raise ValueError(f"there is no packaged config {name!r}; there are {', '.join(config_names())}")
    return (_packaged() / f"{name}.yaml").read_text(encoding="utf-8")


def _packaged():
    return files("sfumato") / "configs"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or the packaged config of that name, and `key.subkey=value` overrides.

    Warns about settings that have no effect.

    Raises:
        ValueError: missing file, unknown key, wrong type, or a value that `rules.check` rejects.
    """
    if bad := [item for item in overrides if "=" not in item]:
        raise ValueError(f"expected key=value, got {', '.join(bad)}")
    names = list(dict.fromkeys(item.partition("=")[2] for item in overrides if item.startswith("data.name=")))
    if len(names) > 1:
        raise ValueError(
            f"data.name is given twice, as {names[0]} and {names[1]}; put patterns such as"
            " 'data.name=shards/{000..127}.tar' in quotes, or the shell replaces them by many settings"
        )
    try:
        if Path(path).is_file():
            text = Path(path).read_text(encoding="utf-8-sig")
        elif str(path) in config_names():
            text = config_text(str(path))
        elif (Path(path) / "config.yaml").is_file():  # the folder of a run
            text = (Path(path) / "config.yaml").read_text(encoding="utf-8-sig")
        else:
            names = ", ".join(config_names())
            raise ValueError(f"there is no config file at {path}, and no packaged config of this name; there are {names}")
        layers = [_typed(text), _command_line(overrides)]
        _check_keys(layers)
        config = _merge(layers, overrides)
    except (OmegaConfBaseException, YAMLError, TypeError) as error:  # caught first, as some of OmegaConf's are ValueErrors
        raise ValueError(f"{path}: {str(error).splitlines()[0]} (key: {getattr(error, 'full_key', '?')})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check(config)
    for line in settings_without_effect(config):
        warnings.warn(line, stacklevel=2)
    return config


@cache
def _leaves(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> annotation of every setting."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        found |= _leaves(hint, f"{prefix}{name}.") if is_dataclass(hint) else {f"{prefix}{name}": hint}
    return found


def _is_text(hint) -> bool:
    """Whether a setting is a string or one of several strings, so that its value is taken exactly as written."""
    return hint is str or get_origin(hint) is Literal or any(_is_text(part) for part in _alternatives(hint))


def _alternatives(hint) -> tuple:
    """The members of a union such as `str | None`."""
    return get_args(hint) if type(None) in get_args(hint) else ()


def _typed(text: str) -> DictConfig:
    """A file, with strings kept as written: `007`, `1e3`, `yes` and `2024-01-01` stay strings if the setting is a string."""
    layer: Any = OmegaConf.create(text)
    if not isinstance(layer, DictConfig):
        raise ValueError("the file holds no settings (key: value)")
    written = yaml.load(text, yaml.BaseLoader)  # noqa: S506  (reads all scalars as strings and constructs nothing)
    for key, hint in _leaves(config_class()).items():
        value = OmegaConf.select(layer, key, throw_on_missing=False)
        if value is not None and (_is_text(hint) or hint == list[str]):
            raw: Any = written
            for part in key.split("."):
                raw = raw.get(part) if isinstance(raw, dict) else None
            if isinstance(raw, str) if _is_text(hint) else _is_texts(raw):
                OmegaConf.update(layer, key, raw, merge=False)
    return layer


def _is_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _command_line(overrides: Sequence[str]) -> DictConfig:
    """`key=value` items; a string is taken as written, without surrounding quotes, and `null` as None if that is allowed."""
    hints = _leaves(config_class())
    layer = OmegaConf.create({})
    for item in overrides:
        key, _, value = item.partition("=")
        hint = hints.get(key)
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        if hint == list[str] and _is_texts(texts := yaml.load(value, yaml.BaseLoader)):  # noqa: S506
            OmegaConf.update(layer, key, texts)
        elif hint is not None and _is_text(hint) and not (value in ("null", "~") and type(None) in get_args(hint)):
            OmegaConf.update(layer, key, yaml.safe_load(value) if quoted else value)
        else:
            layer = OmegaConf.merge(layer, OmegaConf.from_dotlist([item]))
    return layer  # pyright: ignore[reportReturnType]


def _check_keys(layers: list[DictConfig]) -> None:
    """Raise ValueError for an unknown key, suggesting the nearest known one."""
    known = _leaves(config_class())
    for layer in layers:
        for key in _keys(OmegaConf.to_container(layer), set(known)):
            sections = {name.rpartition(".")[0] for name in known} - {""}
            if key in known or key in sections:
                continue
            near = get_close_matches(key, [*known, *sections], 1, 0.75)
            section, _, name = key.rpartition(".")
            near = near or [full for full in known if full.rpartition(".")[2] == name][:1]
            there = ", ".join(full.removeprefix(f"{section}.") for full in known if full.rpartition(".")[0] == section)
            raise ValueError(f"there is no setting {key}; " + (f"did you mean {near[0]}?" if near else f"there are {there}"))


def _keys(content, leaves: set[str], prefix: str = "") -> list[str]:
    """The dotted keys in nested dicts, down to the level of settings."""
    found = []
    for name, value in content.items() if isinstance(content, dict) else ():
        key = f"{prefix}{name}"
        found += [key] if key in leaves or not isinstance(value, dict) or not value else _keys(value, leaves, f"{key}.")
    return found


@cache
def _defaults(kind: Any) -> DictConfig:
    """The defaults of all settings of a config class; merging copies them."""
    return OmegaConf.structured(kind())


def _merge(layers: list, overrides: Sequence[str]) -> Config:
    """The default config, overridden by the file and then by the command line."""
    for layer in layers:
        for key in ("train.mixed_precision", "train.compile"):
            if str(OmegaConf.select(layer, key)).lower() in ("false", "off"):
                OmegaConf.update(layer, key, "no")
    if any("${" in OmegaConf.to_yaml(layer) for layer in layers):
        raise ValueError("values of the form ${...} are not read; in an untrusted file they could name your secrets")
    for item in overrides:
        key, _, value = item.partition("=")
        if value in ("{}", "null") and isinstance(OmegaConf.select(layers[0], key), DictConfig):
            OmegaConf.update(layers[0], key, {}, merge=False)  # settings of it on the command line stay
            if OmegaConf.select(layers[-1], key) is None:
                OmegaConf.update(layers[-1], key, {}, merge=False)
    merged = OmegaConf.merge(_defaults(config_class()), *layers)
    config: Any = OmegaConf.to_object(merged)
    _check_items(config)
    return config


def _check_items(config: Config) -> None:
    """Raise ValueError for list items of the wrong type and for numbers that are not finite."""
    for key, hint in _leaves(type(config)).items():
        value = read_key(config, key)
        if not _fits(value, hint):
            raise ValueError(f"{key}={value!r}: must be {_describe(hint)}, with finite numbers")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value fits a type annotation, including the items of lists; numbers must be finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if alternatives := _alternatives(hint):
        return any(_fits(value, part) for part in alternatives)
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return value in parts
    if kind is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if kind is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(_fits, value, parts))
    if kind is dict or hint is Any:
        return all(_fits(item, Any) for item in value.values()) if isinstance(value, dict) else True
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _describe(hint) -> str:
    """A type annotation in words."""
    return str(hint).replace("<class '", "").replace("'>", "").replace("typing.", "").replace("NoneType", "null")


def default_config(data: DataConfig | None = None) -> Config:
    """The default config, with the sections that entries mount."""
    config = config_class()()
    if data is not None:
        config.data = data
    return config


def settings_of(config: Config) -> dict:
    """The config as nested dicts, without the sections of entries that it neither uses nor changes.

    A run of one task can therefore be read where a package that adds another task is not installed.
    """
    settings, own = asdict(config), {f.name for f in fields(Config)}
    in_use = {config.task, TASKS[config.task].section, named_source(config)}
    for f in fields(config):
        if f.name not in own | in_use and getattr(config, f.name) == type(getattr(config, f.name))():
            del settings[f.name]
    return settings


def dump_config(config: Config) -> str:
    """The whole config as YAML, sufficient to repeat the run; see `settings_of`."""
    return yaml.safe_dump(settings_of(config), sort_keys=False, allow_unicode=True)
