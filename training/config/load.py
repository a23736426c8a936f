"""YAML and the command line to a config, by OmegaConf, which is known here only."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, field, fields, make_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sfumato.registries import CODECS, METRICS, SOURCES, TASKS, load_object
from sfumato.training.config.rules import check, named_source, settings_without_effect
from sfumato.training.config.schema import Config, DataConfig


def config_class() -> type[Config]:
    """`Config` with the sections that entries of the registries mount, installed packages' included.

    Raises:
        ValueError: two entries mount different sections under one name.
    """
    sections: dict[str, type] = {}
    for registry in (SOURCES, TASKS, METRICS, CODECS):
        for name, entry in registry.items():
            if entry.settings is not None:
                section, kind = entry.section or name, load_object(entry.settings)
                if section in {f.name for f in fields(Config)} or sections.get(section, kind) is not kind:
                    raise ValueError(f"the {registry.kind} {name!r} mounts a section {section!r}, which there is already")
                sections[section] = kind
    return _mount(tuple(sections.items()))


@cache  # so that two configs with the same sections can be equal
def _mount(sections: tuple[tuple[str, type], ...]) -> type[Config]:
    mounted = [(section, kind, field(default_factory=kind)) for section, kind in sections]
    return make_dataclass("Config", mounted, bases=(Config,))


def config_names() -> list[str]:
    """The bare names of the configs that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _packaged().iterdir() if path.name.endswith(".yaml"))


def config_text(name: str) -> str:
    """The YAML of a packaged config.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in config_names():
        raise ValueError(f"there is no packaged config {name!r}; there are {', '.join(config_names())}")
    return (_packaged() / f"{name}.yaml").read_text(encoding="utf-8")


def _packaged():
    return files("sfumato") / "configs"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or the packaged config of that bare name, and `key.subkey=value` overrides.

    Warns of settings without effect.

    Raises:
        ValueError: file missing, unknown key, wrong type, or a value that `rules.check` refuses.
    """
    if bad := [item for item in overrides if "=" not in item]:
        raise ValueError(f"expected key=value, got {', '.join(bad)}")
    try:
        if Path(path).is_file():
            layers = [OmegaConf.load(path)]
        elif str(path) in config_names():
            layers = [OmegaConf.create(config_text(str(path)))]
        else:
            names = ", ".join(config_names())
            raise ValueError(f"there is no config file at {path}, and no packaged config of this name: {names}")
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        config = _merge(layers, overrides)
    except (OmegaConfBaseException, YAMLError, TypeError) as error:  # first: some of OmegaConf's are ValueErrors
        raise ValueError(f"{path}: {str(error).splitlines()[0]} (key: {getattr(error, 'full_key', '?')})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check(config)
    for line in settings_without_effect(config):
        warnings.warn(line, stacklevel=2)
    return config


def _merge(layers: list, overrides: Sequence[str]) -> Config:
    """The default config under the file under the command line."""
    if any("${" in OmegaConf.to_yaml(layer) for layer in layers):
        raise ValueError("values of the form ${...} are not read; a stranger's could name secrets of yours")
    for layer in layers:
        for key in ("train.mixed_precision", "train.compile"):
            if OmegaConf.select(layer, key) is False:  # what YAML makes of a bare no
                OmegaConf.update(layer, key, "no")
    for item in overrides:
        key, _, value = item.partition("=")
        if value in ("{}", "null") and isinstance(OmegaConf.select(layers[0], key), DictConfig):
            for layer in layers:  # a section of the file that is to be empty
                OmegaConf.update(layer, key, {}, merge=False)
    merged = OmegaConf.merge(OmegaConf.structured(config_class()), *layers)
    return OmegaConf.to_object(merged)  # pyright: ignore[reportReturnType]


def default_config(data: DataConfig | None = None) -> Config:
    """All defaults, with the sections that entries mount."""
    config = config_class()()
    if data is not None:
        config.data = data
    return config


def settings_of(config: Config) -> dict:
    """The config as nested dicts, without the sections of entries that it neither names nor changes.

    So a run of one task can be read where a package that adds another one is not installed.
    """
    settings, own = asdict(config), {f.name for f in fields(Config)}
    in_use = {config.task, TASKS[config.task].section, named_source(config)}
    for f in fields(config):
        if f.name not in own | in_use and getattr(config, f.name) == type(getattr(config, f.name))():
            del settings[f.name]
    return settings


def dump_config(config: Config) -> str:
    """The whole config as YAML, enough to repeat the run; see `settings_of`."""
    return OmegaConf.to_yaml(OmegaConf.create(settings_of(config)))
