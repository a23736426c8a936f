"""Parts of pretrained models: from a whole pipeline, or from a folder or repository with that part alone."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from sfumato.pipelines.trust import UNREAD, check_part
from sfumato.training.config.load import config_names, config_text


def load_part(cls: type, key: str, source: str, part: str, **arguments):
    """The model `part` of a whole pipeline, or of a folder or repository with only that model; and which of the two it was.

    Only safetensors are opened: a pickle can run code. Sizes are checked first, see `trust.check_part`.

    Raises:
        ValueError: neither exists, or it must not be opened; names the setting `key`.
    """
    check_predecessor(key, source)
    try:
        folder = Path(source) if Path(source).is_dir() else _download(source, part)
        whole = (folder / part / "config.json").is_file()
        folder = folder / part if whole else folder
        library = "diffusers" if hasattr(cls, "load_config") else "transformers"
        check_part(folder, (library, cls.__name__))
        return cls.from_pretrained(folder, use_safetensors=True, **arguments), whole
    except (OSError, ValueError, SafetensorError, HfHubHTTPError) as error:
        raise ValueError(f"{key}={source!r} cannot be opened: {str(error).strip().splitlines()[0]}") from error


def _download(source: str, part: str) -> Path:
    wanted = [f"{part}/*", "*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=UNREAD))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"there is no such folder, and the Hub has none: {error}") from error


def check_predecessor(key: str, source: str) -> None:
    """Raise ValueError for the result of a packaged config that has not been trained yet, with the command that trains it."""
    if Path(source).exists():
        return
    for name in config_names():
        lines = config_text(name).splitlines()
        folder = next((line.partition(":")[2].strip() for line in lines if line.startswith("output_dir:")), None)
        if folder and (source == folder or source.startswith(f"{folder}/")):
            raise ValueError(f"{key}={source!r} is not there yet; train it first:  sfumato train {name}")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{key}={source!r} cannot be opened: there is no such folder")
