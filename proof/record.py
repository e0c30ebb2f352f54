"""Records calls of kernels for the torch-free driver, each compared with the reference.

Run with QUANTKIT_ISA=cuda_emu and QUANTKIT_EMU_RECORD=file: a development build's emulator writes there
what every call was given and what it returned. Argument: 1 for all calls, N for about one in N.
Prints a hash of what the operators returned.
"""

import itertools
import sys

import torch
import xxhash
from covered import add_results
from lib.cases import (
    CODES,
    FLOATS,
    GRANULARITIES,
    STRIDES,
    assert_same,
    check_results,
    dense,
    given,
    given_arguments,
    values,
)

import quantkit
from quantkit._checks import REAL_DTYPES
from quantkit.formats import FORMATS
from quantkit.operators import OPERATORS

# Not those of the tests: short.json has the hashes of these calls.
LAYOUTS = [
    (shape, blocks, name)
    for (shape, every), name in itertools.product(GRANULARITIES, STRIDES)
    for blocks in every
]
# Rows that one thread, several, or the whole of them share; columns; blocks.
LARGE = [
    ((1, 100_003), [1, -1]),
    ((50_003, 3), [-1, 1]),
    ((6, 20_011), [1, -1]),
    ((4, 20_011), [-1, 1]),
    ((200, 512), [2, 64]),
    ((700, 128), [1, -1]),
    ((4_001, 21), [-1, 3]),
    ((70_000,), None),
]
SCALES = (
    1.0,
    0.5,
    float.fromhex("0x1.f63c0ep-7"),
    1e-41,
    1e-39,
    2.0**126,
    -0.25,
    0.0,
    float("nan"),
    float("inf"),
)
ZERO_POINTS = (0.0, 3.0, -128.0, 0.3, 200.5, float("nan"), float("-inf"))

digest = xxhash.xxh3_128()  # of the operators' results, whichever kernels they call


def check(name, *args, out=None, kept=True, **options):
    """One call, and another into outputs of the layout `out`; what the reference returns.

    Operators that contract 1 had not are not kept: the hash has those of short.json.
    """
    expected = OPERATORS[name].reference(*args, **options)
    check_results(name, (*args, options), expected, out)
    if kept:
        add_results(digest, expected)
    return expected


def record_given(x, grad, scale, zero_point, code, low, high, out=None):
    """Everything that takes parameters."""
    args = (x, scale, zero_point, low, high)
    q = check("quantize", *args, code, out=out)
    check("dequantize", q, scale, zero_point, out=out)
    expected = check("_fake_quantize", *args, out=out)
    if not x.is_floating_point():
        return
    check("_fake_quantize_backward", grad, *args, out=out)
    _, mask = check("_fake_quantize_masked", *args, out=out, kept=False)
    check("_masked_gradient", grad, mask, out=out, kept=False)
    y = dense(x)
    torch.ops.quantkit._fake_quantize.out(y, *args[1:], out=y)
    assert_same(y, dense(expected))


def record_chosen(x, blocks, code, low, high, out=None):
    """Everything that chooses them."""
    for symmetric in (True, False):
        args = (x, blocks, low, high, 1e-5, symmetric)
        check("choose_qparams", *args, not symmetric)
        check("dynamic_quantize", *args, code, out=out)
        check("quantize_dequantize", *args, code, out=out)


def record_sums_and_draws(x, blocks, scale, zero_point, turn, over):
    """Sums of errors, and codes that are drawn: of a whole tensor and of a part by turns."""
    f = FORMATS[turn % len(FORMATS)]
    limits = f.low, f.high
    *args, options = given_arguments(x, scale, zero_point, f, limits, turn, block_size=blocks)
    check("measure_limbs", *args, kept=False, over=over, **options)
    whole = [n + 3 for n in x.shape]
    index = list(quantkit.shard_index(whole, [turn % 4] * x.dim())) if turn % 2 else None
    drawn = {"seed": torch.tensor([2**40 + turn, -turn]), "index": index}
    check("_fake_quantize_masked.format", *args, kept=False, **options, **drawn)
    if x.shape[-1] % f.per_byte == 0:
        chosen = (x, blocks, *limits, 1e-5, f.low < 0, f.name)
        check("quantize.format", *args, kept=False, **options, **drawn)
        check("quantize_dequantize.format", *chosen, kept=False, **drawn)


