"""Thread counts and calling threads."""

import functools
import itertools

import pytest
import torch
from lib.backends import on_every_backend, with_results
from lib.cases import assert_same, given, values

from quantkit import reference

ops = torch.ops.quantkit
native = pytest.mark.usefixtures("native")
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


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_any_number_of_threads(threads, count, dtype):
    threads(count)
    for args, right in cases(dtype):
        assert_same(results(*args), right)


@native
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


@pytest.mark.usefixtures("several_threads")
@on_every_backend(emulated=None)
def test_few_columns():
    """Many rows of few, an extreme in turn near each border: of threads, periods and the tail."""
    for columns, dtype in itertools.product(
        (2, 3, 4, 5, 8, 16, 85, 255, 257), (torch.float32, torch.float16, torch.float64)
    ):
        numel = 3 * 16_500 + columns * 7
        x = torch.ones(numel // columns, columns, dtype=dtype)
        n = x.numel()
        borders = {b for i in (1, 2) for b in (n * i // 3 - n * i // 3 % 64, n * i // 3)}
        places = {0, 1, columns, 255, 256, 1023, 1024, n // 2}
        places |= {n - k for k in (1025, 257, columns + 1, 1)}
        places |= {b + i for b in borders for i in (-columns, -1, 0, 1, columns)}
        for place in sorted(places):
            x = x.clone()
            x.view(-1)[place] = -2 if place % 2 else 3
            yield "choose_qparams", (x, [-1, 1], -128, 127, 1e-3, place % 3 == 0)
        x = x.clone()
        x.view(-1)[::7] = values((n,), dtype, columns)[::7]
        yield "quantize_dequantize", (x, [-1, 1], -128, 127, 1e-8, False, torch.int8)
        yield "quantize", (x, *given(x.shape, [-1, 1], dtype, 3), 0, 255, torch.uint8)


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@on_every_backend(emulated=None)
def test_groups_across_memory(dtype):
    """w.t() with groups along its rows: neighbours in memory have parameters that lie apart.

    Long rows are cut into tiles, but for those that no number near a tile's length divides.
    """
    for i, (rows, columns) in enumerate(
        [(1025, 12), (1031, 8), (2048, 24), (3000, 6), (2 * 1031, 4), (5 * 1024, 8)]
    ):
        x = values((columns, rows), dtype, i).t()
        for k, group in enumerate((2, columns // 2, columns)):
            for blocks in ([1, group], [2 if rows % 2 == 0 else -1, group]):
                p = tuple(given(x.shape, blocks, dtype, k))
                yield "quantize", (x, *p, -128, 127, torch.int8)
                yield "dequantize", (x.to(torch.int8), *p)
                yield "_fake_quantize_masked", (x, *p, -128, 127)
                choose = x, blocks, -128, 127, 1e-8, (i + k) % 2 == 0
                yield "choose_qparams", choose
                yield "quantize_dequantize", (*choose, torch.int8)
        # One of both changes along the rows of memory, the other along none or across.
        each, one = (tuple(given(x.shape, b, dtype, 7)) for b in ([1, columns], [-1, 2]))
        yield "fake_quantize", (x, each[0], one[1], -128, 127)
        yield "fake_quantize", (x, one[0], each[1], -128, 127)


@functools.cache
def many_states():
    """More states than a stack takes, and than 64 KiB: of each thread, of all together, of a slab."""
    shapes = [
        ((50, 9_000), [-1, 1], torch.float64),  # each thread has all
        ((7, 40_000), [-1, 1], torch.float64),  # each thread has a part
        ((60_000, 2), [1, -1], torch.float32),  # a slab for each row
        ((3, 300, 90), [-1, 1, 1], torch.bfloat16),
        ((2, 20_000, 3), [1, 1, -1], torch.float16),
        ((2, 4, 9_000), [1, -1, 2], torch.float32),
    ]
    # The states of one thread on both sides of 4 KiB and of 64 KiB, at 16 bytes each.
    for kept in (4096 // 16, 65536 // 16):
        shapes += [((20, kept + more), [-1, 1], torch.float64) for more in (-1, 0, 1)]

    def calls():
        for i, (shape, blocks, dtype) in enumerate(shapes):
            x = values(shape, dtype, i)
            for symmetric in (True, False):
                yield "choose_qparams", (x, blocks, -128, 127, 1e-8, symmetric)
                yield "dynamic_quantize", (x, blocks, -128, 127, 1e-8, symmetric, torch.int8)

    return list(with_results(calls()))


@native
@pytest.mark.parametrize("count", [1, 2, 3])
def test_many_states(threads, count):
    threads(count)
    for name, args, right in many_states():
        assert_same(getattr(ops, name)(*args), right)
