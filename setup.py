"""Builds quantkit/_C with one build.ninja: every object has its own compiler flags.

Nothing here needs torch to be a build requirement: its headers and libraries come from the environment
that will run quantkit, also where pip isolates the build.
"""

import filecmp
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

if sys.version_info < (3, 10):  # before any import that an older Python may lack
    sys.exit(
        f"quantkit cannot be built: it needs Python 3.10 or newer, this is {sys.version.split()[0]}"
    )

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "quantkit" / "_version.py"))
TORCH = f"torch {VERSION['floor_text']()} or newer"
# As the headers spell it.
TORCH_TARGET = "0x{:02x}{:02x}000000000000".format(*VERSION["TORCH_FLOOR"])


def say(line):
    print(f"quantkit: {line}", file=sys.stderr)


def fail(reason):
    sys.exit(f"quantkit cannot be built: {reason}")


def find_torch():
    """(folder, version) of the running environment's torch: an isolated build lacks it on sys.path.

    QUANTKIT_TORCH names another's folder: the stable ABI is the same for every Python.
    """
    given = os.environ.get("QUANTKIT_TORCH")
    # In an isolated build sys.prefix is still the environment that pip runs in.
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    places.append(site.getusersitepackages())
    found = [Path(given)] if given else [Path(place or ".") / "torch" for place in places]
    torch = next((folder for folder in found if (folder / "version.py").is_file()), None)
    if torch is None and given:
        fail(f"QUANTKIT_TORCH={given} is no folder of an installed torch")
    if torch is None:
        fail(f"{TORCH} is not installed in this environment; first: pip install torch")
    version = runpy.run_path(str(torch / "version.py"))["__version__"]
    if VERSION["release"](version) < VERSION["TORCH_FLOOR"]:
        fail(f"it needs {TORCH}, found {version}; first: pip install --upgrade torch")
    if not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        fail(
            f"torch {version} has no headers; first: pip install --force-reinstall torch=={version}"
        )
    return torch, version


def find_compiler():
    given = os.environ.get("CXX", "").strip()
    command = given or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if command is None or shutil.which(command.split()[0]) is None:
        fail(f"no C++ compiler found ({command or 'g++'}); install g++ 11 or newer, or set CXX")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        fail(
            f"the headers of Python {platform.python_version()} are not installed (Python.h); "
            f"install them ({package} on Debian), or use a Python that has them"
        )
    return command


# GPUs since Turing, where 8.6 and 8.7 run code for 8.0; the PTX of the oldest lets later ones compile the
# kernels for themselves.
CUDA_ARCHS = ("75", "80", "89", "90", "100", "120")
# As torch's own builds read them.
GENERATIONS = {
    "Turing": "7.5",
    "Ampere": "8.0 8.6",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0 10.3 12.0 12.1",
}
ISAS_X86 = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
}
# Of linear layers alone.
VNNI = f"{ISAS_X86['avx512']} -mavx512vnni -mprefer-vector-width=512"

LIBRARY = "libquantkit.so"
COMMON_FLAGS = "-O3 -fPIC -fvisibility=hidden -Wall -Wextra -Werror=switch"
# The contract: no contraction, no reassociation; errno and traps do not matter, so loops vectorise.
KERNEL_FLAGS = "-std=c++17 -ffp-contract=off -fno-math-errno -fno-trapping-math"


def kernel_sources(machine, emulated=False):
    """The sources of the CPU kernels for a kind of machine, each with its flags."""
    isas = ISAS_X86 if machine in ("x86_64", "AMD64") else {}
    have = " ".join(f"-DQUANTKIT_{isa.upper()}" for isa in isas)
    return {
        "cpu/dispatch.cpp": f"{KERNEL_FLAGS} {have} {'-DQUANTKIT_CUDA_EMU' if emulated else ''}",
        "cpu/forks.cpp": KERNEL_FLAGS,
        "cpu/parallel.cpp": KERNEL_FLAGS,
        "layout.cpp": KERNEL_FLAGS,
        # Without exceptions the object needs no weak symbol of the C++ runtime.
        **{
            f"cpu/{isa}.cpp": f"{KERNEL_FLAGS} -fno-exceptions {flags}"
            for isa, flags in {
                "baseline": "",
                **isas,
                **({"avx512_vnni": VNNI} if isas else {}),
            }.items()
        },
    }