def record_layouts(every):
    codes = itertools.cycle(CODES.items())
    narrow = itertools.cycle((False, False, True))
    outs = itertools.cycle((None, "strided", None, None, "transposed"))
    integers = itertools.cycle(d for d in REAL_DTYPES if not d.is_floating_point)
    all_of_them = list(enumerate(itertools.product(LAYOUTS, FLOATS)))
    for seed, ((shape, blocks, layout), dtype) in all_of_them[::every]:
        x = STRIDES[layout](values(shape, dtype, seed, special=seed % 2 == 0))
        code, (low, high) = next(codes)
        if next(narrow):
            low, high = low // 2 + 3, high // 2
        own = FLOATS[seed // len(FLOATS) % len(FLOATS)] if seed % 3 == 0 else dtype
        scale, zero_point = given(shape, blocks, own, seed, integral=seed % 5 != 0)
        grad = STRIDES["contiguous" if seed % 2 else layout](values(shape, dtype, seed + 1))
        out = next(outs)
        record_given(x, grad, scale, zero_point, code, low, high, out)
        record_chosen(x, blocks, code, low, high, out)
        over = (None, blocks, [2] * len(shape))[seed % 3]
        record_sums_and_draws(x, blocks, scale, zero_point, seed, over)
        if seed % 3 == 1:
            x = STRIDES[layout](
                (values(shape, torch.float32, seed).abs() * 20).clamp(max=120).to(next(integers))
            )
            record_given(x, None, scale, zero_point, code, low, high)
            record_chosen(x, blocks, code, low, high)


def record_large(every):
    # Of the short form, still every way in which threads share the work.
    all_of_them = list(enumerate(itertools.product(LARGE, FLOATS)))
    for i, ((shape, blocks), dtype) in all_of_them[:: min(every, 3)]:
        x = values(shape, dtype, seed=len(shape))
        scale, zero_point = given(shape, blocks, dtype)
        grad = values(shape, dtype, seed=len(shape) + 1)
        record_given(x, grad, scale, zero_point, torch.int16, -300, 400)
        record_sums_and_draws(x, blocks, scale, zero_point, i, (None, blocks)[i % 2])
        for code, limits in CODES.items():
            record_chosen(x, blocks, code, *limits)


def record_patterns(every):
    """Every half precision number, and floats of any bits, by parameters of every kind."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    bits = torch.randint(
        -(2**31), 2**31, (65536,), dtype=torch.int32, generator=torch.Generator().manual_seed(1)
    )
    inputs = [halves.view(torch.float16), halves.view(torch.bfloat16), bits.view(torch.float32)]
    for x, (i, scale) in itertools.product(inputs, list(enumerate(SCALES))[::every]):
        s, z = torch.tensor(scale), torch.tensor(ZERO_POINTS[i % len(ZERO_POINTS)])
        grad = x.flip(0)
        record_given(x, grad, s, z, torch.int8, -128, 127)
        z = torch.tensor(ZERO_POINTS[(i + 3) % len(ZERO_POINTS)]).expand(64, 1)
        x, grad = x.view(64, -1), grad.view(64, -1)
        record_given(x, grad, s.expand(64, 1), z, torch.int16, -500, 400)


if __name__ == "__main__":
    assert quantkit.backend().isa == "cuda_emu", quantkit.backend()
    for record in (record_layouts, record_large, record_patterns):
        record(int(sys.argv[1]))
    print(digest.hexdigest())
