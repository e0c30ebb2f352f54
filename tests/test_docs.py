"""The pages: their code prints what they say, their links lead to files, every name is on one."""

import contextlib
import io
import re
import sys
import types
from pathlib import Path

import pytest

import quantkit
from quantkit.operators import OPERATORS, schemas

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md")])
CODE = {p: re.findall(r"```python\n(.*?)```", p.read_text(), re.DOTALL) for p in PAGES}
INSTALLATION = ROOT / "docs" / "installation.md"
sys.path.insert(0, str(ROOT / "tools"))

import api_page  # noqa: E402


@pytest.mark.parametrize("page", [p for p in PAGES if CODE[p] and p.name != "README.md"], ids=str)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in CODE[page]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, names)
        if expected := re.findall(r"^# prints (.*)$", block, re.MULTILINE):
            assert printed.getvalue().splitlines() == expected


def test_every_public_name_is_in_all_and_on_one_page():
    public = {
        name
        for name, value in vars(quantkit).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    later = {name for name, module in quantkit._LATER.items() if module}
    assert public | later | {"reference"} == set(quantkit.__all__)
    headings = re.findall(
        r"^## quantkit\.(\w+)$", "\n".join(p.read_text() for p in PAGES), re.MULTILINE
    )
    modules = [module.__name__.partition(".")[2] for module in api_page.MODULES]
    assert sorted(headings) == sorted([*quantkit.__all__, *modules])
    page = api_page.PAGE.read_text()
    for module in api_page.MODULES:
        for name in module.__all__:
            assert f"### {module.__name__}.{name}\n" in page or hasattr(quantkit, name), name


def test_the_api_page_is_that_of_the_docstrings():
    assert api_page.PAGE.read_text() == api_page.page(), "run python tools/api_page.py"


def test_every_schema_is_documented():
    page = (ROOT / "docs" / "operators.md").read_text()
    for name in (name for name in OPERATORS if not name.startswith("_")):
        assert f"## {name}" in page and schemas(name)[0] in page, name


def test_every_environment_variable_is_documented():
    sources = [*ROOT.glob("quantkit/*.py"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]
    pattern = r'(?:environ\.get|getenv|is_set)\("([A-Z_]+)"'
    used = {name for path in sources for name in re.findall(pattern, path.read_text())}
    assert {"QUANTKIT_ISA", "QUANTKIT_REFERENCE", "QUANTKIT_HUGEPAGES", "FORCE_CPU"} <= used
    page = INSTALLATION.read_text()
    assert [name for name in sorted(used) if f"`{name}" not in page] == []


def test_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not target.startswith("https://"):
                assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


def test_files_that_pages_name_are_there():
    folders = r"(?:csrc|quantkit|tests|proof|benchmarks|tools|examples|docs)"
    for page in PAGES:
        for name in re.findall(rf"`({folders}/[\w/.]+\.(?:py|h|cpp|cu|cuh|md))`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_tests_that_pages_name_are_there():
    there = "\n".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in there, f"{page.name}: {name}"


def test_every_page_is_reached_from_another():
    linked = {
        Path(target).name
        for page in PAGES
        for target in re.findall(
            r"\]\(([^)\s]+\.md)\)|^\[\w+\]: (\S+\.md)$", page.read_text(), re.M
        )
        for target in target
        if target
    }
    for page in ROOT.glob("docs/*.md"):
        assert page.name in linked, page.name
