"""The page says what the other files of this folder compare."""

import re

import tomllib
from lib.rivals import DIFFERING, ROOT, page_rows

SOURCES = "\n".join(p.read_text() for p in ROOT.glob("tests/rivals/test_*.py"))
CHECKED = ("package", "package, x86", "formula", "source")


def checked():
    """The rows of peers, and how each was checked."""
    return {row: cells[-1] for row, cells in page_rows().items() if cells and cells[-1] in CHECKED}


def test_the_page_has_the_numbers_that_differ():
    rows = page_rows()
    for row, parts in DIFFERING.items():
        numbers = set(re.findall(r"[\d,]*\d", " ".join(rows[row])))
        assert {f"{n:,}" for n in parts.values()} <= numbers, row


def test_each_row_has_a_test():
    assert len(checked()) > 40
    for row, how in checked().items():
        if how != "source":
            name = re.escape(row)
            # Some names are made of a prefix and a parameter.
            prefixes = [row] + [row[: m.end()] for m in re.finditer(r"[ ,] ?", row)]
            assert any(f'"{p}' in SOURCES for p in prefixes if len(p) > 7), name


def test_versions_are_those_that_are_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = [r.split(";")[0] for r in project["project"]["optional-dependencies"]["rivals"]]
    pinned = dict(pin.split("==") for pin in pins if "==" in pin)
    rows = page_rows()
    assert {name: rows[name] for name in pinned} == {name: [v] for name, v in pinned.items()}
