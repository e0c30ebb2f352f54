"""CUDA as far as it can be seen without a GPU: machine code, registration, fake tensors, emulator."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from lib import cases, gpu_code
from lib.cases import NAMES, assert_same, flat, given, inputs, invoke, values

import quantkit
from quantkit import _load, reference
from quantkit.operators import overloads

ops = torch.ops.quantkit
EMU = Path(__file__).resolve().parents[1] / "proof" / "emu"
LIBRARY = Path(quantkit.__file__).with_name("libquantkit.so")
needs_cuda = pytest.mark.skipif(not quantkit.backend().cuda_archs, reason="built without CUDA")


def needs_nvcc(test):
    """Of the full tier: nvcc takes a quarter of a minute, ptxas one for each architecture."""
    skip = pytest.mark.skipif(not gpu_code.nvcc_command(), reason="built without nvcc")
    return pytest.mark.full(skip(test))


@pytest.mark.skipif(
    os.environ.get("QUANTKIT_REQUIRE_EXTENSION") != "1", reason="`make test` builds with CUDA"
)
def test_this_build_has_the_kernels_and_the_emulator():
    backend = quantkit.backend()
    assert "cuda_emu" in backend.isas
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or os.environ.get("FORCE_CPU")
    if shutil.which("nvcc") and not asked:
        assert backend.cuda_archs == gpu_code.ARCHS
        assert "CUDA sm_75" in str(backend)


# ---- what the compiler made -----------------------------------------------------------------------

DIVIDING = ("quantize_kernel<", "quantize_mixed_kernel<", "rows_kernel<", "finish_kernel<")
COPYING = ("quantize_kernel<", "dequantize_kernel<", "rows_kernel<")


@needs_nvcc
def test_ptx_divides_truly_and_contracts_nothing():
    entries = gpu_code.entries()
    assert len(entries) > 50
    for name, body in entries.items():
        assert not re.search(
            r"\bfma\.|\bmad\.(rn|f)|\.ftz|div\.(approx|full)|rcp\.(?!rn\.f32)|sqrt|ex2|lg2", body
        ), name
        if name.startswith(DIVIDING):
            assert re.search(r"\bdiv\.rn\.f(32|64)", body), name


@needs_nvcc
def test_ptx_has_vector_loads_and_stores():
    entries = gpu_code.entries()
    for name, body in entries.items():
        loads = r"\bld\.global(\.nc)?\.v4\.\w32"
        if name.startswith(
            ("quantize_kernel<", "rows_kernel<", "reduce_kernel<", "columns_kernel<")
        ):
            assert re.search(loads, body), name
        if name.startswith(COPYING):
            assert re.search(r"\bst\.global\.v[24]\.\w32", body), name
        if name.startswith("dequantize_kernel<"):
            assert re.search(r"\bst\.global\.v4\.\w32", body), name


@needs_nvcc
def test_ptx_joins_sets_atomically_within_launch_bounds():
    for name, body in gpu_code.entries().items():
        if name.startswith(("reduce_kernel<", "columns_kernel<")):
            assert re.search(r"\batom\.global\.max\.s(32|64)|\bred\.global\.max\.s(32|64)", body), (
                name
            )
    most = gpu_code.most_threads()
    assert len(most) == len(gpu_code.entries())
    for name, threads in most.items():
        assert threads == (512 if name.startswith("rows_kernel<") else 256), name


@needs_nvcc
def test_no_kernel_spills_on_any_architecture():
    for arch, made in gpu_code.on_every_architecture().items():
        assert len(made) == len(gpu_code.entries())
        for name, (registers, stack, spilled) in made.items():
            assert (stack, spilled) == (0, 0), f"{name} on {arch}"
            assert registers <= 128, f"{name} on {arch}"  # 512 threads, or 2 blocks of 256


@needs_cuda
def test_the_extension_has_the_machine_code_it_names():
    elf, ptx = gpu_code.cubins(LIBRARY)
    assert tuple(elf) == quantkit.backend().cuda_archs
    assert ptx == ["sm_75"]


@needs_cuda
def test_the_cuda_runtime_is_inside_and_hidden():
    def nm(*options):
        command = ("nm", "-D", *options, LIBRARY)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert not re.search(r"\bcud(a|art)|__cuda", nm())
    linked = gpu_code.output("readelf", "-d", LIBRARY).stdout
    assert "cuda" not in linked


# ---- what torch sees ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_is_registered_for_every_device(name):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for overload in (overload.name() for overload in overloads(name)):
        assert has(overload, "CPU") and has(overload, "Meta")
        assert has(overload, "CUDA") == bool(quantkit.backend().cuda_archs)


def on_fake_cuda(args):
    return [torch.empty_like(a, device="cuda") if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("name", NAMES)
def test_fake_cuda_tensors_go_through(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for args in inputs(name):
        operator = overloads(name)[0]
        real = invoke(operator, args)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = invoke(operator, on_fake_cuda(args))
        for r, f in zip(flat(real), flat(fake), strict=True):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())
            assert f.device == torch.device("cuda:0")


def test_a_cuda_tensor_takes_scalar_parameters_of_the_cpu_and_no_others():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 6, device="cuda")
        one, many = torch.empty(()), torch.empty(4, 1)
        q = ops.quantize(x, one, one, -128, 127, torch.int8)
        assert q.device.type == "cuda"
        with pytest.raises(RuntimeError, match=r"scale: expected device cuda:0.*got cpu"):
            ops.quantize(x, many, one, -128, 127, torch.int8)
        with pytest.raises(RuntimeError, match=r"zero_point: expected device cpu.*got cuda:0"):
            ops.dequantize(many, one, torch.empty((), device="cuda"))


def test_compile_with_fake_cuda_inputs_has_no_graph_break():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def everything(x):
        q, x_hat, p = quantkit.quantize_dequant(x, True, sym=False)
        again = quantkit.dequantize_tensor(quantkit.quantize_tensor(x, p), p)
        return q, x_hat + again, quantkit.fake_quantize(x, p), quantkit.dynamic_quantize(x)[0]

    torch._dynamo.reset()
    with FakeTensorMode():
        compiled = torch.compile(everything, fullgraph=True, backend="eager")
        for result in compiled(torch.empty(4, 6, device="cuda")):
            assert result.device.type == "cuda"


# ---- offsets beyond 32 bits -----------------------------------------------------------------------


def far_apart(dtype, value):
    """Two rows of 40 elements more than 2^32 bytes apart, of which little memory is ever touched."""
    distance = 2**32 + 48
    memory = torch.empty(distance + 100, dtype=dtype)
    x = memory.as_strided((2, 40), (distance, 1))
    return x.copy_(value)


@pytest.mark.usefixtures("backend")
def test_offsets_beyond_32_bits():
    scale, zero_point = given((2, 40), [1, -1], torch.float32)
    q = values((2, 40), torch.float32).to(torch.int8)
    far, out = far_apart(torch.int8, q), far_apart(torch.int8, torch.zeros(2, 40))
    assert_same(
        ops.dequantize(far, scale, zero_point).contiguous(),
        reference.dequantize_op(q, scale, zero_point),
    )
    x = values((2, 40), torch.float32)
    args = (x, scale, zero_point, -128, 127, torch.int8)
    ops.quantize.out(*args, out=out)
    assert_same(out.contiguous(), reference.quantize_op(*args))
    half = x.to(torch.float16)
    chosen = (None, -128, 127, 1e-3, False, torch.int8)
    far = far_apart(torch.float16, half)
    for ours, right in zip(
        ops.dynamic_quantize(far, *chosen),
        reference.dynamic_quantize_op(half, *chosen),
        strict=True,
    ):
        assert_same(ours.contiguous(), right)


# ---- memory traffic ------------------------------------------------------------------------------

READS = [
    # x's shape, dtype, block_size, how many times all of x is read to choose parameters and quantize
    ((2, 4096), torch.bfloat16, [1, -1], 1),
    ((2, 16384), torch.bfloat16, [1, -1], 1),  # the most that a block holds
    ((2, 8192), torch.float32, [1, -1], 1),
    ((2, 16384), torch.float32, [1, -1], 2),
    ((40, 1024), torch.float16, [1, 128], 1),
    ((40, 1024), torch.float32, [1, 32], 1),
    ((3, 16376), torch.float16, [1, -1], 1),
    ((300, 40), torch.float32, [-1, 1], 2),
    ((300, 4000), torch.float32, None, 2),
    ((64, 64), torch.bfloat16, [16, 16], 2),
]


@pytest.mark.skipif("cuda_emu" not in quantkit.backend().isas, reason="built without the emulator")
@pytest.mark.parametrize("shape, dtype, blocks, times", READS, ids=str)
def test_x_is_read_as_often_as_the_table_says(shape, dtype, blocks, times):
    read = ctypes.CDLL(LIBRARY).quantkit_emu_bytes_read
    read.restype = ctypes.c_int64
    before = _load.extension.isa()
    _load.extension.set_isa("cuda_emu")
    try:
        x = values(shape, dtype, 1)
        read()
        _, scale, zero_point = ops.dynamic_quantize(x, blocks, -128, 127, 1e-3, False, torch.int8)
        assert read() == times * x.nbytes
        ops.quantize(x, scale, zero_point, -128, 127, torch.int8)
        assert read() == x.nbytes
        q = x.to(torch.int8)
        ops.dequantize(q, scale.float(), zero_point.float())
        assert read() == q.nbytes
    finally:
        _load.extension.set_isa(before)


# ---- the tests' way to another device -------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantize", "fake_quantize", "dynamic_quantize"])
def test_the_proxy_for_other_devices_keeps_strides_offsets_and_aliases(name, monkeypatch):
    """Tried on the CPU itself, which takes the place of another device."""
    seen = []

    def noted(overload):
        def call(*args, **outs):
            seen.append(args[0].untyped_storage().data_ptr())
            return overload(*args, **outs)

        return call

    proxy = cases._Operator(cases.Operators(), name)
    proxy._functional, proxy._out = map(noted, overloads(name))
    monkeypatch.setattr(cases.Operators, "device", "cpu")
    x = cases.STRIDES["sliced"](values((4, 6), torch.float32))
    p = tuple(given((4, 6), [1, -1], torch.float32))
    args = {
        "quantize": (x, *p, -128, 127, torch.int8),
        "fake_quantize": (x, *p, -128, 127),
        "dynamic_quantize": (x, [1, -1], -128, 127, 1e-8, True, torch.int8),
    }[name]
    right = getattr(ops, name)(*args)
    assert_same(proxy(*args), right)
    assert seen[0] != x.untyped_storage().data_ptr()
    if name == "fake_quantize":
        proxy.out(*args, out=x)  # in place
        assert_same(x.contiguous(), right.contiguous())


# ---- the emulator itself --------------------------------------------------------------------------

FAULTS = {
    "good": "ok",
    "divergent_barrier": "a divergent barrier or a stray shuffle: thread 0 of block 0 waits at the",
    "two_barriers": "waits at the barrier of faults.cpp",
    "stray_shuffle": "waits in the shuffle of faults.cpp",
    "some_lanes": "a shuffle of some lanes only",
    "read_past_the_end": "a read of 4 bytes out of bounds, 128 of 128 in x",
    "write_to_an_input": "a write of 4 bytes out of bounds",
    "misaligned": "a misaligned read of 16 bytes",
    "shared_index": "index 32 of 32 in the shared memory of faults.cpp",
    "too_much_shared": "more than 48 KiB of shared memory",
    "too_many_threads": "a block of 1056 threads",
    "no_blocks": "a grid of 0 blocks",
    "orders": "ok",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    program = tmp_path_factory.mktemp("emu") / "faults"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    sources = [EMU / "faults.cpp", EMU / "emulator.cpp"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program]
    subprocess.run([*compiler.split(), *sources, *flags], check=True)
    return program


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_finds(faults, fault):
    done = subprocess.run([faults, fault], capture_output=True, text=True)
    assert done.returncode == 0 and FAULTS[fault] in done.stdout, done.stdout + done.stderr
