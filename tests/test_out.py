"""`out=` tensors: any strides, nothing returned, untouched on error."""

from functools import partial

import pytest
import torch
from lib.backends import daily
from lib.cases import (
    STRIDES,
    arguments,
    assert_same,
    bits_of,
    check_results,
    flat,
    given,
    invoke,
    ops,
    values,
)

from quantkit import _load, reference
from quantkit.operators import OPERATORS

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.fallback]
X = values((6, 8), torch.float32, 1)
SCALE, ZERO = given((6, 8), [1, -1], torch.float32, 2)
CHOOSE = (X, [1, -1], -128, 127, 1e-8, False)
# Turns of formats whose numbers all dtypes of results hold.
CALLS = {
    name: arguments(name, X, [1, -1], 4 + i % 2, over=[4, 3]) for i, name in enumerate(OPERATORS)
}


def expected(name, args=None):
    """The results by the reference, by name."""
    _, names, function, *_ = OPERATORS[name]
    return dict(zip(names, flat(invoke(function, args or CALLS[name])), strict=True))


def call(name, outs, args=None):
    return invoke(partial(getattr(ops, name).out, **outs), args or CALLS[name])


def refused(name, outs, kind, *texts, args=None):
    """The call raises kind with texts, and no out changed a bit."""
    before = {k: bits_of(t) for k, t in outs.items() if t.device.type == "cpu"}
    with pytest.raises(kind) as caught:
        call(name, outs, args)
    for text in texts:
        assert text in str(caught.value)
    for k, bits in before.items():
        assert torch.equal(bits_of(outs[k]), bits), f"{k} was written"


@pytest.mark.parametrize("name", CALLS)
def test_results_in_any_strides(name):
    right = invoke(OPERATORS[name].reference, CALLS[name])
    for layout in (
        "contiguous",
        "misaligned",
        "transposed",
        "strided",
        "sliced",
        "every other row",
    ):
        check_results(name, CALLS[name], right, layout)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_outs_are_refused_and_untouched(name):
    results = expected(name)
    for wrong in results:
        right = {k: torch.ones(t.shape, dtype=t.dtype) for k, t in results.items()}
        t = right[wrong]
        longer = torch.ones(*t.shape[:-1], t.shape[-1] + 1, dtype=t.dtype)
        refused(name, right | {wrong: longer}, RuntimeError, wrong, str(tuple(longer.shape)))
        other = torch.ones(t.shape, dtype=torch.int32)
        refused(name, right | {wrong: other}, RuntimeError, wrong, "torch.int32", str(t.dtype))
        twice = torch.ones(t[:1].shape, dtype=t.dtype).expand(t.shape)
        refused(name, right | {wrong: twice}, RuntimeError, wrong, "overlap")
        inside = torch.ones(100, dtype=t.dtype).as_strided(t.shape, (2,) * t.dim())
        if t.numel() > t.shape[0]:
            refused(name, right | {wrong: inside}, RuntimeError, wrong, "overlap")


def test_an_output_on_another_device_is_refused():
    right = {k: torch.ones(t.shape, dtype=t.dtype) for k, t in expected("dynamic_quantize").items()}
    with pytest.raises(RuntimeError, match="q: expected device cpu, got meta"):
        call("dynamic_quantize", right | {"q": right["q"].to("meta")})


