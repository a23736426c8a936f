"""The tutorials run from the first cell to the last, with fewer steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


COSTLY = ("from-noise-to-emoji", "make-it-fast")  # a minute of a processor each


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in COSTLY), id=path.stem) for path in TUTORIALS]
)
def test_a_tutorial_runs_as_it_is_written(path, tmp_path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4 and all("outputs" not in cell or not cell["outputs"] for cell in notebook["cells"])
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 5
    (tmp_path / "tutorial.py").write_text("\n\n".join(code))
    environment = {**os.environ, "SFUMATO_TUTORIAL_STEPS": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "tutorial.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_a_tutorial_leads_to_exists():
    assert len(TUTORIALS) == 5
    for path in TUTORIALS:
        for cell in json.loads(path.read_text())["cells"]:
            for target in re.findall(r"\]\(([^)#:\s]+)\)", "".join(cell["source"])) if cell["cell_type"] == "markdown" else []:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
