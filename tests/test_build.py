"""The objects and the build: one exported symbol each, no libm, no contraction, packed arithmetic."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit
from quantkit import _load

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = ("baseline", "avx2", "avx512") if X86 else ("baseline",)
x86_only = pytest.mark.skipif(not X86, reason="reads x86-64 machine code")


CONTRACTED = r"\bvfn?m(add|sub)"


def output(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture(scope="module")
def objects():
    """The folder of the build that made the extension under test."""
    suffix = Path(_load.extension.__file__).name.split(".")[1]
    folders = sorted(ROOT.glob(f"build/{suffix}-torch-*"), key=os.path.getmtime)
    assert folders, "no build folder: run `make build`"
    return folders[-1]


@pytest.mark.parametrize("isa", ISAS)
def test_kernel_objects_export_one_table_and_nothing_weak(objects, isa):
    """A weak symbol from an object with AVX-512 could be the copy that the linker keeps for all."""
    lines = output("nm", "-C", objects / f"cpu_{isa}.o").splitlines()
    symbols = [re.split(r"\s+", line.strip(), maxsplit=2)[-2:] for line in lines]
    exported = [name for kind, name in symbols if kind.isupper() and kind != "U"]
    assert exported == [f"quantkit::{isa}_table"]
    assert not [name for kind, name in symbols if kind in "wWvVuiI"]
    undefined = {name for kind, name in symbols if kind == "U"}
    assert undefined <= {"memcpy", "memmove", "memset", "_GLOBAL_OFFSET_TABLE_"}, undefined


@pytest.mark.parametrize("isa", ISAS)
def test_kernel_objects_have_no_static_initialiser(objects, isa):
    sections = output("readelf", "-S", "-W", objects / f"cpu_{isa}.o")
    assert ".init_array" not in sections and ".ctors" not in sections


@x86_only
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_divide_truly_and_packed(objects, isa):
    code = output("objdump", "-d", "--no-show-raw-insn", objects / f"cpu_{isa}.o")
    assert isa != "baseline" or not re.search(CONTRACTED, code)
    assert not re.search(r"\bv?rcp(14|28)?ps|\bv?rsqrt", code), "an approximate reciprocal"
    register = {"baseline": "xmm", "avx2": "ymm", "avx512": "[yz]mm"}[isa]
    for instruction in ("divps", "divpd", "mulps", "addps"):
        assert re.search(rf"\bv?{instruction} .*%{register}", code), f"no packed {instruction}"


@x86_only
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_every_loop_over_elements_is_vectorised(objects, isa):
    code = output("objdump", "-d", "-C", "--no-show-raw-insn", objects / f"cpu_{isa}.o")
    function = r"^[0-9a-f]+ <(.*\b(?:de)?quantize_r(?:ow|un)<.*)>:\n((?:.+\n)+)"
    loops = re.findall(function, code, re.MULTILINE)
    assert len(loops) > 200
    packed = re.compile(r"\bv(add|sub|mul|div|fmadd...)p[sd]\b|(call|jmp).*\bquantize_r(ow|un)<")
    assert not [name for name, body in loops if not packed.search(body)]


@x86_only
@pytest.mark.parametrize(("isa", "banned"), [("baseline", r"%[yz]mm"), ("avx2", r"%zmm|%k[1-7]")])
def test_kernels_keep_to_their_instruction_set(objects, isa, banned):
    code = output("objdump", "-d", "--no-show-raw-insn", objects / f"cpu_{isa}.o")
    assert not re.search(banned, code)


def test_the_rest_is_built_for_every_machine(objects):
    for name in (
        "ops",
        "device",
        "tensor",
        "checks",
        "levels",
        "module",
        "cpu_run",
        "cpu_dispatch",
    ):
        code = output("objdump", "-d", "--no-show-raw-insn", objects / f"{name}.o")
        assert not X86 or not re.search(r"%[yz]mm", code), name


LIBRARY = Path(quantkit.__file__).with_name("libquantkit.so")


def test_the_library_needs_no_cpp_symbol_of_torch_and_none_of_python():
    """So it outlives torch's upgrades and serves C++: the C shim and the C++ library are all it needs."""
    names = output("nm", "-D", "-C", "--undefined-only", LIBRARY)
    assert not re.search(r"\b(at|c10|torch)::", names) and not re.search(r"\b_?Py", names)
    linked = output("readelf", "-d", LIBRARY)
    assert "libtorch_cpu.so" in linked
    assert "libgomp" not in linked and "RPATH" not in linked and "RUNPATH" not in linked