def test_overlap_with_an_input_is_refused():
    memory = torch.randn(200)
    x = memory[:48].view(6, 8)
    for out in (memory[:48].view(6, 8), memory[40:88].view(6, 8), memory[1:97:2].view(6, 8)):
        args = (X, SCALE, ZERO, -128, 127)
        grad = (x, *args)
        refused("_fake_quantize_backward", {"out": out}, RuntimeError, "overlaps grad", args=grad)
    codes, args = memory.view(torch.int8)[:48].view(6, 8), (x, SCALE, ZERO, -128, 127, torch.int8)
    refused("quantize", {"out": codes}, RuntimeError, "overlaps x", args=args)
    args = (X.to(torch.int8), memory[:6].view(6, 1), ZERO)
    refused("dequantize", {"out": x}, RuntimeError, "overlaps scale", args=args)
    codes = torch.zeros(64, dtype=torch.int8)
    seed = codes[40:56].view(torch.int64)
    args = (X, SCALE, None, -128, 127, "int8", {"seed": seed})
    out = {"out": codes[:48].view(6, 8)}
    refused("quantize.format", out, RuntimeError, "overlaps seed", args=args)


def test_overlap_of_a_single_byte_is_refused():
    memory = torch.ones(30)
    x, one, zero = memory[:10], torch.tensor(0.5), torch.tensor(0.0)
    args = (x, one, zero, -128, 127)
    for out in (memory[9:19], memory[9:29:2]):
        refused("fake_quantize", {"out": out}, RuntimeError, "overlaps x", args=args)
    call("fake_quantize", {"out": memory[10:20]}, args)
    for first in range(4):
        codes = memory.view(torch.int8)[first::4][:10]
        refused("quantize", {"out": codes}, RuntimeError, "overlaps x", args=(*args, torch.int8))
    for strides in ((1, 1), (2, 1), (3, 1), (4, 2)):
        twice = memory.as_strided((2, 4), strides)
        args = (X[:2, :4].contiguous(), one, zero, -128, 127)
        refused("fake_quantize", {"out": twice}, RuntimeError, "overlap each other", args=args)


def test_outputs_that_overlap_each_other_are_refused():
    one = torch.ones(6, 1)
    refused("choose_qparams", {"scale": one, "zero_point": one}, RuntimeError, "overlap")


