"""More than 2^31 elements, and elements further apart than that.

The long half (QUANTKIT_LARGE=1) takes minutes, 13 GB of memory and of disk.
"""

import itertools
import mmap
import os
import shutil
from functools import partial

import pytest
import torch
from lib.backends import NATIVE, daily
from lib.cases import arguments, assert_same, flat, given, invoke, ops, values

from quantkit import reference
from quantkit.operators import OPERATORS

BEYOND = 2**31
pytestmark = pytest.mark.usefixtures("native")
long_form = pytest.mark.skipif(
    os.environ.get("QUANTKIT_LARGE") != "1", reason="QUANTKIT_LARGE=1 runs it: minutes, 13 GB"
)
SLICE = 1 << 24
BEST = [*NATIVE][-1:]


@pytest.fixture
def sparse(tmp_path):
    """Makes tensors of zeros in sparse files, which are gone with the tensors."""

    def make(numel, dtype, written=0):
        free = shutil.disk_usage(tmp_path).free
        needed = written * dtype.itemsize + (1 << 30)
        if free < needed:
            pytest.fail(f"{tmp_path} has {free >> 20} MiB free, but this test needs {needed >> 20}")
        path = tmp_path / "tensor"
        with open(path, "wb") as file:
            file.truncate(numel * dtype.itemsize)
        t = torch.from_file(str(path), shared=True, size=numel, dtype=dtype)
        path.unlink()
        return t

    return make


