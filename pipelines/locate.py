"""Where a model is: in a run folder, a checkpoint, an exported folder, on the Hub, or in the package itself."""

from importlib.resources import files
from pathlib import Path

# The models that come with the package: emoji at 32 pixels, at 128, and at 128 in four steps.
PACKAGED = ("openmoji", "openmoji_128", "openmoji_128_few")
DEFAULT = "openmoji_128"  # used if no model is named


def locate_pipeline(source: str) -> str:
    """The latest pipeline in a run folder or checkpoint, a packaged model, or the folder or Hub id itself.

    Raises:
        ValueError: there is no model.
    """
    folder = Path(source)
    if source in PACKAGED and not folder.exists():
        return str(packaged_model(source))
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return str(folder)
        inside = [folder / "pipeline", *sorted(folder.glob("checkpoints/step-*/pipeline"))]
        if found := [path for path in inside if (path / "model_index.json").is_file()]:
            return str(max(reversed(found), key=lambda path: (path / "model_index.json").stat().st_mtime))
        raise ValueError(f"{source} contains no model: no model_index.json in it, in its pipeline/ or in its checkpoints")
    if folder.is_absolute() or source.startswith(".") or source.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(f"there is no folder {source}")
    return source


def packaged_model(name: str = DEFAULT) -> Path:
    """The folder of a model that comes with the package.

    Raises:
        ValueError: the package was installed without it.
    """
    folder = _packaged_folder(name)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"the packaged model {name} is not installed; name another one")
    return folder


def is_packaged(folder: Path) -> bool:
    """Whether a folder is one of the models that come with the package."""
    return folder.resolve() in [_packaged_folder(name).resolve() for name in PACKAGED]


def _packaged_folder(name: str) -> Path:
    return Path(str(files("sfumato") / "models" / name))
