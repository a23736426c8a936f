"""The handbook and the READMEs: what they link exists, what they show runs, and what is made from the code is fresh."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def generated():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_leads_nowhere(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}"


@pytest.mark.parametrize("name", ["theory.md", "zh/theory.md"])
def test_every_equation_has_its_function_and_its_test(name):
    text = (DOCS / name).read_text()
    parts = re.split(r"\(eq-[a-z-]+\)", text)
    assert len(parts) > 15
    for part in parts[1:]:
        assert "{test}`" in part.split("\n$$\n")[0] and ("{py:" in part or "DDIMScheduler" in part)
    for file, function in re.findall(r"\{test\}`([\w.]+)::(\w+)`", text):
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), function


def test_the_code_that_pages_show_is_there():
    pattern = r"(?m)^```\{literalinclude\} (\S+)\n:language: python\n:start-at: '(.+)'\n:end-before: '(.+)'$"
    shown = [(page, *found) for page in PAGES for found in re.findall(pattern, page.read_text())]
    assert len(shown) >= 10
    for page, path, start, end in shown:
        lines = (page.parent / path).read_text().splitlines()
        first = next(i for i, line in enumerate(lines) if start in line)
        assert any(end in line for line in lines[first + 1 :]), f"{page.name}: {path}: {start} ... {end}"


def test_both_languages_have_the_same_equations():
    found = [re.findall(r"\(eq-(?:zh-)?([a-z-]+)\)", (DOCS / name).read_text()) for name in ("theory.md", "zh/theory.md")]
    assert found[0] == found[1]


@pytest.mark.parametrize("pair", [("README.md", "README.zh.md"), ("docs/start.md", "docs/zh/start.md")])
def test_both_languages_have_one_skeleton(pair):
    texts = [(ROOT / name).read_text() for name in pair]
    blocks = [re.findall(r"(?ms)^```.*?^```", text) for text in texts]
    assert blocks[0] == blocks[1]
    plain = [re.sub(r"(?ms)^```.*?^```", "", text) for text in texts]
    for mark in (r"(?m)^(#+) ", r"(?m)^\|", r"!\[[^\]]*\]\(([^)]+)\)"):
        assert re.findall(mark, plain[0]) == re.findall(mark, plain[1]), mark


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 800


def test_ten_lines_of_python_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())
    assert len(code.splitlines()) <= 13
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "heart.png").stat().st_size > 500


def test_every_setting_is_described():
    rows = [line for line in (DOCS / "reference" / "settings.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 120 and not [row for row in rows if row.endswith("|  |")]


def test_generated_pages_are_fresh():
    """`python docs/generate.py` makes them anew."""
    module = generated()
    assert (DOCS / "reference" / "settings.md").read_text() == module.settings_page()
    assert (DOCS / "reference" / "commands.md").read_text() == module.commands_page()
    assert (DOCS / "reference" / "figures.md").read_text() == (page := module.figures_page())
    files = [path.stem.replace("_", " ") for path in (DOCS.parent / "benchmarks" / "results").glob("*.json")]
    assert page.count("\n## ") == len(files) and all(f"\n## {name}\n" in page for name in files)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra docs: make docs")
def test_the_handbook_builds_without_a_warning_and_asks_no_other_machine(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not [address for address in fetched if "shields" in address or address.endswith((".js", ".css"))], page.name
