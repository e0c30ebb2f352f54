"""The caller's floating-point environment: it changes no bit of a result, and stays as it was."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from lib.backends import daily
from lib.cases import FLOATS, assert_same, ops, values
from lib.environment import (
    DEFAULT,
    EVERY_MODE,
    HARSH,
    KINDS,
    MACHINE,
    MODES,
    Case,
    Mode,
    cases_of,
    check,
    enter,
    environment,
    inputs,
    state,
    state_of,
)
from lib.threads import in_threads

import quantkit
from quantkit import reference

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.usefixtures("native", "several_threads"),
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or MACHINE not in ("x86_64", "aarch64"),
        reason="fenv_t is known for Linux on x86-64 and aarch64 only",
    ),
]


def test_the_modes_are_what_they_say():
    """Else the tests below prove nothing."""
    one, tiny, half = torch.tensor(1.0), torch.full((8,), 1e-39), torch.tensor(0.5)
    ulp = torch.tensor(2.0**-30)
    for mode in EVERY_MODE:
        with environment(mode):
            above, below = one + ulp, one - ulp
            vanished = tiny * half == 0
            flags = state()[1]
        assert (above > 1).item() == (mode.rounding == "up")
        assert (below < 1).item() == (mode.rounding in ("down", "zero"))
        assert vanished.all() if mode.ftz or mode.daz else not vanished.any()
        assert flags == (0x1F if MACHINE == "aarch64" else 0x3F) or not mode.flags
    assert state()[0] == state_of(DEFAULT)[0]


@pytest.mark.parametrize("out", [False, True], ids=["plain", "out"])
@pytest.mark.parametrize("shape", daily([(1, 1), (2, 3), (3, 700)], (2, 3), (3, 700)), ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_operator_in_every_mode(dtype, shape, out):
    cases = cases_of(dtype, shape, out=out)
    for mode in MODES if shape == (3, 700) else EVERY_MODE:
        check(mode, cases)


@pytest.mark.parametrize("layout", ["misaligned", "transposed", "strided", "every other row"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_tensors(dtype, layout):
    cases = cases_of(dtype, (6, 350), layout)
    for mode in (DEFAULT, Mode("up"), HARSH):
        check(mode, cases)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_threads(dtype):
    """More than 2 * 16384 elements, which the kernels of the CPU share."""
    cases = cases_of(dtype, (9, 5003))
    for mode in (Mode("up"), HARSH):
        check(mode, cases)
    check(HARSH, cases_of(dtype, (9, 5003), "transposed", out=True))


def converted():
    """Arguments that become another dtype first."""
    large = torch.arange(1, 4001, 2).view(20, 100) + 2**24
    scale, zero_point = torch.tensor(2.0**10), torch.tensor(-(2**14) + 1)
    wide = torch.tensor([0.1, 2049.0, 65519.9], dtype=torch.float64).view(3, 1)
    x = values((3, 700), torch.float16)
    return [
        Case("quantize", (large, scale, zero_point, -128, 127, torch.int8)),
        Case("fake_quantize", (large, torch.tensor(1.0), -(large[:1] + 2), -128, 127)),
        Case("dequantize", (large, torch.tensor(0.1), large[:1] + 1)),
        Case("dequantize", (large.double() / 3, torch.tensor(0.1), torch.tensor(0.3))),
        Case("choose_qparams", (large, [1, -1], -128, 127, 1e-8, False)),
        Case("quantize_dequantize", (large, None, -32768, 32767, 1e-8, True, torch.int16)),
        Case("quantize", (x, wide, wide, -128, 127, torch.int8)),
        Case("quantize", (x, torch.tensor(0.1), wide[1, 0], -128, 127, torch.int8)),
        Case("quantize", (x, wide.half(), wide.to(torch.int64), -30000, 30000, torch.int16)),
        Case("fake_quantize", (x.bfloat16(), wide[0, 0], wide, 0, 255)),
    ]


def test_arguments_that_are_converted_first():
    cases = converted()
    for mode in EVERY_MODE:
        check(mode, cases)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_place(dtype):
    x, *rest = inputs((3, 700), dtype, "between", [1, -1], 1)
    right = reference.fake_quantize_op(x, *rest, -128, 127)
    for mode in MODES:
        y = x.clone()
        with environment(mode):
            ops.fake_quantize.out(y, *rest, -128, 127, out=y)
        assert_same(y, right)


def test_outputs_that_are_streamed():
    x = values((1 << 23,), torch.float32) * 1e-38
    args = (x, torch.tensor(1e-39), torch.tensor(0.0), -128, 127)
    y, right = torch.empty_like(x), reference.fake_quantize_op(*args)
    with environment(HARSH):
        ops.fake_quantize.out(*args, out=y)
    assert_same(y, right)


def test_a_number_that_is_denormal_is_above_0_for_eps():
    x = torch.zeros(3, 700, dtype=torch.float64)
    args = (x, None, -128, 127, 5e-324, True)
    case = Case("choose_qparams", args)
    assert case.right[0] == 5e-324
    check(DEFAULT, [case])
    check(Mode(daz=True), [case])


def test_a_caller_that_flushes_denormals():
    """As torch has it: torch.set_flush_denormal()."""
    tiny = torch.full((8,), 1e-39)
    cases = cases_of(torch.float32, (3, 700))
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        assert (tiny * 0.5 == 0).all()
        results = [case() for case in cases]
        assert (tiny * 0.5 == 0).all(), "the caller's setting is lost"
    finally:
        torch.set_flush_denormal(False)
    for case, result in zip(cases, results, strict=True):
        case.compare(result)


def test_the_reference_flushes_as_its_caller():
    """As docs/numerics.md has it: other bits where a number is subnormal, and there alone."""
    x = torch.tensor([3e-39, -1e-39, 2.0])
    normal, tiny = (quantkit.QuantizationParams(s, 0.0, -7, 7) for s in (0.5, 1e-39))
    of = quantkit.reference.quantize_tensor
    codes = [of(x, normal), of(x, tiny)]
    assert codes[1].tolist() == [3, -1, 7]
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        flushed = [of(x, normal), of(x, tiny)]
        kernels = quantkit.quantize_tensor(x, tiny)
    finally:
        torch.set_flush_denormal(False)
    assert_same(flushed[0], codes[0])
    assert flushed[1].tolist() == [0, 0, 7]
    assert_same(kernels, codes[1])


def test_a_call_that_raises():
    x, scale, zero = torch.randn(40, 1000), torch.tensor(0.1), torch.tensor(0.0)
    never = torch.empty(1).expand(2**46)
    refused = {
        "does not fit": lambda: ops.quantize(x, scale.expand(7), zero, -128, 127, torch.int8),
        "eps": lambda: ops.choose_qparams(x, None, -128, 127, -1.0, True),
        "overlap": lambda: ops.fake_quantize.out(x, x[:, :1], zero, -128, 127, out=x),
        "memory": lambda: ops.dequantize(never, scale, zero),
    }
    for mode, (text, call) in itertools.product(MODES, refused.items()):
        with environment(mode):
            before = state()
            with pytest.raises((RuntimeError, ValueError), match=text):
                call()
            after = state()
        assert after[0] == before[0]
        assert after[1] & before[1] == before[1]


@pytest.mark.skipif(MACHINE != "x86_64", reason="only the control bits are restored")
def test_kernels_raise_no_flag():
    """Divisions by 0, overflow, underflow, NaN: none of it is seen by the caller."""
    x = torch.tensor([1e30, 1e-40, 3.0, float("nan"), float("inf")]).repeat(20, 2000)
    y = torch.empty_like(x)
    q = torch.empty(x.shape, dtype=torch.int8)
    args = [(x, torch.tensor(s), torch.tensor(0.3), -128, 127) for s in (0.0, 1e-30, 1e30)]
    with environment(DEFAULT):
        for each in args:
            ops.fake_quantize.out(*each, out=y)
            ops.quantize.out(*each, torch.int8, out=q)
        assert state()[1] == 0
        assert x.div(0.1).isnan().any() and state()[1] != 0


# ---- other threads, other processes ---------------------------------------------------------------


def test_threads_that_differ():
    """Each thread in a mode of its own, all at the same time, their calls on several threads each."""
    modes = [*MODES, DEFAULT]
    every = [cases_of(torch.float32, (9, 5003))[::5] for _ in modes]
    results = [[] for _ in modes]

    def work(i):
        enter(modes[i])
        before = state()
        for case in every[i]:
            results[i].append((case(), state()))
        results[i].append(before)

    in_threads(work, len(modes))
    assert state()[0] == state_of(DEFAULT)[0]
    for cases, (*made, before) in zip(every, results, strict=True):
        for case, (result, after) in zip(cases, made, strict=True):
            case.compare(result)
            assert after[0] == before[0]


def test_worker_threads_that_were_begun_in_another_mode():
    """OpenMP's threads keep the environment of the thread that began them: here not the caller's."""
    tiny, half = torch.full((1 << 18,), 1e-39), torch.tensor(0.5)
    cases = cases_of(torch.float32, (9, 5003))[::3]
    seen, results = [], []

    def work(_):
        torch.set_num_threads(4)
        with environment(HARSH):
            tiny.mul(half)  # begins them
        seen.append(tiny.mul(half))
        results.extend(case() for case in cases)
        seen.append(tiny.mul(half))

    in_threads(work, 1)
    for case, result in zip(cases, results, strict=True):
        case.compare(result)
    before, after = ((each == 0).sum().item() for each in seen)
    assert 0 < before < tiny.numel(), "the worker threads are in the caller's mode"
    assert after == before, "the worker threads have lost theirs"


def test_a_forked_child(native, torch_process):
    if native == "cuda":
        pytest.skip("CUDA does not survive fork()")
    program = (
        "import sys; sys.path.append('tests')\n"
        f"import lib.environment; lib.environment.in_parent_and_child({native!r})"
    )
    done = torch_process.run(program, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- autograd and the compiler --------------------------------------------------------------------


def gradients(x, qparams, grad):
    """The result and the gradient of a backward pass."""
    x = x.detach().requires_grad_()
    y = quantkit.fake_quantize(x, qparams)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_backward_pass(dtype, native):
    if native == "cuda":
        pytest.skip("the proxy for other devices has operators only")
    for kind in KINDS:
        x, *rest = inputs((9, 5003), dtype, kind, [1, -1], 3)
        grad = inputs((9, 5003), dtype, "denormal", None, 4)[0]
        args = (x, *rest, -100, 100)
        qparams = quantkit.QuantizationParams(*args[1:])
        right = (
            reference.fake_quantize_op(*args),
            reference.fake_quantize_backward_op(grad, *args),
        )
        results = []

        def work(i, call=(x, qparams, grad), results=results):
            if i:
                enter(HARSH)
            before = state()
            results.append(gradients(*call))
            results.append(before[0] == state()[0])

        in_threads(work, 2)
        for mode in (Mode("up"), HARSH):
            with environment(mode):
                results.append(gradients(x, qparams, grad))
        for result in results:
            assert result is True or assert_same(result, right) is None


def test_a_compiled_call(native):
    if native == "cuda":
        pytest.skip("the proxy for other devices has operators only")

    def everything(x):
        q, x_hat, p = quantkit.quantize_dequant(x, True, sym=False)
        return q, x_hat, p.scale, p.zero_point, quantkit.fake_quantize(x, p)

    x = inputs((9, 5003), torch.float32, "denormal", [1, -1], 5)[0]
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    compiled(x)
    chosen = reference.quantize_dequantize_op(x, [1, -1], -128, 127, 1e-8, False, torch.int8)
    right = (*chosen, reference.fake_quantize_op(x, *chosen[2:], -128, 127))
    for mode in MODES:
        with environment(mode):
            before = state()
            result = compiled(x)
            after = state()
        assert_same(tuple(result), right)
        assert after[0] == before[0]
