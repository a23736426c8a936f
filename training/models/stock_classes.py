"""Arguments of diffusers classes, checked before anything is built from them."""

import inspect
from difflib import get_close_matches

from sfumato.training.config.schema import Config


def check_arguments(arguments: dict, cls: type, section: str) -> None:
    """Raise ValueError for arguments that `cls` does not take."""
    allowed = list(inspect.signature(cls.__init__).parameters)[1:]
    if unknown := set(arguments) - set(allowed):
        near = [match for name in sorted(unknown, key=str) for match in get_close_matches(str(name), allowed, 1, 0.6)]
        hint = f"did you mean {', '.join(near)}?" if near else f"it takes {', '.join(allowed)}"
        raise ValueError(f"{section}: {cls.__name__} has no argument {', '.join(sorted(map(str, unknown)))}; {hint}")


def build_stock(section: str, cls: type, arguments: dict):
    """An object of a stock class; ValueError for values that it cannot be made from, whatever the class raises."""
    try:
        return cls(**arguments)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{section}: {cls.__name__} cannot be made from it: {type(error).__name__}: {error}") from error


def check_contradictions(arguments: dict, derived: dict, section: str, sources: str) -> None:
    """Raise ValueError for arguments that contradict what follows from others; `sources`: such as `data says`."""
    if clash := {key: arguments[key] for key, value in derived.items() if arguments.get(key, value) != value}:
        right = {key: derived[key] for key in clash}
        raise ValueError(f"{section}: {clash} contradicts what {sources}: {right}")


def check_divisible(config: Config, factor: int) -> None:
    """Raise ValueError if an image size is not a multiple of the VAE's factor."""
    for side in (side for size in config.data.buckets or [config.data.size] for side in size):
        if side % factor:
            raise ValueError(f"data.resolution and buckets must be multiples of the VAE's factor {factor}, not {side}")


def lists_to_tuples(arguments: dict) -> dict:
    """Lists as tuples, as diffusers writes its configs."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
