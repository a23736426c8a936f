"""YAML and the command line to a config, by OmegaConf, which is known here only."""

import warnings
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sfumato.training.config.schema import Config


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and `key.subkey=value` overrides; warns of settings without effect.

    Raises:
        ValueError: file missing, unknown key, wrong type, or a value that `rules.check` refuses.
    """
    if not Path(path).is_file():
        raise ValueError(f"no config file at {path}; configs/*.yaml hold examples")
    if bad := [item for item in overrides if "=" not in item]:
        raise ValueError(f"expected key=value, got {', '.join(bad)}")
    try:
        given = [OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))]
        if any("${" in OmegaConf.to_yaml(layer) for layer in given):
            raise ValueError(f"{path}: values of the form ${{...}} are not read; a stranger's could name secrets of yours")
        for layer in given:
            for key in ("train.mixed_precision", "train.compile"):
                if OmegaConf.select(layer, key) is False:  # what YAML makes of a bare no
                    OmegaConf.update(layer, key, "no")
        for key in [key for key, _, value in (item.partition("=") for item in overrides) if value in ("{}", "null")]:
            if isinstance(OmegaConf.select(given[0], key), DictConfig):  # a section of the file that is to be empty
                OmegaConf.update(given[0], key, {}, merge=False)
                OmegaConf.update(given[1], key, {}, merge=False)
        merged = OmegaConf.merge(OmegaConf.structured(Config), *given)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]} (key: {getattr(error, 'full_key', '?')})") from error
    from sfumato.training.config.rules import check, idle

    check(config)
    for line in idle(config):
        warnings.warn(line, stacklevel=2)
    return config


def dump_config(config: Config) -> str:
    """The whole config as YAML, enough to repeat the run."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
