"""Records calls of kernels for the torch-free driver, each compared with the reference.

Run with QUANTKIT_ISA=cuda_emu and QUANTKIT_EMU_RECORD=file: a development build's emulator writes there
what every call was given and what it returned. Argument: 1 for all calls, N for about one in N.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from cases import CODES, FLOATS, LAYOUTS, STRIDES, assert_same, given, values

import quantkit
from quantkit import reference

ops = torch.ops.quantkit
# Rows that one thread, several, or the whole of them share; columns; blocks.
LARGE = [
    ((1, 100_003), [1, -1]),
    ((50_003, 3), [-1, 1]),
    ((6, 20_011), [1, -1]),
    ((4, 20_011), [-1, 1]),
    ((200, 512), [2, 64]),
    ((700, 128), [1, -1]),
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


def check(operator, function, *args):
    assert_same(operator(*args), function(*args))


def record_given(x, scale, zero_point, code, low, high):
    """Everything that takes parameters."""
    args = (x, scale, zero_point, low, high)
    check(ops.quantize, reference.quantize_op, *args, code)
    check(ops._fake_quantize, reference.fake_quantize_op, *args)
    check(ops._fake_quantize_backward, reference.fake_quantize_backward_op, x, *args)
    q = reference.quantize_op(*args, code)
    check(ops.dequantize, reference.dequantize_op, q, scale, zero_point)


def record_chosen(x, blocks, code, low, high):
    """Everything that chooses them."""
    for symmetric in (True, False):
        args = (x, blocks, low, high, 1e-5, symmetric)
        check(ops.choose_qparams, reference.choose_qparams_op, *args, not symmetric)
        check(ops.dynamic_quantize, reference.dynamic_quantize_op, *args, code)
        check(ops.quantize_dequantize, reference.quantize_dequantize_op, *args, code)


def record_layouts(every):
    codes = itertools.cycle(CODES.items())
    narrow = itertools.cycle((False, False, True))
    all_of_them = list(enumerate(itertools.product(LAYOUTS, FLOATS)))
    for seed, ((shape, blocks, layout), dtype) in all_of_them[::every]:
        x = STRIDES[layout](values(shape, dtype, seed, special=seed % 2 == 0))
        code, (low, high) = next(codes)
        if next(narrow):
            low, high = low // 2 + 3, high // 2
        own = FLOATS[seed // len(FLOATS) % len(FLOATS)] if seed % 3 == 0 else dtype
        scale, zero_point = given(shape, blocks, own, seed, integral=seed % 5 != 0)
        record_given(x, scale, zero_point, code, low, high)
        record_chosen(x, blocks, code, low, high)


def record_large(every):
    for (shape, blocks), dtype in list(itertools.product(LARGE, FLOATS))[::every]:
        x = values(shape, dtype, seed=len(shape))
        scale, zero_point = given(shape, blocks, dtype)
        record_given(x, scale, zero_point, torch.int16, -300, 400)
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
        record_given(x, s, z, torch.int8, -128, 127)
        z = torch.tensor(ZERO_POINTS[(i + 3) % len(ZERO_POINTS)]).expand(64, 1)
        record_given(x.view(64, -1), s.expand(64, 1), z, torch.int16, -500, 400)


if __name__ == "__main__":
    assert quantkit.backend().isa == "cuda_emu", quantkit.backend()
    for record in (record_layouts, record_large, record_patterns):
        record(int(sys.argv[1]))
