"""Builds quantkit/_C with one build.ninja: every object has its own compiler flags.

Nothing here needs torch to be a build requirement: its headers and libraries come from the environment
that will run quantkit, also where pip isolates the build.
"""

import filecmp
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

if sys.version_info < (3, 11):  # before any import that an older Python may lack
    sys.exit(
        f"quantkit cannot be built: it needs Python 3.11 or newer, this is {sys.version.split()[0]}"
    )

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_FLOOR = (2, 13)


def fail(reason):
    sys.exit(f"quantkit cannot be built: {reason}")


def find_torch():
    """The running environment's torch: an isolated build does not have it on sys.path."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # In an isolated build sys.prefix is still the environment that pip runs in.
    for place in places:
        torch = Path(place or ".") / "torch"
        if (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return torch
    fail("torch 2.13 or newer is not installed in this environment; first: pip install torch")


def torch_version(torch):
    namespace = {}
    exec((torch / "version.py").read_text(), namespace)
    version = namespace["__version__"]
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TORCH_FLOOR:
        fail(f"it needs torch {'.'.join(map(str, TORCH_FLOOR))} or newer, found {version}")
    return version


def find_compiler():
    command = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if command is None or shutil.which(command.split()[0]) is None:
        fail(f"no C++ compiler found ({command or 'g++'}); install g++ 11 or newer, or set CXX")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.is_file():
        fail(f"the headers of Python {platform.python_version()} are not installed (Python.h)")
    return command


class NinjaBuild(build_ext):
    def run(self):
        try:
            import ninja
            import pybind11
            from ninja import ninja_syntax
        except ImportError as error:
            fail(f"the package {error.name} is missing; first: pip install ninja pybind11")
        compiler, torch = find_compiler(), find_torch()
        version = torch_version(torch)
        tag = f"{sysconfig.get_config_var('SOABI')}-torch-{version}"
        # A fixed place of our own: setuptools gives an editable install a temporary one.
        objects = ROOT / "build" / tag
        objects.mkdir(parents=True, exist_ok=True)
        target = objects / Path(self.get_ext_filename("quantkit._C")).name

        with open(objects / "build.ninja", "w") as file:
            write_ninja(ninja_syntax.Writer(file), compiler, torch, pybind11.get_include(), target)
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", objects]
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            fail("compiling failed; the compiler's messages are above")

        package = ROOT if self.inplace else Path(self.build_lib)
        destination = package / "quantkit" / target.name
        destination.parent.mkdir(parents=True, exist_ok=True)
        if not destination.exists() or not filecmp.cmp(target, destination, shallow=False):
            # A new file: processes that have the old one mapped keep it.
            partial = destination.with_suffix(".partial")
            shutil.copy2(target, partial)
            partial.replace(destination)


def write_ninja(ninja, compiler, torch, pybind11_include, target):
    csrc = ROOT / "csrc"
    prefix_map = shlex.quote(f"-ffile-prefix-map={ROOT}=quantkit")
    common = f"-O3 -fPIC -fvisibility=hidden -Wall -Wextra {prefix_map}"
    # The contract: no contraction, no reassociation; errno and traps do not matter, so loops vectorise.
    kernel = "-std=c++17 -ffp-contract=off -fno-math-errno -fno-trapping-math"
    isas = {"baseline": ""}
    if platform.machine() in ("x86_64", "AMD64"):
        isas["avx2"] = "-mavx2 -mfma -mf16c"
        isas["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
    have = " ".join(f"-DQUANTKIT_{isa.upper()}" for isa in isas if isa != "baseline")
    torch_include = shlex.quote(str(torch / "include"))
    torch_flags = f"-std=c++20 -isystem {torch_include} -DTORCH_TARGET_VERSION=0x020d000000000000"
    python_flags = (
        f"-std=c++20 -isystem {shlex.quote(sysconfig.get_path('include'))} "
        f"-isystem {shlex.quote(pybind11_include)}"
    )
    sources = {
        "ops.cpp": torch_flags,
        "tensor.cpp": torch_flags,
        "checks.cpp": torch_flags,
        "levels.cpp": kernel,
        "module.cpp": python_flags,
        "cpu/dispatch.cpp": f"{kernel} {have}",
        "cpu/run.cpp": kernel,
        # Without exceptions the object needs no weak symbol of the C++ runtime.
        **{f"cpu/{isa}.cpp": f"{kernel} -fno-exceptions {flags}" for isa, flags in isas.items()},
    }

    ninja.variable("ninja_required_version", "1.5")
    ninja.rule(
        "cxx",
        f"{compiler} {common} $flags $extra -MMD -MF $out.d -c $in -o $out",
        deps="gcc",
        depfile="$out.d",
        description="compile $in",
    )
    libraries = f"-L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu"
    ninja.rule(
        "link",
        f"{compiler} -shared $in -Wl,--as-needed {libraries} -o $out",
        description="link $out",
    )
    objects = []
    for source, flags in sources.items():
        obj = source.replace("/", "_").replace(".cpp", ".o")
        ninja.build(
            obj,
            "cxx",
            str(csrc / source),
            variables={"flags": flags, "extra": os.environ.get("CXXFLAGS", "")},
        )
        objects.append(obj)
    ninja.build(target.name, "link", objects)
    ninja.default(target.name)
    ninja.close()


setup(
    # Listing all of csrc puts the headers into the source distribution.
    ext_modules=[
        Extension("quantkit._C", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*")))
    ],
    cmdclass={"build_ext": NinjaBuild},
)