def test_the_module_finds_the_library_beside_it_and_needs_no_torch():
    linked = output("readelf", "-d", _load.extension.__file__)
    assert "libquantkit.so" in linked and "[$ORIGIN]" in linked and "torch" not in linked


def test_nothing_names_a_path_of_the_machine_that_built_it():
    for file in (_load.extension.__file__, LIBRARY):
        assert str(ROOT).encode() not in Path(file).read_bytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git tracks, built once."""
    root = tmp_path_factory.mktemp("source")
    for name in ("csrc", "quantkit"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    assert build(root).returncode == 0
    return root


def build(root, **variables):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    ours = (
        "CXX",
        "CXXFLAGS",
        "CUDA_HOME",
        "TORCH_CUDA_ARCH_LIST",
        "FORCE_CUDA",
        "QUANTKIT_BUILD_EMU",
    )
    env = {k: v for k, v in os.environ.items() if k not in ours} | {"FORCE_CPU": "1"} | variables
    env = {"CXXFLAGS": "-O0"} | env  # it takes a fifth of the time
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


def compiled(done):
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"compile \S*?csrc/(\S+)", done.stderr))


@pytest.mark.full
def test_only_what_changed_is_compiled(source):
    assert compiled(build(source)) == set()
    (source / "csrc/cpu/avx2.cpp").touch()
    assert compiled(build(source)) == ({"cpu/avx2.cpp"} if X86 else set())
    (source / "csrc/cpu/loops.h").touch()
    assert compiled(build(source)) == {f"cpu/{isa}.cpp" for isa in ISAS}
    for pattern in ("_C*.so", "libquantkit.so"):
        file = next((source / "quantkit").glob(pattern))
        file.unlink()
        assert compiled(build(source)) == set()
        assert file.exists()


@pytest.mark.full
def test_changed_flags_are_compiled_and_true_division_leaves_no_fma(source):
    """Nothing is contracted: every fma is written out as one, in the quotient."""
    assert len(compiled(build(source, CXXFLAGS="-O1 -DQUANTKIT_TRUE_DIVISION"))) > 5
    for object_ in source.glob("build/*/cpu_*.o") if X86 else ():
        assert not re.search(CONTRACTED, output("objdump", "-d", object_)), object_.name


def one_line(done, *texts):
    """The build failed with one clear line, without a traceback."""
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("quantkit cannot be built: "), done.stderr
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in last


@pytest.mark.full
def test_a_missing_compiler_is_one_clear_line(source):
    one_line(build(source, CXX="no-such-compiler"), "no-such-compiler", "g++")
    one_line(build(source, PATH=str(source)), "g++")


@pytest.mark.full
def test_a_compiler_error_fails_the_build(source):
    file = source / "csrc/cpu/dispatch.cpp"
    text = file.read_text()
    file.write_text(text + "\n#error broken on purpose\n")
    done = build(source)
    file.write_text(text)
    one_line(done, "compiling failed")
    assert "broken on purpose" in done.stderr


@pytest.mark.full
def test_settings_of_the_cuda_build_that_cannot_be(source, tmp_path):
    one_line(build(source, FORCE_CUDA="1"), "FORCE_CPU=1 and FORCE_CUDA=1")
    one_line(build(source, FORCE_CPU="yes"), "FORCE_CPU", "'yes'")
    one_line(build(source, FORCE_CPU="", CUDA_HOME=str(tmp_path)), "CUDA_HOME", "bin/nvcc")
    one_line(build(source, QUANTKIT_BUILD_EMU="1"), "proof/emu")
    if shutil.which("nvcc"):
        for wrong in ("7.0", "9", "8.0 Ampere"):
            done = build(source, FORCE_CPU="", TORCH_CUDA_ARCH_LIST=wrong)
            one_line(done, "TORCH_CUDA_ARCH_LIST", wrong.split()[-1])


@pytest.mark.full
def test_a_build_without_cuda_says_so(source):
    """torch's own error names the operator and the backend that it lacks."""
    program = (
        "import torch, quantkit\n"
        "assert quantkit.backend().cuda_archs == () and 'no CUDA kernels' in str(quantkit.backend())\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "assert has('quantkit::quantize', 'CPU') and not has('quantkit::quantize', 'CUDA')\n"
    )
    assert compiled(build(source)) >= set()
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
