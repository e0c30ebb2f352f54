"""`make rivals-test`: what docs/compatibility.md claims, against the packages themselves.

At the end a table says which version was compared, in how many elements, and how many differ.
"""

import functools
import warnings

import pytest
import torch
from lib.rivals import NOTES, RECORDS, version


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def named(peer):
    """The peer and its version; one that is no package here is known by its source's formula."""
    if peer == "torch":
        return f"torch {torch.__version__}"
    return peer if " " in peer else f"{peer} {version(peer)}"


def pytest_terminal_summary(terminalreporter):
    if not RECORDS:
        return
    rows = [("peer", "what", "compared", "elements", "differ")]
    rows += [(named(r.peer), r.row, r.part, f"{r.elements:,}", f"{r.differing:,}") for r in RECORDS]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("compared with quantkit, bit for bit")
    for row in rows:
        left = [cell.ljust(w) for cell, w in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)]
        terminalreporter.write_line("  ".join([*left, *right]))
    for note in NOTES:
        terminalreporter.write_line(note)