def test_interleaved_memory_is_no_overlap():
    memory = torch.empty(6, 16)
    x, out = memory[:, :8], memory[:, 8:]
    x.copy_(X)
    args = (x, SCALE, ZERO, -128, 127)
    call("fake_quantize", {"out": out}, args)
    assert_same(out.contiguous(), reference.fake_quantize_op(X, *args[1:]))
    # Strides 2 and 3: no address twice, but no order of the strides shows it.
    weave = torch.empty(21).as_strided((3, 2), (2, 3))
    args = (X[:3, :2].contiguous(), torch.tensor(0.1), torch.tensor(0.0), -128, 127)
    call("fake_quantize", {"out": weave}, args)
    assert_same(weave.contiguous(), reference.fake_quantize_op(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fake_quantize_in_place(dtype):
    for layout in ("contiguous", "transposed", "strided"):
        x = STRIDES[layout](values((6, 8), dtype, 5))
        result = reference.fake_quantize_op(x, SCALE, ZERO, -128, 127).contiguous()
        assert ops.fake_quantize.out(x, SCALE, ZERO, -128, 127, out=x) is None
        assert_same(x.contiguous(), result)
    memory, one = torch.ones(60), torch.tensor(0.5)
    x = memory[:36].view(6, 6)
    for first, out in ((x, memory[1:37].view(6, 6)), (x, x.t()), (x.view(torch.int32), x)):
        args = (first, one, one, -128, 127)
        refused("fake_quantize", {"out": out}, RuntimeError, "overlaps x", args=args)


def test_in_place_whatever_the_strides_of_single_elements():
    x = values((1, 8), torch.float32, 5)
    args = (SCALE[:1], ZERO[:1], -128, 127)
    result = reference.fake_quantize_op(x, *args)
    ops.fake_quantize.out(x, *args, out=x.as_strided((1, 8), (1, 1)))
    assert_same(x, result)


def test_long_results_in_other_strides_than_x():
    """More elements than a chunk."""
    x = values((2, 3000), torch.float32, 3)
    scale, zero_point = given((2, 3000), [1, -1], torch.float32, 4)
    choose = (x, [1, -1], -128, 127, 1e-8, False, torch.int8)
    calls = {
        "fake_quantize": (x, scale, zero_point, -128, 127),
        "_fake_quantize_masked": (x, scale, zero_point, -128, 127),
        "_fake_quantize_backward": (STRIDES["strided"](x), x, scale, zero_point, -128, 127),
        "quantize_dequantize": choose,
    }
    for name, args in calls.items():
        results = expected(name, args)
        outs = {
            k: STRIDES["strided" if k in ("q", "mask") else "transposed"](torch.zeros_like(t))
            for k, t in results.items()
        }
        call(name, outs, args)
        for k, t in results.items():
            assert_same(outs[k].contiguous(), t)
        outs = {k: STRIDES["strided"](torch.zeros_like(t)) for k, t in results.items()}
        call(name, outs, args)
        for k, t in results.items():
            assert_same(outs[k].contiguous(), t)


@pytest.mark.parametrize(
    "shape, blocks",
    [
        ((6, 8), [1, 2]),
        ((40, 1100), [1, -1]),
        ((40, 1100), [-1, 1]),
        ((40, 1100), [1, 10]),
        ((40, 1100), [4, 10]),
        ((4, 6, 1100), [1, 1, 550]),
        ((9000, 4), [-1, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_scale_and_zero_point_in_strides_of_their_own(shape, blocks, layout, several_threads):
    x = STRIDES[layout](values(shape, torch.float32, 6))
    for i, kind in enumerate(("strided", "transposed", "every other row", "misaligned")):
        args = (x, blocks, -128, 127, 1e-8, False, torch.int8)
        results = expected("quantize_dequantize", args)
        layouts = {"scale": kind, "zero_point": ("transposed", "strided")[i % 2], "q": "contiguous"}
        outs = {
            k: STRIDES[layouts.get(k, "sliced")](torch.zeros(t.shape, dtype=t.dtype))
            for k, t in results.items()
        }
        call("quantize_dequantize", outs, args)
        for k, t in results.items():
            assert_same(outs[k].contiguous(), t.contiguous())


@pytest.mark.parametrize("repeated", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_results_of_x_that_repeats_itself(repeated):
    """In any strides of `out=`."""
    shape = (4, 6, 90)
    x = values([1 if d in repeated else n for d, n in enumerate(shape)], torch.float32, 7)
    x = x.expand(shape)
    for blocks in (None, [1, -1, -1], [-1, -1, 1], [1, 1, -1], [1, 1, 30]):
        q = values(shape, torch.float32, 9)[:1].to(torch.int8).expand(shape)
        for name in (name for name in OPERATORS if ".format" not in name):
            own = {} if name == "linear_w8a8" else {"q": q, "grad": x, "over": [3, 1, 40]}
            args = arguments(name, x, blocks, 5, **own)
            right = invoke(OPERATORS[name].reference, args)
            for layout in ("contiguous", "transposed", "strided"):
                check_results(name, args, right, layout)


@pytest.mark.parametrize("name", ["dynamic_quantize", "quantize_dequantize"])
def test_rows_that_repeat_under_one_parameter(name, threads):
    """More elements than are chosen and quantized at a time."""
    x = values((1, 16, 9000), torch.float32, 8).expand(3, 16, 9000)
    args = (x, [-1, 1, -1], -128, 127, 1e-8, False, torch.int8)
    right = invoke(OPERATORS[name].reference, args)
    for count in (1, 3):
        threads(count)
        check_results(name, args, right, "contiguous")


def test_a_refused_out_counts_as_unwritten():
    out = torch.ones(7, 8, dtype=torch.int8)
    refused("quantize", {"out": out}, RuntimeError, "out")
    assert out._version == 0


def test_bad_arguments_leave_outs_untouched():
    out = {"out": torch.ones(6, 8, dtype=torch.int8)}
    bad_scale = (X, torch.ones(4, 1), ZERO, -128, 127, torch.int8)
    refused("quantize", out, RuntimeError, "scale", args=bad_scale)
    refused("quantize", out, RuntimeError, "q_min", args=(X, SCALE, ZERO, 5, 3, torch.int8))
    outs = {k: torch.ones(t.shape, dtype=t.dtype) for k, t in expected("choose_qparams").items()}
    refused("choose_qparams", outs, RuntimeError, "block_size", args=(X, [1, 3], *CHOOSE[2:]))
    refused("choose_qparams", outs, RuntimeError, "eps", args=(*CHOOSE[:4], 0.0, False))


def test_empty_outs():
    x = torch.zeros(0, 3)
    out = torch.zeros(0, 3, dtype=torch.int8)
    ops.quantize.out(x, torch.tensor(1.0), torch.tensor(0.0), -128, 127, torch.int8, out=out)
    assert out.shape == (0, 3)


@pytest.mark.skipif(_load.extension is None, reason="only the kernels stream")
@pytest.mark.parametrize("by", daily([0, 1, 3], 1))
@pytest.mark.parametrize("blocks", [None, [1, -1], [-1, 1], [1, 559]], ids=str)
def test_outputs_large_enough_to_be_streamed(blocks, by):
    """Float outputs of 32 MiB and more are written past the caches, whole cache lines at a time."""
    shape = (5003, 1677)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(by))
    numel = x.numel()
    assert numel * 4 >= 32 << 20
    q = torch.empty(numel + by, dtype=torch.int8)[by:].view(shape)
    y = torch.full((numel + 2 * by + 2,), 7.0)
    y, around = y[by + 1 : by + 1 + numel].view(shape), y
    chosen = (x, blocks, -128, 127, 1e-8, blocks != [1, -1], torch.int8)
    expected = reference.quantize_dequantize_op(*chosen)
    scale, zero_point = (torch.empty_like(p) for p in expected[2:])
    ops.quantize_dequantize.out(*chosen, q=q, x_hat=y, scale=scale, zero_point=zero_point)
    for ours, theirs in zip((q, y, scale, zero_point), expected, strict=True):
        assert_same(ours, theirs)
    for write in (
        lambda: ops.dequantize.out(q, scale, zero_point, out=y),
        lambda: ops.fake_quantize.out(x, scale, zero_point, -128, 127, out=y),
    ):
        y.fill_(0)
        write()
        assert_same(y, expected[1])
    assert around[: by + 1].tolist() == [7.0] * (by + 1) == around[by + 1 + numel :].tolist()


@pytest.mark.skipif(_load.extension is None, reason="only the kernels stream")
def test_large_outputs_with_gaps():
    x, scale, zero_point = torch.randn(2048, 4096), torch.tensor(0.05), torch.tensor(1.0)
    whole = torch.full((2048, 8192), 7.0)
    args = (x, scale, zero_point, -128, 127)
    ops.fake_quantize.out(*args, out=whole[:, ::2])
    assert_same(whole[:, ::2].contiguous(), reference.fake_quantize_op(*args))
    assert (whole[:, 1::2] == 7).all()


@pytest.mark.parametrize("name", CALLS)
def test_lazily_negated_tensors(name):
    """The imaginary part of a conjugate: an input like any other, no output."""
    real = SCALE if name.startswith("dequantize") else X
    lazy = torch.complex(real, -real).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, real)
    args = list(CALLS[name])
    args[1 if name.startswith(("dequantize", "_fake_quantize_backward")) else 0] = lazy
    results = expected(name, args)
    outs = {k: torch.empty_like(t) for k, t in results.items()}
    call(name, outs, args)
    for k, t in results.items():
        assert_same(outs[k], t)
        if t.dtype == torch.float32:
            lazy_out = torch.complex(t, t).conj().imag
            refused(name, outs | {k: lazy_out}, RuntimeError, k, "lazily negated", args=args)
