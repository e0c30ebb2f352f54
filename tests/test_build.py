"""The objects and the build: one exported symbol each, no libm, no contraction, packed arithmetic."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
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
    folder = ROOT / "build" / "objects"
    assert folder.is_dir(), "no build folder: run `make build`"
    return folder


def newest(objects, name):
    """An object that is made for each torch or each Python."""
    return max(objects.rglob(f"{name}.o"), key=os.path.getmtime)


OBJECTS = {isa: f"{isa}_table" for isa in ISAS}
OBJECTS |= {"avx512_vnni": "avx512_vnni_linear"} if X86 else {}


@pytest.mark.parametrize("isa", OBJECTS)
def test_kernel_objects_export_one_table_and_nothing_weak(objects, isa):
    """A weak symbol from an object with AVX-512 could be the copy that the linker keeps for all."""
    lines = output("nm", "-C", objects / f"cpu_{isa}.o").splitlines()
    symbols = [re.split(r"\s+", line.strip(), maxsplit=2)[-2:] for line in lines]
    exported = [name for kind, name in symbols if kind.isupper() and kind != "U"]
    assert exported == [f"quantkit::{OBJECTS[isa]}"]
    assert not [name for kind, name in symbols if kind in "wWvVuiI"]
    undefined = {name for kind, name in symbols if kind == "U"}
    assert undefined <= {"memcpy", "memmove", "memset", "_GLOBAL_OFFSET_TABLE_"}, undefined


@pytest.mark.parametrize("isa", OBJECTS)
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
    function = r"^[0-9a-f]+ <(.*\b(?:de)?quantize_rows?<.*)>:\n((?:.+\n)+)"
    loops = re.findall(function, code, re.MULTILINE)
    assert len(loops) > 100
    packed = re.compile(r"\bv(add|sub|mul|div|fmadd...)p[sd]\b|(call|jmp).*\bquantize_rows?<")
    assert not [name for name, body in loops if not packed.search(body)]


@x86_only
def test_products_of_integers_are_packed_and_sums_of_floats_not_contracted(objects):
    for isa, instruction in (
        ("baseline", "pmaddwd"), ("avx2", "vpmaddwd.*%ymm"), ("avx512_vnni", "vpdpbusd.*%zmm")
    ):  # fmt: skip
        code = output("objdump", "-d", "--no-show-raw-insn", objects / f"cpu_{isa}.o")
        assert re.search(instruction, code), isa
    assert not re.search(CONTRACTED, code)


@x86_only
@pytest.mark.parametrize(("isa", "banned"), [("baseline", r"%[yz]mm"), ("avx2", r"%zmm|%k[1-7]")])
def test_kernels_keep_to_their_instruction_set(objects, isa, banned):
    code = output("objdump", "-d", "--no-show-raw-insn", objects / f"cpu_{isa}.o")
    assert not re.search(banned, code)


def test_the_rest_is_built_for_every_machine(objects):
    for name in (
        "ops_dynamic",
        "ops_static",
        "torch_device",
        "torch_tensor",
        "layout",
        "module",
        "cpu_parallel",
        "cpu_dispatch",
    ):
        code = output("objdump", "-d", "--no-show-raw-insn", newest(objects, name))
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
    """A copy of what git tracks."""
    root = tmp_path_factory.mktemp("source")
    for name in ("csrc", "quantkit"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module")
def built(source):
    assert build(source).returncode == 0
    return source


def build(root, **variables):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    ours = (
        "CXX",
        "CXXFLAGS",
        "CUDA_HOME",
        "TORCH_CUDA_ARCH_LIST",
        "FORCE_CUDA",
        "QUANTKIT_BUILD_EMU",
        "QUANTKIT_TORCH",
    )
    env = {k: v for k, v in os.environ.items() if k not in ours} | {"FORCE_CPU": "1"} | variables
    env = {"CXXFLAGS": "-O0"} | env  # it takes a fifth of the time
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


def compiled(done):
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"compile \S*?csrc/(\S+)", done.stderr))


@pytest.mark.full
def test_only_what_changed_is_compiled(built):
    assert compiled(build(built)) == set()
    (built / "csrc/cpu/avx2.cpp").touch()
    assert compiled(build(built)) == ({"cpu/avx2.cpp"} if X86 else set())
    (built / "csrc/cpu/rows.h").touch()
    assert compiled(build(built)) == {f"cpu/{isa}.cpp" for isa in ISAS}
    for pattern in ("_C*.so", "libquantkit.so"):
        file = next((built / "quantkit").glob(pattern))
        file.unlink()
        assert compiled(build(built)) == set()
        assert file.exists()


@pytest.mark.full
def test_changed_flags_are_compiled_and_true_division_leaves_no_fma(built):
    """Nothing is contracted: every fma is written out as one, in the quotient."""
    assert len(compiled(build(built, CXXFLAGS="-O1 -DQUANTKIT_TRUE_DIVISION"))) > 5
    for object_ in built.glob("build/*/cpu_*.o") if X86 else ():
        assert not re.search(CONTRACTED, output("objdump", "-d", object_)), object_.name


def one_line(done, *texts):
    """The build failed with one clear line, without a traceback."""
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("quantkit cannot be built: "), done.stderr
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in last


def test_a_missing_compiler_is_one_clear_line(source):
    one_line(build(source, CXX="no-such-compiler"), "no-such-compiler", "g++")
    one_line(build(source, PATH=str(source)), "g++")
    one_line(build(source, PATH=str(source), CXX=" "), "g++")


@pytest.mark.full
def test_a_compiler_error_fails_the_build(built):
    file = built / "csrc/cpu/dispatch.cpp"
    text = file.read_text()
    file.write_text(text + "\n#error broken on purpose\n")
    done = build(built)
    file.write_text(text)
    one_line(done, "compiling failed")
    assert "broken on purpose" in done.stderr


def test_settings_of_the_cuda_build_that_cannot_be(source, tmp_path):
    one_line(build(source, FORCE_CUDA="1"), "FORCE_CPU=1 and FORCE_CUDA=1")
    one_line(build(source, FORCE_CPU="yes"), "FORCE_CPU", "'yes'")
    one_line(build(source, FORCE_CPU="", CUDA_HOME=str(tmp_path)), "CUDA_HOME", "bin/nvcc")
    one_line(build(source, QUANTKIT_BUILD_EMU="1"), "proof/emu")


@pytest.mark.full
def test_a_build_without_cuda_says_so(built):
    """torch's own error names the operator and the backend that it lacks."""
    program = (
        "import torch, quantkit\n"
        "assert quantkit.backend().cuda_archs == () and 'no CUDA kernels' in str(quantkit.backend())\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "assert has('quantkit::quantize', 'CPU') and not has('quantkit::quantize', 'CUDA')\n"
    )
    assert compiled(build(built)) >= set()
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=built, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- setup.py on other machines -------------------------------------------------------------------


