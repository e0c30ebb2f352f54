"""The README's code runs, and its table of variables is complete."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit import _load

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_code_runs_and_gives_the_reference_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 7
    names = {}
    for i, block in enumerate(blocks):
        exec(block.replace("4096", "256"), names)
        if i == 2:
            expected = quantkit.reference.quantize_tensor(names["w"], names["qparams"])
            assert torch.equal(names["q"], expected)
    assert names["qparams"].scale.shape == (100, 2) and len(names["codes"]) == 8


def test_commands_for_cpp_run(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    (block,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    command = block.replace("build/cpp", str(tmp_path / "build"))
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "quantized 16384 elements" in done.stdout, done.stderr


def test_every_environment_variable_is_documented():
    sources = [*ROOT.glob("quantkit/*.py"), *ROOT.glob("csrc/**/*.cpp")]
    used = {
        name
        for path in sources
        for name in re.findall(r'(?:environ\.get|getenv)\("(QUANTKIT_\w+)"', path.read_text())
    }
    assert used == {"QUANTKIT_ISA", "QUANTKIT_REFERENCE", "QUANTKIT_HUGEPAGES"}
    assert all(name in README for name in used)


def test_every_schema_is_documented():
    page = (ROOT / "docs" / "operators.md").read_text()
    names = [name for name in _load._OPERATORS if not name.startswith("_")]
    assert [f"## {name}" in page for name in names] == [True] * 6
    for name in names:
        assert _load._schemas(name)[0] in page, name
