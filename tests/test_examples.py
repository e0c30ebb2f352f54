"""The examples, run as a user would: from another folder, by their own commands."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import quantkit
from benchmarks.real_weights import PACKAGE

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(*command, folder, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [str(c) for c in command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.iterdir()} - {"__pycache__"} == {
        "cpp", "embeddings.py", "export.py", "linear.py", "lsq.py", "qat.py", "safetensors_file.py",
        "schemes.py", "studies.py",
    }  # fmt: skip


@pytest.mark.full
def test_qat(tmp_path):
    text = run(sys.executable, EXAMPLES / "qat.py", folder=tmp_path)
    assert "after training with 4-bit weights" in text and "compiled" in text


def test_lsq(tmp_path):
    text = run(sys.executable, EXAMPLES / "lsq.py", folder=tmp_path)
    assert "with learned ones" in text


@pytest.mark.full
def test_studies(tmp_path):
    """On the real weight or a random one; each study is better than rounding to nearest."""
    text = run(sys.executable, EXAMPLES / "studies.py", folder=tmp_path)
    found = re.findall(r"^(\d) bits, (.+): (\d+\.\d) dB$", text, re.MULTILINE)
    db = {(bits, way): float(value) for bits, way, value in found}
    assert db["8", "SmoothQuant"] > db["8", "to nearest"] + 3
    assert db["4", "GPTQ"] > db["4", "AWQ"] > db["4", "to nearest"] + 1


@pytest.mark.full
@pytest.mark.parametrize("arguments", [[], ["."]])
def test_export(tmp_path, arguments):
    text = run(sys.executable, "-W", "ignore", EXAMPLES / "export.py", *arguments, folder=tmp_path)
    assert text.count("in a new process") == 2
    assert (tmp_path / "model.pt2").exists() == bool(arguments)


@pytest.mark.parametrize("arguments", [[], ["w"]])
def test_safetensors(tmp_path, arguments):
    text = run(sys.executable, EXAMPLES / "safetensors_file.py", *arguments, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == arguments
    assert "groups: (64, 128) torch.uint8, float32 scale (64, 4), uint8" in text
    assert "int4: (64, 64) torch.uint8, float32 scale (64, 1), int4" in text
    assert "fp8: (64, 128) torch.float8_e4m3fn, float32 scale (1, 1), float8_e4m3fn" in text
    assert "mxfp4: (64, 64) torch.uint8, float8_e8m0fnu scale (64, 4), float4_e2m1fn" in text
    assert "nvfp4: (64, 64) torch.uint8, float8_e4m3fn scale (64, 8), float4_e2m1fn" in text
    assert "int2: (64, 32) torch.uint8, float32 scale (64, 4), int2" in text


def test_linear(tmp_path):
    text = run(sys.executable, EXAMPLES / "linear.py", folder=tmp_path)
    assert "int4_group128: 408 KiB of 1536" in text and text.count(" dB") == 4


def test_schemes_prints_the_tables_of_the_pages(tmp_path):
    """On the weight that `make run` installs, and on a file of one's own."""
    save_file({"w": torch.randn(8, 256)}, tmp_path / "own.safetensors")
    text = run(
        sys.executable, EXAMPLES / "schemes.py", tmp_path / "own.safetensors", "w", folder=tmp_path
    )
    assert "w: (8, 256), bfloat16" in text and text.count("\n| `") == len(quantkit.SCHEMES)
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("make run installs the model")
    text = run(sys.executable, EXAMPLES / "schemes.py", folder=tmp_path)
    table = text[text.index("| scheme |") :]
    for page in ("README.md", "docs/formats.md"):
        assert table in (ROOT / page).read_text(), f"{page}: run python examples/schemes.py"


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    """Built by the commands that docs/installation.md shows."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    build = tmp_path_factory.mktemp("cpp")
    page = (ROOT / "docs" / "installation.md").read_text()
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run("bash", "-ec", commands.replace("build/cpp", str(build)), folder=ROOT, PATH=path)
    return build / "example"


@pytest.mark.full
def test_cpp(cpp, tmp_path):
    text = run(cpp, folder=tmp_path)
    assert "quantized 16384 elements" in text and "int4: [64, 128] unsigned char" in text
    assert "refused: q_min, q_max: expected" in text


@pytest.mark.full
def test_cpp_has_no_python_in_it(cpp):
    linked = run("ldd", cpp, folder=cpp.parent)
    assert "libquantkit.so" in linked and "libpython" not in linked and "_C." not in linked