def zeros(numel, dtype, huge=False):
    """Zeros that take memory only where they are written, and on none of the disk."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=flags)
    if huge:  # a fault for each 4 KiB would take most of the time
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def in_reach(native):
    if native == "cuda":
        pytest.skip("the proxy for other devices copies whole storages")


# ---- offsets --------------------------------------------------------------------------------------

LIMITS = -128, 127
# 32 bits would make of these something negative, something small, and both by turns.
DISTANCES = {"2^31": BEYOND + 64, "2^32": 2 * BEYOND + 64, "3 * 2^30": 3 * (BEYOND // 2) + 64}


def apart(value, along, distance):
    """value with the indices of one dimension `distance` elements apart, behind as much memory."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2:
        return value
    strides = [distance] * 2
    strides[1 - along] = 1
    memory = zeros(distance * (value.shape[along] + 1), value.dtype)
    return memory.as_strided(value.shape, strides, distance - 33).copy_(value)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("along", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize(
    "dtype", daily([torch.float32, torch.bfloat16, torch.float64], torch.bfloat16), ids=str
)
def test_elements_far_apart(dtype, along, distance, native):
    """Inputs, parameters and outputs of every operator."""
    in_reach(native)
    shape = (3, 40) if along == 0 else (40, 3)
    x, grad = values(shape, dtype, 1), values(shape, dtype, 2)
    for blocks, name in itertools.product(([1, -1], [-1, 1], [1, 1]), OPERATORS):
        args = arguments(name, x, blocks, 4, grad=grad)
        right = flat(invoke(OPERATORS[name].reference, args))
        far = [apart(a, along, DISTANCES[distance]) for a in args]
        outs = [apart(torch.zeros_like(t), along, DISTANCES[distance]) for t in right]
        made = flat(invoke(getattr(ops, name), far))
        named = dict(zip(OPERATORS[name].results, outs, strict=True))
        invoke(partial(getattr(ops, name).out, **named), far)
        for ours, out, theirs in zip(made, outs, right, strict=True):
            assert_same(ours.contiguous(), theirs.contiguous())
            assert_same(out.contiguous(), theirs.contiguous())


# ---- more elements than 32 bits count: in the time that a test has -----------------------------------

N = BEYOND + 2**20 + 5
PLACES = 0, 2**30 - 50, BEYOND - 50, N - 100  # of 100 elements that are not 0


def written(x):
    """x, of zeros, with numbers in its PLACES."""
    for i, at in enumerate(PLACES):
        x[at : at + 100] = values((100,), torch.float32, i).to(x.dtype)
    return x


def by_slices(numel):
    return (slice(begin, min(begin + SLICE, numel)) for begin in range(0, numel, SLICE))


def assert_whole(ours, x, function):
    """ours is function(x), all of it: by slices, of which most are of zeros alone."""
    of_zeros = function(torch.zeros(SLICE, dtype=x.dtype))
    bits = of_zeros.view(torch.int64)
    assert ours.dtype == of_zeros.dtype and ours.shape == x.shape
    for s in by_slices(len(x)):
        if s.stop - s.start < SLICE or any(s.start - 100 < at < s.stop for at in PLACES):
            assert_same(ours[s], function(x[s]))
        else:
            assert torch.equal(ours[s].view(torch.int64), bits), f"elements from {s.start}"


@pytest.fixture(scope="module")
def codes():
    """Memory for N codes, used by each instruction set in turn."""
    return zeros(N, torch.int8, huge=True)


@pytest.mark.full
def test_quantize_and_choose(codes, native):
    in_reach(native)
    x = written(zeros(N, torch.float32, huge=True))
    scale, zero_point = torch.tensor(0.1), torch.tensor(3.0)
    codes.fill_(-1)
    ops.quantize.out(x, scale, zero_point, *LIMITS, torch.int8, out=codes)
    assert_whole(
        codes, x, lambda t: reference.quantize_op(t, scale, zero_point, *LIMITS, torch.int8)
    )
    small = torch.cat([x[at : at + 100] for at in PLACES] + [torch.zeros(1)])
    for symmetric, blocks, shape in ((True, None, ()), (False, [-1], (1,))):
        x[BEYOND + 4242] = small[-1] = -77.0 + 200 * symmetric
        args = *LIMITS, 1e-8, symmetric
        right = reference.choose_qparams_op(small, None, *args)
        made = ops.choose_qparams(x, blocks, *args)
        assert_same(made, tuple(t.view(shape) for t in right))


@pytest.mark.full
def test_expanded(codes, native):
    """A row, repeated 131,083 times without memory of its own, with parameters for each element of it."""
    in_reach(native)
    row = values((1, 16_384), torch.bfloat16, 1)
    x = row.expand(N // 16_384, 16_384)
    assert x.numel() > BEYOND
    q = codes[: x.numel()].view(x.shape)
    args = (*given(x.shape, [-1, 1], torch.bfloat16, 2), *LIMITS, torch.int8)
    q.zero_()
    ops.quantize.out(x, *args, out=q)
    right = reference.quantize_op(row, *args).expand(1024, -1).contiguous().view(torch.int64)
    for begin in range(0, len(q), 1024):
        ours = q[begin : begin + 1024].view(torch.int64)
        assert torch.equal(ours, right[: len(ours)]), f"from row {begin}"


# ---- the long half --------------------------------------------------------------------------------


def parameters_of(x, *args):
    """The reference's of a vector, whose extrema alone decide: found by slices."""
    extrema = [e for s in by_slices(len(x)) for e in x[s].aminmax()]
    return reference.choose_qparams_op(torch.stack(extrema), None, *args)


@long_form
def test_quantize_a_file(sparse, native):
    """All of it against the reference; per tensor, and with channels of more than 2^30 elements."""
    in_reach(native)
    x = written(sparse(N + 1, torch.float32))
    scale, zero_point = torch.tensor([[0.1], [0.07]]), torch.tensor([[3.0], [-4.0]])
    args = *LIMITS, torch.int8
    q = ops.quantize(x, scale[0, 0], zero_point[0, 0], *args)
    assert_whole(q, x, lambda t: reference.quantize_op(t, scale[0, 0], zero_point[0, 0], *args))
    x, q = x.view(2, -1), q.view(2, -1)
    ops.quantize.out(x, scale, zero_point, *args, out=q)
    for channel, s in itertools.product(range(2), by_slices(x.shape[1])):
        p = scale[channel, 0], zero_point[channel, 0]
        assert_same(q[channel, s], reference.quantize_op(x[channel, s], *p, *args))


@long_form
def test_dequantize_into_a_file(codes, sparse, native):
    in_reach(native)
    pattern = torch.arange(SLICE).mul(37).to(torch.int8)
    for i, s in enumerate(by_slices(N)):
        codes[s] = pattern[: s.stop - s.start] + i
    in_memory = [native] != BEST  # a file of 8 GiB takes minutes
    y = zeros(N, torch.float32, huge=True) if in_memory else sparse(N, torch.float32, written=N)
    p = torch.tensor(0.1), torch.tensor(3.0)
    ops.dequantize.out(codes, *p, out=y)
    for s in by_slices(N):
        assert_same(y[s], reference.dequantize_op(codes[s], *p))


@long_form
@pytest.mark.parametrize("channels", [False, True], ids=["tensor", "channel"])
def test_choose_quantize_and_dequantize(channels, codes, sparse, native):
    """The extreme lies beyond 2^31, also of a channel alone."""
    in_reach(native)
    x = written(sparse(N, torch.bfloat16))
    x[BEYOND + 4242] = 99.0
    shape, blocks = ((1, N), [1, -1]) if channels else ((N,), None)
    p_shape = (1, 1) if channels else ()
    args = *LIMITS, 1e-8, False
    right = tuple(t.view(p_shape) for t in parameters_of(x, *args))
    near, x = x, x.view(shape)
    assert_same(ops.choose_qparams(x, blocks, *args), right)
    p = {k: torch.empty(p_shape, dtype=x.dtype) for k in ("scale", "zero_point")}
    q, y = codes.view(shape), zeros(N, torch.float32, huge=True)
    near_p = [t.view(1) if channels else t for t in right]  # for slices of a vector

    def codes_of(t):
        return reference.quantize_op(t, *near_p, *LIMITS, torch.int8)

    def back_of(t):
        return reference.dequantize_op(codes_of(t), *near_p)

    ops.dynamic_quantize.out(x, blocks, *args, torch.int8, q=q, **p)
    assert_same(tuple(p.values()), right)
    assert_whole(codes, near, codes_of)
    q.zero_()
    ops.quantize_dequantize.out(x, blocks, *args, torch.int8, q=q, x_hat=y.view(shape), **p)
    assert_same(tuple(p.values()), right)
    assert_whole(codes, near, codes_of)
    assert_whole(y, near, back_of)
    del y
    y = zeros(N, torch.bfloat16, huge=True)
    ops.fake_quantize.out(x, *right, *LIMITS, out=y.view(shape))
    assert_whole(y, near, lambda t: back_of(t).to(torch.bfloat16))


@long_form
def test_channels_of_more_than_2_31_elements_each(sparse, native):
    in_reach(native)
    x = sparse(2 * N, torch.bfloat16)
    for channel, at in enumerate((BEYOND + 4242, N - 1)):
        written(x[channel * N :][:N])
        x[channel * N + at] = 50.0 + channel
    args = *LIMITS, 1e-8, False
    right = [parameters_of(x[channel * N :][:N], *args) for channel in range(2)]
    for shape, size, blocks in (((2, N), (2, 1), [1, -1]), ((2, 1, N), (2, 1, 1), [1, 1, -1])):
        made = ops.choose_qparams(x.view(shape), blocks, *args)
        assert_same(made, tuple(torch.stack(t).view(size) for t in zip(*right, strict=True)))


@long_form
def test_columns(sparse, codes, native):
    """Two channels whose elements lie in turn: each has fewer, the tensor has more."""
    in_reach(native)
    x = written(sparse(N, torch.bfloat16))[:-1].view(-1, 2)
    x[-2:] = torch.tensor([[-70.0, 55.0], [1.0, -99.0]])
    args = *LIMITS, 1e-8, False
    right = [parameters_of(x[:, column], *args) for column in range(2)]
    right = tuple(torch.stack(t).view(1, 2) for t in zip(*right, strict=True))
    q = codes[: x.numel()].view(x.shape)
    p = {k: torch.empty_like(t) for k, t in zip(("scale", "zero_point"), right, strict=True)}
    ops.dynamic_quantize.out(x, [-1, 1], *args, torch.int8, q=q, **p)
    assert_same(tuple(p.values()), right)
    for s in by_slices(len(x)):
        assert_same(q[s], reference.quantize_op(x[s], *right, *LIMITS, torch.int8))
