"""How the package loads: the fallback, a broken build, the environment variables, the drop-in names."""

import inspect
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit import _load, _torch, reference

PACKAGE = Path(quantkit.__file__).parent
SHOW = "import quantkit; print(quantkit.backend()); print(quantkit.backend().isa)"


@pytest.fixture
def python(torch_process):
    """Runs a program with the package of a folder: python(program, folder, VARIABLE=...)."""

    def run(program, folder=PACKAGE.parent, **variables):
        return torch_process.run(program, folder, **variables)

    return run


@pytest.fixture
def copy(tmp_path):
    """The package without its extension."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "quantkit", ignore=ignored)
    return tmp_path


def test_the_extension_is_what_is_tested():
    backend = quantkit.backend()
    assert backend.extension and backend.reason == "" and backend.isa in backend.isas
    assert backend.isas[0] == "baseline" and backend.contract == 2
    assert backend.threads == torch.get_num_threads()
    assert backend.isa in str(backend) and "\n" not in str(backend)


def test_forced_reference_says_so_once_and_gives_the_bits(python):
    program = f"""{SHOW}
import torch
x = torch.randn(5, 7)
q, x_hat, p = quantkit.quantize_dequant(x, True)
right = quantkit.reference.quantize_dequant(x, True)
assert torch.equal(q, right[0]) and torch.equal(x_hat, right[1])
quantize = torch.ops.quantkit.quantize
assert torch.equal(quantize(x, p.scale, p.zero_point, -128, 127, torch.int8), q)
compiled = torch.compile(quantkit.quantize_dequant, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(x, True)[1], x_hat)
"""
    done = python(program, QUANTKIT_REFERENCE="1")
    assert done.returncode == 0, done.stderr
    line, isa = done.stdout.splitlines()
    assert "reference" in line and "QUANTKIT_REFERENCE=1" in line and isa == "reference"
    assert done.stderr.count("UserWarning") == 1 and "QUANTKIT_REFERENCE=1" in done.stderr


def test_without_an_extension_the_fallback_runs_and_says_why(copy, python):
    done = python(SHOW, copy)
    assert done.returncode == 0, done.stderr
    assert "the extension is not built" in done.stdout
    assert done.stderr.count("UserWarning") == 1


def test_an_extension_that_does_not_load_raises(copy, python):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (copy / "quantkit" / f"_C{suffix}").write_bytes(b"not a library")
    done = python(SHOW, copy)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: quantkit's extension does not load") and "remedy" in last


def test_an_extension_without_its_library_raises(copy, python):
    shutil.copy(quantkit._load.extension.__file__, copy / "quantkit")
    done = python(SHOW, copy)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "libquantkit.so" in last and "remedy" in last


def test_a_folder_in_the_extensions_place_is_none(copy, python):
    (copy / "quantkit" / "_C").mkdir()
    done = python(SHOW, copy)
    assert done.returncode == 0 and "the extension is not built" in done.stdout


def test_an_extension_for_another_python_raises(copy, python):
    name = "_C.cpython-39-x86_64-linux-gnu.so"
    (copy / "quantkit" / name).write_bytes(b"")
    done = python(SHOW, copy)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and name in last and "remedy" in last


@pytest.mark.parametrize("isa", quantkit.backend().isas)
def test_forced_instruction_set(isa, python):
    done = python(SHOW, QUANTKIT_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == isa


@pytest.mark.parametrize(
    "variables",
    [
        {"QUANTKIT_ISA": "mmx"},
        {"QUANTKIT_ISA": "avx2", "QUANTKIT_REFERENCE": "1"},
        {"QUANTKIT_REFERENCE": "yes"},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_raises_at_import(variables, python):
    done = python(SHOW, **variables)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert all(k in last for k in variables) and last.startswith("ImportError: ")


def test_an_instruction_set_without_an_extension_raises(copy, python):
    done = python(SHOW, copy, QUANTKIT_ISA="baseline")
    assert done.returncode != 0 and "QUANTKIT_ISA=baseline" in done.stderr


def test_a_torch_below_the_floor_is_refused(python):
    done = python("import torch; torch.__version__ = '2.9.1'; import quantkit")
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode != 0
        and last.startswith("ImportError")
        and "needs torch 2.10" in last
        and "2.9.1" in last
    )


def test_huge_pages_can_be_switched_off(python):
    program = (
        "import torch, quantkit; x = torch.randn(1500, 1500)\n"
        "assert torch.equal(quantkit.quantize_dequant(x)[1], quantkit.reference.quantize_dequant(x)[1])"
    )
    assert python(program, QUANTKIT_HUGEPAGES="0").returncode == 0


# ---- the names that callers have ------------------------------------------------------------------

DROP_IN = {
    "get_symmetric_qparams": "x, per_channel=False, channel_dim=0, dtype=torch.int8, eps=None",
    "get_asymmetric_qparams": "x, per_channel=False, channel_dim=0, dtype=torch.int8, eps=None",
    "quantize_tensor": "x, qparams",
    "dequantize_tensor": "q, qparams",
    "quantize_dequant": "x, per_channel=False, channel_dim=0, dtype=torch.int8, sym=True",
    "dynamic_quantize": "x, per_channel=False, channel_dim=0, dtype=torch.int8, sym=True",
    "fake_quantize": "x, qparams",
}


def arguments(function, kind):
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.kind is kind]


@pytest.mark.parametrize("name", DROP_IN)
def test_names_order_and_defaults_stay(name):
    package, definition = getattr(quantkit, name), getattr(reference, name)
    positional = arguments(package, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    shown = ", ".join(n if d is inspect.Parameter.empty else f"{n}={d}" for n, d in positional)
    assert shown == DROP_IN[name]
    for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
        assert arguments(package, kind) == arguments(definition, kind)


def test_parameters_dataclass():
    p = quantkit.QuantizationParams(torch.tensor(0.5), torch.tensor(0.0), -128, 127)
    assert p.dtype is None and "dtype" not in repr(p)
    assert reference.QuantizationParams is quantkit.QuantizationParams
    with pytest.raises(TypeError):
        quantkit.QuantizationParams(torch.tensor(0.5), torch.tensor(0.0), -128, 127, torch.int8)


def test_deliberate_differences_from_quant_tool():
    x = torch.randn(3, 5)
    q = quantkit.quantize_dequant(x, dtype=torch.uint8, sym=False)[0]
    assert q.dtype == torch.uint8 and q.max() == 255
    a = quantkit.quantize_dequant(x, True, -1)[2].scale
    assert torch.equal(a, quantkit.quantize_dequant(x, True, 1)[2].scale)
    leaf = x.clone().requires_grad_()
    assert not quantkit.quantize_dequant(leaf)[1].requires_grad
    low = torch.tensor([-128, 5], dtype=torch.int8)
    assert quantkit.get_symmetric_qparams(low).scale == torch.tensor(128.0) / 127
    assert _load.CONTRACT == 2


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+b4e4ee8.nv25.12", "2.15.0+cu132", "3.0.0"])
def test_the_range_of_torch_has_no_upper_end(version):
    _torch.check_version(version)
