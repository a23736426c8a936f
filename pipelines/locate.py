"""Where a model is: in a run folder, a checkpoint, an exported folder, on the Hub, or in the package itself."""

from importlib.resources import files
from pathlib import Path

SHIPPED = "openmoji"  # the model that comes with the package


def locate_pipeline(source: str) -> str:
    """The pipeline in a run folder or checkpoint (the one written last), the shipped model, or the folder or Hub id itself.

    Raises:
        ValueError: there is no model.
    """
    folder = Path(source)
    if source == SHIPPED and not folder.exists():
        return str(shipped_model())
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return str(folder)
        inside = [folder / "pipeline", *sorted(folder.glob("checkpoints/step-*/pipeline"))]
        if found := [path for path in inside if (path / "model_index.json").is_file()]:
            return str(max(reversed(found), key=lambda path: (path / "model_index.json").stat().st_mtime))
        raise ValueError(f"{source} holds no model: no model_index.json in it, in its pipeline/ or in its checkpoints")
    if folder.is_absolute() or source.startswith(".") or source.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(f"there is no folder {source}")
    return source


def shipped_model() -> Path:
    """The folder of the model that comes with the package.

    Raises:
        ValueError: the package was installed without it.
    """
    folder = Path(str(files("sfumato") / "models" / SHIPPED))
    if not (folder / "model_index.json").is_file():
        raise ValueError("the packaged model is not here; name another one")
    return folder