@pytest.fixture
def rules():
    """setup.py as a module, which builds nothing."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(function, *arguments):
    """The one line in which a function of setup.py gives up."""
    with pytest.raises(SystemExit) as error:
        function(*arguments)
    line = str(error.value)
    assert line.startswith("quantkit cannot be built: ") and "\n" not in line
    return line


def torch_of(folder, version, headers=True):
    include = folder / "include" / "torch" / "csrc" / "stable"
    include.mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = {version!r}\n")
    if headers:
        (include / "library.h").touch()
    return folder


def test_an_older_python_is_one_clear_line(monkeypatch, rules):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert "needs Python 3.10 or newer" in refused(rules.__loader__.exec_module, rules)


def test_an_older_torch_is_one_clear_line(source, tmp_path, monkeypatch, rules):
    folder = torch_of(tmp_path / "torch", "2.9.1+cpu")
    line = build(source, QUANTKIT_TORCH=str(folder))
    one_line(line, "torch 2.10 or newer", "found 2.9.1+cpu", "pip install --upgrade torch")


def test_torch_of_the_environment_is_found_without_a_path_to_it(tmp_path, monkeypatch, rules):
    """Where pip isolates the build, sys.path has no torch, but the environment's folder is known."""
    monkeypatch.delenv("QUANTKIT_TORCH", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "isolated")])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(rules.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    assert "first: pip install torch" in refused(rules.find_torch)
    folder = torch_of(tmp_path / "user" / "torch", "2.10.0a0+b4e4ee8.nv25.12", headers=False)
    assert "no headers" in refused(rules.find_torch)
    for version in ("2.10.0a0+b4e4ee8.nv25.12", "2.15.0+cu132", "3.0.0"):
        shutil.rmtree(folder)
        torch_of(folder, version)
        assert rules.find_torch() == (folder, version)
    monkeypatch.setenv("QUANTKIT_TORCH", str(tmp_path))
    assert "is no folder of an installed torch" in refused(rules.find_torch)


def test_missing_headers_of_python_are_one_clear_line(tmp_path, monkeypatch, rules):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    line = refused(rules.find_compiler)
    assert "Python.h" in line and f"python3.{sys.version_info.minor}-dev" in line


@pytest.fixture
def nvcc(tmp_path):
    """An nvcc that knows what that of CUDA 13.0 does."""
    file = tmp_path / "nvcc"
    codes = "75 80 86 87 88 89 90 100 103 110 120 121"
    file.write_text(f"#!/bin/sh\nfor code in {codes}; do echo sm_$code; done\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("listed", "built", "left_out"),
    [
        ("", "75 80 89 90 100 120", ""),
        ("9.0", "90", ""),
        ("9.0a", "90", ""),
        ("8.0;8.0+PTX 9.0", "80 90", ""),
        (
            "5.2 6.0 6.1 7.0 7.2 7.5 8.0 8.6 8.7 9.0+PTX",
            "75 80 86 87 90",
            "5.2, 6.0, 6.1, 7.0, 7.2",
        ),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "75 80 86 90 100 120", ""),
        ("Turing;Ampere", "75 80 86", ""),
        ("Volta Hopper+PTX Blackwell", "90 100 103 120 121", "Volta"),
        ("8.0 9 Common 99.0", "80", "9, Common, 99.0"),
        ("5.2", "75 80 89 90 100 120", "5.2; nothing is left, so all are built"),
    ],
)
def test_torch_cuda_arch_list(listed, built, left_out, nvcc, monkeypatch, capfd, rules):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert " ".join(rules.cuda_archs(nvcc)) == built
    said = capfd.readouterr().err
    assert said.count("\n") == bool(left_out) and f"left out {left_out}" in said + "left out "


