"""Thread counts, calling threads, and the caller's floating-point environment."""

import ctypes
import functools
import platform
import threading

import pytest
import torch
from lib.cases import assert_same, given, values

from quantkit import reference

ops = torch.ops.quantkit
pytestmark = pytest.mark.usefixtures("native")
SHAPES = [
    ((1, 200_003), [1, -1]),
    ((200_003, 3), [-1, 1]),
    ((10, 20_011), [1, -1]),
    ((640, 512), [2, 64]),
]


def results(x, blocks, scale, zero_point):
    return (
        *ops.quantize_dequantize(x, blocks, -128, 127, 1e-8, False, torch.int8),
        *ops.choose_qparams(x, None, -128, 127, 1e-8, True),
        ops.quantize(x, scale, zero_point, -128, 127, torch.int8),
        ops.fake_quantize(x, scale, zero_point, -128, 127),
    )


def expected(x, blocks, scale, zero_point):
    return (
        *reference.quantize_dequantize_op(x, blocks, -128, 127, 1e-8, False, torch.int8),
        *reference.choose_qparams_op(x, None, -128, 127, 1e-8, True),
        reference.quantize_op(x, scale, zero_point, -128, 127, torch.int8),
        reference.fake_quantize_op(x, scale, zero_point, -128, 127),
    )


@functools.cache
def cases(dtype):
    """(arguments, what the reference makes of them)."""
    made = []
    for i, (shape, blocks) in enumerate(SHAPES):
        args = values(shape, dtype, i), blocks, *given(shape, blocks, dtype, i)
        made.append((args, expected(*args)))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_any_number_of_threads(threads, count, dtype):
    threads(count)
    for args, right in cases(dtype):
        assert_same(results(*args), right)


@pytest.mark.parametrize("row", [3, 5, 7])
def test_extremes_in_short_rows_that_two_threads_share(threads, row):
    """Seven at a time, one for each parameter, over all that lies near a border between threads."""
    columns = 7 * row
    for count in (2, 3, 5):
        x = torch.ones(count * 16_500 // columns, columns)
        threads(count)
        for i in range(1, count):
            border = x.numel() * i // count
            for first in range(border - 64 - columns, border + columns, columns):
                for place in range(first, first + row):
                    extremes = x.view(-1)[place : place + columns : row]
                    extremes[:] = torch.arange(2.0, 9.0) * (-1) ** place
                    args = (x, [-1, row], -128, 127, 1e-3, place % 3 == 0)
                    assert_same(ops.choose_qparams(*args), reference.choose_qparams_op(*args))
                    extremes[:] = 1


def test_from_many_python_threads(several_threads):
    args, right = cases(torch.float32)[3]
    failures = []

    def work():
        try:
            for _ in range(3):
                assert_same(results(*args), right)
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_a_caller_that_flushes_denormals_gets_the_same_bits(several_threads):
    shape, blocks = SHAPES[3]
    x = values(shape, torch.float32, special=True) * 1e-38
    scale, zero_point = torch.full((320, 8), 1e-41), torch.full((320, 8), 0.5)
    right = expected(x, blocks, scale, zero_point)
    tiny, scale_of_tiny, zero = torch.full((8,), 1e-39), torch.tensor(1e-39), torch.tensor(0.0)
    assert (tiny * 0.5 != 0).all()
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        assert (tiny * 0.5 == 0).all()
        actual = results(x, blocks, scale, zero_point)
        small = ops.quantize(tiny, scale_of_tiny, zero, -128, 127, torch.int8)
        assert (tiny * 0.5 == 0).all(), "the caller's setting is lost"
    finally:
        torch.set_flush_denormal(False)
    assert_same(actual, right)
    assert small.tolist() == [1] * 8


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of the roundings of x86-64")
@pytest.mark.parametrize("rounding", [0x400, 0x800, 0xC00], ids=["down", "up", "to zero"])
def test_a_caller_with_another_rounding_gets_the_same_bits(rounding, several_threads):
    (args, right), libm = cases(torch.float32)[3], ctypes.CDLL(None)
    before = libm.fegetround()
    assert libm.fesetround(rounding) == 0
    try:
        actual = results(*args)
        assert libm.fegetround() == rounding, "the caller's setting is lost"
    finally:
        libm.fesetround(before)
    assert_same(actual, right)
