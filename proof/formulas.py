"""Codes, draws, sums of errors and scales by numpy and Python's integers, not by quantkit."""

import math

import ml_dtypes
import numpy as np
import torch

E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn


def as_codes(v, f):
    """What v becomes, one code an element, by casts of numpy, not by quantkit's formats."""
    if f.has_zero_point:
        v = v.numpy()
        return torch.from_numpy(np.where(np.isnan(v), 0, np.clip(np.rint(v), f.low, f.high)))
    v = torch.clamp(v, f.low, f.high).nan_to_num(0.0).numpy(), v.isnan()
    codes = torch.from_numpy(v[0].astype(getattr(ml_dtypes, f.name)).view(np.uint8))
    return torch.where(v[1], 0x7F if f.bits == 8 else 0, codes)


def apart(q, f):
    """Codes that share a byte, one in each element."""
    shifts = torch.arange(f.per_byte) * f.bits
    return (q[..., None].to(torch.int32) >> shifts).flatten(-2) & (2**f.bits - 1)


def as_numbers(q, f):
    """The numbers of codes, of which several may share a byte, by casts of numpy."""
    if not f.has_zero_point:
        codes = q.view(torch.uint8) if f.per_byte == 1 else apart(q, f).to(torch.uint8)
        numbers = codes.numpy().view(getattr(ml_dtypes, f.name)).astype(np.float32)
        return torch.from_numpy(numbers)
    if f.per_byte == 1:
        return q.to(torch.float32)
    codes = apart(q, f).to(torch.float32)
    return torch.where(codes > f.high, codes - 2**f.bits, codes)


def as_scale(scale):
    """The float32 of a scale."""
    if scale.dtype != E8M0:
        return scale
    code = scale.view(torch.uint8).to(torch.float64)
    return torch.where(code == 255, math.nan, 2.0 ** (code - 127)).to(torch.float32)


def draws_of(seed, stream, n):
    """16 bits for each of n places from 0 on: Philox4x32-10 by numpy, not quantkit's."""
    low = 2**32 - 1
    counter = np.arange((n + 7) // 8, dtype=np.uint64)
    a, b = counter & low, counter >> 32
    c, d = np.full_like(a, stream & low), np.full_like(a, stream >> 32 & low)
    k, m = seed & low, seed >> 32 & low
    for _ in range(10):
        p, r = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = r >> 32 ^ b ^ np.uint64(k), r & low, p >> 32 ^ d ^ np.uint64(m), p & low
        k, m = k + 0x9E3779B9 & low, m + 0xBB67AE85 & low
    words = np.stack([a, b, c, d], 1)
    return np.stack([words & 0xFFFF, words >> 16], 2).reshape(-1)[:n]


def drawn_numbers(v, f, u):
    """What v becomes, in float64: one of its two neighbours among all numbers of the format."""
    v = np.clip(v.numpy().astype(np.float64), f.low, f.high)
    nan, size = np.isnan(v), np.abs(np.nan_to_num(v))
    if f.has_zero_point:
        below = np.floor(size)
        above = below + 1
    else:
        every = np.arange(2 ** (f.bits - 1), dtype=np.uint8).view(getattr(ml_dtypes, f.name))
        every = every.astype(np.float64)
        every = np.append(every[every <= f.high], np.inf)
        at = np.searchsorted(every, size, "right")
        below, above = every[at - 1], every[at]
    made = np.copysign(np.where((size - below) / (above - below) > u, above, below), v)
    return np.where(nan, np.nan if f.bits == 8 and not f.has_zero_point else 0.0, made)


def whole_sum(t):
    """2^298 times the sum of t², of finite float32 t: a Python int, an exponent at a time."""
    bits = t.numpy().view(np.uint32).astype(np.int64) & 0x7FFFFFFF
    total = 0
    for field in np.unique(bits >> 23).tolist():
        fraction = bits[bits >> 23 == field] & 0x7FFFFF
        square = (fraction + (2**23 if field else 0)) ** 2
        some = (int((square >> 24).sum()) << 24) + int((square & 0xFFFFFF).sum())
        total += some << 2 * max(field - 1, 0)
    return total


SMALLEST = {E8M0: 2.0**-127, E4M3: 2.0**-6}


def expected_scales(x, f, rule, dtype, global_scale):
    """Scales by another formulation: in float64 and by numpy's frexp, exact but for the two quotients."""
    m, eps = x.abs().numpy(), SMALLEST.get(dtype, 2.0**-126)
    finite = np.where(np.isfinite(m), m, 1.0).astype(np.float64)
    if rule is None:
        s = m / np.float32(f.high)
        s = s if global_scale is None else s / np.float32(global_scale)
        s = np.maximum(s, np.float32(eps))
        if dtype != E4M3:
            return torch.from_numpy(s)
        codes = np.minimum(np.nan_to_num(s, posinf=448), 448).astype(ml_dtypes.float8_e4m3fn)
        codes = np.where(np.isnan(m), 0x7F, codes.view(np.uint8))
        return torch.from_numpy(codes.astype(np.uint8)).view(E4M3)
    if rule == "ceil":
        s = np.maximum((finite.astype(np.float32) / np.float32(f.high)), np.float32(eps))
        fraction, exponent = np.frexp(s.astype(np.float64))
        c = exponent - 1 + (fraction != 0.5) + 127
    elif rule in ("floor", "even"):
        if rule == "even":  # to a bit more than the format's mantissa, half away from zero
            spacing = 2.0 ** (np.maximum(np.frexp(finite)[1], -125) - 1 - f.mantissa)
            finite = np.floor(finite / spacing + 0.5) * spacing
        exponent = np.where(finite >= 2.0**-126, np.frexp(finite)[1] - 1 + 127, 0)
        c = np.maximum(exponent - int(math.log2(f.high)), 0 if dtype == E8M0 else 1)  # eps's field
    else:
        raise NotImplementedError(f"no second formulation of the rule {rule!r}")
    c = np.where(np.isnan(m), 255, np.where(np.isinf(m), 254, np.clip(c, 0, 254)))
    codes = torch.from_numpy(c.astype(np.uint8)).view(E8M0)
    return codes if dtype == E8M0 else as_scale(codes)
