"""Types: the package by mypy and pyright, and a user's module by both at their strictest."""

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


def test_mypy():
    check("mypy")
    check("mypy", "--strict", "--follow-imports=silent", USER)


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