def test_native_is_what_the_machine_has(nvcc, tmp_path, monkeypatch, capfd, rules):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    smi.chmod(0o755)
    assert rules.cuda_archs(nvcc) == ("90", "86")
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert rules.cuda_archs(nvcc) == rules.CUDA_ARCHS
    assert "left out native" in capfd.readouterr().err


def test_an_older_nvcc_names_the_gpus_that_compile_for_themselves(nvcc, monkeypatch, capfd, rules):
    nvcc.write_text("#!/bin/sh\nfor code in 75 80 86 89 90; do echo sm_$code; done\n")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert rules.cuda_archs(nvcc) == ("75", "80", "89", "90")
    assert "does not know sm_100, sm_120" in capfd.readouterr().err
    nvcc.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    assert "--list-gpu-code failed: broken" in refused(rules.cuda_archs, nvcc)


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
@pytest.mark.full
def test_elsewhere_than_on_linux_the_reference_is_installed(system, source, tmp_path):
    root = tmp_path / "root"
    ignored = shutil.ignore_patterns("*.so", "build")
    shutil.copytree(source, root, ignore=ignored)
    there = f"import platform, runpy, sys; platform.system = lambda: {system!r}; "
    wheel = "sys.argv = ['setup.py', '--quiet', 'bdist_wheel', '-d', 'wheels']; "
    wheel += "runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", there + wheel], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the extension is built on Linux only" in done.stderr
    (file,) = (root / "wheels").iterdir()
    assert file.name == f"quantkit-{quantkit.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(file) as names:
        metadata = names.read(f"quantkit-{quantkit.__version__}.dist-info/METADATA").decode()
        names.extractall(tmp_path / "installed")
    assert "Requires-Dist: torch>=2.10.0.dev0\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata
    program = f"""
import torch
{there}
import quantkit
backend = quantkit.backend()
assert not backend.extension and backend.reason == "the extension is built on Linux only", backend
assert quantkit.quantize_dequant(torch.ones(2, 3))[0].tolist() == [[127] * 3] * 2
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "installed", capture_output=True, text=True
    )
    assert done.returncode == 0 and "built on Linux only" in done.stderr, done.stderr
    environment = os.environ | {"QUANTKIT_ISA": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "installed", capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.stderr.strip().endswith("there is no compiled extension; remedy: unset it")
