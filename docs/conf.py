"""The handbook: `make docs` builds it offline into `docs/_build/html`, treating every warning as an error."""

import sys
from pathlib import Path

from docutils import nodes

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]

import generate  # noqa: E402

import sfumato  # noqa: E402

project = "Sfumato"
author = "The Sfumato authors"
copyright = "The Sfumato authors, Apache-2.0; OpenMoji images CC BY-SA 4.0"  # noqa: A001  (Sphinx's name for it)
version = release = sfumato.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "Sfumato"
html_show_sourcelink = False
default_role = "literal"  # as docstrings here use single backticks
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!sfumato\.).*")]  # names of other packages, which have handbooks of their own
autodoc_typehints = "none"
autodoc_member_order = "bysource"


def test_role(name, rawtext, text, lineno, inliner, options=None, content=None):
    """`file.py::test_name`, which must exist."""
    file, _, function = text.partition("::")
    path = FOLDER.parent / "tests" / file
    if not path.is_file() or f"def {function}(" not in path.read_text(encoding="utf-8"):
        message = inliner.reporter.warning(f"there is no test {text}", line=lineno)
        return [inliner.problematic(rawtext, rawtext, message)], [message]
    return [nodes.literal(text, f"tests/{text}")], []


def setup(app):
    """Write the generated pages, and add the role with which a page names a test."""
    app.add_role("test", test_role)
    app.connect("builder-inited", lambda app: generate.main())
