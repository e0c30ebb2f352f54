"""Types: the package by mypy and pyright, and a user's module by both at their strictest."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit

ROOT = Path(__file__).resolve().parent.parent
USER = ROOT / "tests" / "typed_user.py"


def check(*command):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_says_that_it_has_types():
    assert (Path(quantkit.__file__).parent / "py.typed").is_file()


@pytest.mark.full
def test_mypy():
    check("mypy")
    check("mypy", "--strict", "--follow-imports=silent", USER)


@pytest.mark.full
def test_pyright(tmp_path):
    pytest.importorskip("pyright", reason="pip install pyright")
    python = ("--pythonpath", sys.executable)
    check("pyright", *python)
    strict = tmp_path / "user.py"
    strict.write_text("# pyright: strict\n" + USER.read_text())
    (tmp_path / "quantkit").symlink_to(Path(quantkit.__file__).parent)
    check("pyright", *python, strict)


def test_every_public_name_is_in_the_users_module():
    text = USER.read_text()
    for name in quantkit.__all__:
        assert name in text


WRONG = """
import torch
import quantkit
p = quantkit.get_symmetric_qparams(torch.ones(2), "channel")
quantkit.quantize_tensor([1.0], p)
q: int = quantkit.dequantize_tensor(torch.ones(2), p)
quantkit.quantize_dequant(torch.ones(2), bits=4)
"""


@pytest.mark.full
def test_wrong_use_is_flagged(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", tmp_path / "wrong.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = re.findall(r"wrong.py:(\d+): error", done.stdout)
    assert lines == ["4", "5", "6", "7"], done.stdout