def is_set(name):
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        fail(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


def find_nvcc():
    """The toolkit's nvcc, or None: whether CUDA is built depends on nothing else."""
    force_cpu, force_cuda = is_set("FORCE_CPU"), is_set("FORCE_CUDA")
    if force_cpu:
        if force_cuda:
            fail("FORCE_CPU=1 and FORCE_CUDA=1 exclude each other: unset one")
        return None
    home = os.environ.get("CUDA_HOME")
    if home:
        places = [Path(home) / "bin" / "nvcc"]
    else:
        found = shutil.which("nvcc")
        places = [Path(found)] if found else []
        places += [Path("/usr/local/cuda/bin/nvcc"), Path("/opt/cuda/bin/nvcc")]
        places += sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), reverse=True)
    for nvcc in places:
        if nvcc.is_file():
            return nvcc
    if home or force_cuda:
        why = f"CUDA_HOME={home} has no bin/nvcc" if home else "FORCE_CUDA=1, but there is no nvcc"
        fail(f"{why}; install the CUDA toolkit, set CUDA_HOME, or set FORCE_CPU=1")
    return None


def gpus_here():
    """The architectures of this machine's GPUs."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return []
    return done.stdout.replace(".", "").split() if done.returncode == 0 else []


def archs_named(entry):
    """The architectures that an entry of TORCH_CUDA_ARCH_LIST means; none where it is no such entry."""
    name = entry.removesuffix("+PTX")
    if name == "native":
        return gpus_here()
    # What only sm_90a has, no kernel uses.
    versions = [re.fullmatch(r"(\d+)\.(\d)[af]?", v) for v in GENERATIONS.get(name, name).split()]
    return [v[1] + v[2] for v in versions if v]


def cuda_archs(nvcc):
    """Of TORCH_CUDA_ARCH_LIST what nvcc knows and the kernels run on; without it, CUDA_ARCHS."""
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    if listing.returncode != 0:
        fail(f"{nvcc} --list-gpu-code failed: {listing.stderr.strip()}")
    known = [code.removeprefix("sm_") for code in listing.stdout.split()]
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    chosen, left_out = [], []
    for entry in listed:
        archs = [a for a in archs_named(entry) if int(a) >= int(CUDA_ARCHS[0]) and a in known]
        chosen += archs
        left_out += [] if archs else [entry]
    if left_out:
        rest = "" if chosen else "; nothing is left, so all are built that this nvcc knows"
        say(f"TORCH_CUDA_ARCH_LIST: left out {', '.join(left_out)}{rest}")
    if not chosen:
        chosen = [arch for arch in CUDA_ARCHS if arch in known]
        if missing := [f"sm_{arch}" for arch in CUDA_ARCHS if arch not in known]:
            say(f"{nvcc} does not know {', '.join(missing)}: their GPUs compile the PTX")
    return tuple(dict.fromkeys(chosen))


class NinjaBuild(build_ext):
    def run(self):
        if not self.extensions:
            return
        import fcntl  # Linux has it

        try:
            import ninja
            import pybind11
            from ninja import ninja_syntax
        except ImportError as error:
            fail(f"the package {error.name} is missing; first: pip install ninja pybind11")
        compiler, (torch, version) = find_compiler(), find_torch()
        # A fixed place of our own: setuptools gives an editable install a temporary one.
        # Every torch shares the kernels in it, and every Python all but its module.
        folder = ROOT / "build" / "objects"
        folder.mkdir(parents=True, exist_ok=True)
        library = f"torch-{version}/{LIBRARY}"
        name = Path(self.get_ext_filename("quantkit._C")).name
        module = f"{sysconfig.get_config_var('SOABI')}/{name}"

        with open(folder / "lock", "w") as lock:
            # One build at a time, or ninja's records break; of an interrupted one ninja may still run.
            fcntl.flock(lock, fcntl.LOCK_EX)
            with open(folder / "build.ninja", "w") as file:
                writer = ninja_syntax.Writer(file)
                write_ninja(writer, compiler, torch, pybind11.get_include(), library, module)
            command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder]
            done = subprocess.run(command, stdout=sys.stderr, pass_fds=[lock.fileno()])
        if done.returncode != 0:
            without = " (FORCE_CPU=1 builds without CUDA)" if find_nvcc() else ""
            fail(f"compiling failed; the compiler's messages are above{without}")

        package = ROOT if self.inplace else Path(self.build_lib)
        for target in (folder / library, folder / module):
            destination = package / "quantkit" / target.name
            destination.parent.mkdir(parents=True, exist_ok=True)
            if not destination.exists() or not filecmp.cmp(target, destination, shallow=False):
                # A new file: processes that have the old one mapped keep it.
                partial = destination.with_suffix(".partial")
                shutil.copy2(target, partial)
                partial.replace(destination)


def write_ninja(ninja, compiler, torch, pybind11_include, library, module):
    """Rules for the library and the module, whose paths name their torch and their Python."""
    csrc = ROOT / "csrc"
    prefix_map = shlex.quote(f"-ffile-prefix-map={ROOT}=quantkit")
    common = f"{COMMON_FLAGS} {prefix_map}"
    nvcc, emulated = find_nvcc(), is_set("QUANTKIT_BUILD_EMU")
    archs = cuda_archs(nvcc) if nvcc else ()
    has_cuda = "-DQUANTKIT_CUDA" if nvcc else ""
    names = shlex.quote(f'-DQUANTKIT_CUDA_ARCHS="{" ".join(f"sm_{arch}" for arch in archs)}"')
    torch_include = shlex.quote(str(torch / "include"))
    torch_flags = (
        f"-std=c++20 -isystem {torch_include} -DTORCH_TARGET_VERSION={TORCH_TARGET} {has_cuda}"
    )
    with_torch = sorted(p for folder in ("ops", "torch") for p in (csrc / folder).rglob("*.cpp"))
    python_flags = (
        f"-std=c++20 -isystem {shlex.quote(sysconfig.get_path('include'))} "
        f"-isystem {shlex.quote(pybind11_include)}"
    )
    sources = {
        **{str(path.relative_to(csrc)): torch_flags for path in with_torch},
        "module.cpp": f"{python_flags} {names}",
        **kernel_sources(platform.machine(), emulated),
    }

    ninja.variable("ninja_required_version", "1.5")
    ninja.rule(
        "cxx",
        f"{compiler} {common} $flags $extra -MMD -MF $out.d -c $in -o $out",
        deps="gcc",
        depfile="$out.d",
        description="compile $in",
    )
    if emulated:
        emu = ROOT / "proof" / "emu"
        if not emu.is_dir():
            fail(
                "QUANTKIT_BUILD_EMU=1, but proof/emu is not here: only the sources have the emulator"
            )
        # O1: half the time to compile, and the emulator waits for its threads, not for the kernels.
        sources["../proof/emu/cuda_emu.cpp"] = (
            f"{KERNEL_FLAGS} -O1 -Wno-unknown-pragmas -I{shlex.quote(str(emu))}"
        )
        sources["../proof/emu/emulator.cpp"] = "-std=c++17"
    libraries = f"-L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu -ldl"
    if nvcc:  # as the linker it knows where its static runtime is
        host = compiler.split()
        launched = len(host) > 1 and Path(host[0]).name in ("ccache", "sccache", "distcc")
        cuda = f"{shlex.quote(str(nvcc))} -ccbin {shlex.quote(host[launched])}"
        link = (
            f"{cuda} --cudart=static -nodlink -shared $in -Xlinker=--as-needed,--exclude-libs=ALL"
        )
    else:
        link = f"{compiler} -shared $in -Wl,--as-needed"
    ninja.rule("link", f"{link} $soname {libraries} -o $out", description="link $out")
    objects = []
    for source, flags in sources.items():
        obj = source.removeprefix("../proof/").replace("/", "_").replace(".cpp", ".o")
        if torch_flags in flags:
            obj = f"{Path(library).parent}/{obj}"
        elif source == "module.cpp":
            obj = f"{Path(module).parent}/{obj}"
        ninja.build(
            obj,
            "cxx",
            str(csrc / source),
            variables={"flags": flags, "extra": os.environ.get("CXXFLAGS", "")},
        )
        objects.append(obj)
    if nvcc:
        codes = ",".join([*(f"sm_{arch}" for arch in archs), "compute_75"])
        host = f"-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror,-ffile-prefix-map={ROOT}=quantkit"
        ninja.rule(
            "nvcc",
            f"{cuda} -std=c++17 -O3 --threads 2 "
            "--fmad=false -prec-div=true -ftz=false -Werror=all-warnings --cudart=static "
            f"-Xfatbin=-compress-all -Xcompiler={shlex.quote(host)} "
            f"-gencode 'arch=compute_75,code=[{codes}]' -MD -MF $out.d -c $in -o $out",
            deps="gcc",
            depfile="$out.d",
            description="compile $in",
        )
        ninja.build("cuda_kernels.o", "nvcc", str(csrc / "cuda" / "kernels.cu"))
        objects.append("cuda_kernels.o")
    # The operators know nothing of Python: programs in C++ load them too.
    own = next(obj for obj in objects if obj.endswith("/module.o"))
    objects.remove(own)
    ninja.build(library, "link", objects, variables={"soname": f"-Xlinker -soname={LIBRARY}"})
    ninja.rule(
        "link_module",
        f"{compiler} -shared $in -L{shlex.quote(str(Path(library).parent))} -l:{LIBRARY} "
        "-Wl,-rpath,'$$ORIGIN' -o $out",
        description="link $out",
    )
    ninja.build(module, "link_module", [own], implicit=[library])
    ninja.default(module)
    ninja.close()


if __name__ == "__main__":
    # Listing all of csrc puts the headers into the source distribution.
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*"))
    extensions = [Extension("quantkit._C", sources)]
    if platform.system() != "Linux":
        say("the extension is built on Linux only: the slow pure-torch reference will run")
        extensions = []
    setup(
        # NVIDIA's images have torch 2.10.0a0, which pip takes for older than 2.10.
        install_requires=[f"torch>={VERSION['floor_text']()}.0.dev0"],
        ext_modules=extensions,
        cmdclass={"build_ext": NinjaBuild},
    )
