"""Python takes a clone of this repository in the working folder for a package of that name; hand over to the real one."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent / "sfumato"
__path__ = [str(_PACKAGE)]
exec((_PACKAGE / "__init__.py").read_text(encoding="utf-8"))
