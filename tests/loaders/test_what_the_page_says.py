"""docs/checkpoints.md says what the tests before this one have found."""

import re
from pathlib import Path

import pytest
import tomllib
from lib.loaders import RESULTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
# Names of the page, and those of tests/lib/checkpoints.py.
SCHEMES = {
    "`w8a8`, asymmetric": "w8a8 asymmetric",
    "`w8a8`, groups": "w8a8 group",
    "`w8a8` without inputs": "w8 weights alone",
    "`w8`, asymmetric": "w8 asymmetric",
    "`w4`, asymmetric": "w4 asymmetric",
    "`fp8` without inputs": "fp8 weights alone",
    "`fp8`, blocks of 128 × 128": "fp8 blocks",
    "several schemes": "several",
    'layout "quantkit"': "own w8a8",
}
CONSUMERS = ("transformers, compressed", "transformers, dequantize", "compressed-tensors")


def rows(heading):
    """First cells and the others, of the first table below a heading."""
    table = re.search(rf"^## {heading}$.*?((?:^\|[^\n]*\n)+)", PAGE, re.M | re.S)[1]
    cells = [[c.strip() for c in line.strip("|\n").split("|")] for line in table.splitlines()]
    return {first: others for first, *others in cells[2:]}


def found(consumer, scheme):
    """What the page should say, from the results of both models."""
    results = [r.result for r in RESULTS if (r.consumer, r.scheme) == (consumer, scheme)]
    if not results:
        return "-"
    text = " ".join(results)
    if "equal" not in text:
        return "no"
    return "=" + ", inputs" * ("inputs" in text) + ", bfloat16" * ("bfloat16" in text)


def test_the_table_has_the_results():
    if not {"several", "w8a8"} <= {r.scheme for r in RESULTS}:
        pytest.skip("only after all other tests of this folder")
    table = rows("What loads these files")
    assert len(table) == 17
    for name, cells in table.items():
        scheme = SCHEMES.get(name, name.strip("`"))
        said = [re.sub(r" \(\d\)$", "", cell) for cell in cells]
        got = [found(consumer, scheme) for consumer in CONSUMERS]
        if scheme == "own w8a8":
            got[1] = got[0]  # refused before a mode matters
        assert said[:3] == got, name


def test_the_versions_are_those_that_are_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = project["project"]["optional-dependencies"]["loaders"]
    pinned = dict(pin.split("==") for pin in pins if "==" in pin)
    assert pinned.items() <= {name: cells[0] for name, cells in rows("Versions").items()}.items()
