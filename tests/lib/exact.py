"""float32 steps in exact arithmetic: Python's fractions, each step rounded once. Finite numbers only."""

import itertools
from fractions import Fraction

# Mantissa bits and the exponent of the smallest normal number.
FLOAT32 = (23, -126)
FLOATS = {"float8_e4m3fn": (3, -6), "float8_e5m2": (2, -14), "float4_e2m1fn": (1, 0)}


def exponent(v):
    """floor(log2 |v|) of a fraction that is not 0."""
    e = abs(v).numerator.bit_length() - abs(v).denominator.bit_length()
    return e - (abs(v) < Fraction(2) ** e)


def nearest(v, mantissa, least):
    """A fraction rounded half to even to a binary float format without upper limit."""
    v = Fraction(v)
    if v == 0:
        return v
    step = Fraction(2) ** (max(exponent(v), least) - mantissa)
    return round(v / step) * step  # Python's round is half to even


def f32(v):
    return nearest(v, *FLOAT32)


def clip(v, low, high):
    return min(max(v, low), high)


def number(name, x, scale, zero_point, low, high, round_first):
    """The number that x's code stands for."""
    v = f32(x / scale)
    if name in FLOATS:
        return nearest(clip(v, low, high), *FLOATS[name])
    v = f32(round(v) + zero_point) if round_first else f32(v + zero_point)
    return clip(round(v), low, high)


def is_inside(name, x, scale, zero_point, low, high, round_first):
    v = f32(x / scale)
    if name not in FLOATS:
        v = f32(round(v) + zero_point) if round_first else round(f32(v + zero_point))
    return low <= v <= high


def back(q, scale, zero_point):
    return f32(f32(q - zero_point) * scale)


def power_of_two(rule, name, m, high, eps):
    """The exponent of the scale for max |x| = m."""
    if rule == "ceil":
        s = max(f32(m / high), eps)
        e = exponent(s) + (s != Fraction(2) ** exponent(s))
    else:
        if rule == "even" and m:  # rounded half up to the format's mantissa
            step = Fraction(2) ** (max(exponent(m), FLOAT32[1]) - FLOATS[name][0])
            m = (m / step + Fraction(1, 2)) // 1 * step
        e = max(exponent(m) - exponent(Fraction(high)) if m else -127, exponent(eps))
    return clip(e, -127, 127)


def chosen(name, block, low, high, eps, symmetric, include_zero=False, scale_rule=None,
           scale_dtype=None, global_scale=1):  # fmt: skip
    """(scale, zero_point) of the numbers of a block."""
    eps, m, kind = f32(Fraction(eps)), max(map(abs, block)), str(scale_dtype)
    if symmetric:
        if scale_rule not in (None, "half_range") or "e8m0" in kind:
            e = power_of_two(scale_rule or "ceil", name, m, max(high, 1), eps)
            return Fraction(2) ** e, Fraction(0)
        divisor = Fraction(max(high - low, 1), 2) if scale_rule else max(high, 1)
        s = max(f32(f32(m / divisor) / f32(Fraction(global_scale))), eps)
        s = nearest(min(s, 448), *FLOATS["float8_e4m3fn"]) if "e4m3" in kind else s
        return s, Fraction(0)
    x_min, x_max = min(block), max(block)
    if include_zero:
        x_min, x_max = min(x_min, Fraction(0)), max(x_max, Fraction(0))
    scale = max(f32(f32(x_max - x_min) / max(high - low, 1)), eps)
    return scale, clip(f32(low - round(f32(x_min / scale))), low, high)


def blocks_of(shape, block_size):
    """(index of a parameter, indices of its elements), for every block; the last may be short."""
    sizes = [n if b == -1 else b for n, b in zip(shape, block_size, strict=True)]
    counts = [-(-n // b) for n, b in zip(shape, sizes, strict=True)]
    for index in itertools.product(*map(range, counts)):
        ranges = (
            range(i * b, min((i + 1) * b, n)) for i, b, n in zip(index, sizes, shape, strict=True)
        )
        yield index, list(itertools.product(*ranges))
