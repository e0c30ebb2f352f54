"""Exhaustive sweeps: whole ranges of inputs through every backend, compared with the reference.

Each function does one task and returns what it covered: counts, and a hash of all results for each
backend. In a process of the fallback (QUANTKIT_REFERENCE=1), whose operators are the reference, only
the hash is computed: it must be the kernels'.
"""

import math
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import ml_dtypes
import numpy as np
import torch
import xxhash
from lib.cases import BITS, CODES, FLOATS, assert_same, flat

import quantkit
from quantkit import _load
from quantkit.formats import OF_NAME
from quantkit.operators import OPERATORS, overloads

CHUNK = 1 << 16  # in the caches, with all that the reference allocates
EMULATED = "cuda_emu"
EMULATED_EVERY = 17  # the emulator takes one call of so many


class Covered:
    """Calls operators on every backend, compares and hashes what they return."""

    def __init__(self, *task):
        extension = _load.extension
        self.backends = list(quantkit.backend().isas) if extension else ["fallback"]
        self.hashes = {name: xxhash.xxh3_128() for name in self.backends}
        self.sample = xxhash.xxh3_128()  # the reference's, of the calls that the emulator takes too
        self.inputs = self.results = self.emulated = 0
        self.drawn = None
        # Where the emulator begins: each task elsewhere.
        self.calls = zlib.crc32(repr(task).encode())

    def call(self, name, *args, **options):
        """An operator's results."""
        operator, _ = overloads(name)
        if _load.extension is None:
            found = operator(*args, **options)
            add_results(self.hashes["fallback"], found)
            self.results += sum(t.numel() for t in flat(found))
            return found
        expected = OPERATORS[name].reference(*args, **options)
        nans = [is_real(t) and bool(t.isnan().any()) for t in flat(expected)]
        emulates = self.calls % EMULATED_EVERY == 0
        for isa in self.backends:
            if isa == EMULATED and not emulates:
                continue
            _load.extension.set_isa(isa)
            found = operator(*args, **options)
            try:
                assert_same(found, expected)
            except AssertionError as error:
                raise AssertionError(f"{isa}: {error}") from None
            add_results(self.hashes[isa], found, nans)
        count = sum(t.numel() for t in flat(expected))
        if emulates:
            add_results(self.sample, expected, nans)
            self.emulated += count
        self.calls += 1
        self.results += count
        return expected

    def given(self, x, scale, zero_point, q_min, q_max, code):
        """quantize, dequantize of its result, fake_quantize."""
        given = (x, scale, zero_point, q_min, q_max)
        q = self.call("quantize", *given, code)
        self.call("dequantize", q, scale, zero_point)
        self.call("_fake_quantize", *given)
        self.inputs += x.numel()

    def draws(self, *parameters):
        """Tells results of other parameters apart: torch's exp2 is not the same on every machine."""
        digest = xxhash.xxh3_64()
        add_results(digest, parameters)
        self.drawn = digest.hexdigest()

    def report(self):
        hashes = {name: digest.hexdigest() for name, digest in self.hashes.items()}
        emulated = hashes.pop(EMULATED, None)
        if emulated is not None:
            assert emulated == self.sample.hexdigest(), "the emulator's hash differs"
        assert len(set(hashes.values())) == 1, hashes
        return {
            "inputs": self.inputs,
            "results": self.results,
            "hashes": hashes,
            "drawn": self.drawn,
            "emulated": {"results": self.emulated, "hash": self.sample.hexdigest()},
        }


def is_real(t):
    """Whether t holds floating numbers, not codes."""
    return t.is_floating_point() and t.element_size() > 1


def add_results(digest, results, nans=None):
    """Adds results to a hash; nans: whether each has any, where that is known."""
    for i, t in enumerate(flat(results)):
        if not is_real(t):
            t = t.view(torch.uint8) if t.is_floating_point() else t
        else:
            if nans is None or nans[i]:
                t = t.masked_fill(t.isnan(), math.nan)
            t = t.view(BITS[t.element_size()])
        digest.update(t.contiguous().numpy())


# ---- every float32 --------------------------------------------------------------------------------


def scalar(value, dtype=torch.float32):
    """A number, the text of a hexadecimal float or a code of E8M0, as a 0-dim tensor."""
    if isinstance(value, E8M0_CODE):
        return torch.tensor(int(value), dtype=torch.uint8).view(E8M0)
    value = float.fromhex(value) if isinstance(value, str) else value
    return torch.tensor(value, dtype=torch.float64).to(dtype)


_I8, _U8, _I16 = torch.int8, torch.uint8, torch.int16
# scale, zero_point, q_min, q_max, code, and what is special about them.
FLOAT_SETS = [
    (1.0, 0.0, -128, 127, _I8, "ties at every half"),
    (0.5, 3.0, -128, 127, _I8, "ties at every quarter, odd zero point"),
    ("0x1.f63c0ep-7", 0.0, -128, 127, _I8, "the divisor that two multiplications get wrong"),
    (1 / 255, 128.0, 0, 255, _U8, "asymmetric limits, unsigned, even zero point"),
    (0.1, 0.3, -128, 127, _I8, "zero point that is no integer"),
    (1e-41, 0.0, -128, 127, _I8, "denormal scale, infinite reciprocal"),
    (1e-39, -7.0, -128, 127, _I8, "denormal scale, finite reciprocal"),
    (2.0**126, 5.0, -5, 11, _I8, "huge scale, few codes"),
    (3.0517578125e-05, -1000.0, -32768, 32767, _I16, "sixteen bits"),
    (-0.75, -math.inf, -128, 127, _I8, "negative scale, infinite zero point"),
    (math.nan, 3.0, -128, 127, _I8, "NaN scale"),
    (math.inf, math.nan, 1, 127, _I8, "infinite scale, NaN zero point, range without 0"),
    (1 / 127, 0.0, -128, 127, _I8, "no zero point, quotients that round"),
]
# Tried whole: each way to divide, to add and to store (README.md). The others divide as these do, and
# most of their codes are one and the same.
WHOLE = (1, 2, 3, 4, 8, 12)
FLOAT_SLICES = 16


def chunks(slices, index, every=1):
    """Beginnings of the chunks of one slice of all 32-bit patterns."""
    size = 2**32 // slices
    return range(index * size, (index + 1) * size, CHUNK * every)


def floats_from(begin):
    return torch.arange(begin - 2**31, begin - 2**31 + CHUNK).to(torch.int32).view(torch.float32)


def floats(which, index, every=1):
    """Every float32 pattern of a slice, by given parameters."""
    scale, zero_point, *others, _ = FLOAT_SETS[which]
    scale, zero_point = scalar(scale), scalar(zero_point)
    covered = Covered("floats", which, index)
    for begin in chunks(FLOAT_SLICES, index, every):
        covered.given(floats_from(begin), scale, zero_point, *others)
    return covered.report()


# ---- every float32 in every format ----------------------------------------------------------------

E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn


class E8M0_CODE(int):
    """A scale that is a power of two, by its code."""

    def __str__(self):
        return f"E8M0 {int(self)}"


# Format, scale, zero_point, round_first, and what is special about them; the limits are the format's.
FORMAT_SETS = [
    ("float8_e4m3fn", 1.0, None, False, "every tie and subnormal of the format"),
    ("float8_e5m2", 1.0, None, False, "every tie and subnormal of the format"),
    ("float8_e4m3fn", "0x1.f63c0ep-7", None, False, "the divisor that is hard"),
    ("float8_e5m2", 1e-41, None, False, "denormal scale"),
    ("float8_e4m3fn", -0.75, None, False, "negative scale"),
    ("float8_e5m2", math.nan, None, False, "NaN scale"),
    ("int4", 0.5, 3.0, False, "ties at every quarter, odd zero point"),
    ("uint4", 1 / 3, 7.5, False, "zero point that is no integer"),
    ("uint16", 2.0**-15, 32768.0, False, "sixteen bits"),
    ("int8", 0.5, 3.0, True, "rounded before an odd zero point"),
    ("uint4", 0.1, 8.0, True, "rounded before an even zero point, packed"),
    ("float4_e2m1fn", 1.0, None, False, "every tie and subnormal of the format"),
    ("float4_e2m1fn", E8M0_CODE(0), None, False, "the least power of two"),
    ("float8_e4m3fn", E8M0_CODE(140), None, False, "a power of two"),
    ("float8_e5m2", E8M0_CODE(255), None, False, "E8M0's NaN"),
    ("int2", 0.75, None, False, "four codes a byte"),
    ("uint2", 0.3, 1.0, True, "rounded before an odd zero point, four codes a byte"),
]
EVERY_FORMAT_FLOAT = (0, 1, 11)  # tried whole
COLUMNS = 256


def corner_floats():
    """Every sign, exponent and seven bits of the fraction, and the two floats beside each.

    Among them are all ties of formats of up to six bits.
    """
    bits = torch.arange(0, 2**32, 2**16, dtype=torch.int64)
    return [wrapped(bits + beside).view(torch.float32) for beside in (0, 1, -1)]


def strided_floats(index):
    """65,536 floats a little more than 2^16 apart: every exponent, and other low bits each time."""
    bits = torch.arange(65536, dtype=torch.int64) * 65537 + index * 4099
    return wrapped(bits).view(torch.float32)


def wrapped(bits):
    return (((bits + 2**31) & (2**32 - 1)) - 2**31).to(torch.int32)


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


def check_codes(found, x, scale, zero_point, f, round_first):
    """Codes and numbers against another formulation than the reference's."""
    q, y, (fake, mask) = found
    v = x / scale
    v = torch.round(v) if round_first else v
    v = v if zero_point is None else v + zero_point
    codes, numbers = as_codes(v, f), as_numbers(q, f)
    stored = numbers
    if not f.has_zero_point:
        stored = q.view(torch.uint8) if f.per_byte == 1 else apart(q, f)
    assert torch.equal(stored.to(torch.float64), codes.to(torch.float64)), "other codes"
    expected = (numbers if zero_point is None else numbers - zero_point) * scale
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0)), "other numbers"
    assert torch.equal(fake.nan_to_num(7.0), expected.nan_to_num(7.0)), "another reconstruction"
    v = torch.round(v) if f.has_zero_point else v
    assert torch.equal(mask, (v >= f.low) & (v <= f.high)), "another mask"


def parameters_for(x, which, some=slice(None)):
    """(scale, zero point, arguments) of a set: one scale for all, for each row, for each of a row."""
    name, scale, zero_point, *_ = FORMAT_SETS[which]
    f = OF_NAME[name]
    for shape in ((), (len(x), 1), (1, x.shape[1]))[some]:
        s = scalar(scale).expand(shape).contiguous()
        z = None if zero_point is None else scalar(zero_point).expand(shape).contiguous()
        yield s, z, (x, s, z, f.low, f.high, name)


def rows_of(strides):
    """The corners of the floats and so many strides, in rows."""
    floats = [*corner_floats(), *map(strided_floats, range(strides))]
    return [x.view(-1, COLUMNS) for x in floats]


def in_format(covered, x, which, some=slice(None)):
    """Codes of x, their numbers, fake_quantize and its mask, by parameters of some shapes."""
    name, _, _, round_first, _ = FORMAT_SETS[which]
    for s, z, given in parameters_for(x, which, some):
        q = covered.call("quantize.format", *given, round_first=round_first)
        y = covered.call("dequantize.format", q, s, z, name)
        fake = covered.call("_fake_quantize_masked.format", *given, round_first=round_first)
        check_codes((q, y, fake), x, as_scale(s), z, OF_NAME[name], round_first)
        covered.inputs += x.numel()


def format_samples(which):
    """The corners and some strides of the floats."""
    covered = Covered("format_samples", which)
    for x in rows_of(3):
        in_format(covered, x, which)
    return covered.report()


def format_floats(which, index, every=1):
    """Every float32 pattern of a slice, by one shape of parameters or another."""
    covered = Covered("format_floats", which, index)
    for i, begin in enumerate(chunks(FLOAT_SLICES, index, every)):
        x = floats_from(begin).view(-1, COLUMNS)
        in_format(covered, x, which, slice(i % 3, i % 3 + 1))
    return covered.report()


def format_chosen(name):
    """Every half precision number, and corners of float32, no greater than each of some."""
    covered = Covered("format_chosen", name)
    f = OF_NAME[name]
    floats = torch.cat([*corner_floats(), strided_floats(0)])
    for x in (every_half(torch.float16), every_half(torch.bfloat16), floats):
        every = x[1 :: len(x) // 13]
        for most in every[every.isfinite()]:
            for row in (64, 65536):
                rows = with_limits(x.view(-1, row), most.abs(), False)
                rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % f.per_byte))
                args = (rows, [1, -1], f.low, f.high, 2.0**-126, f.low < 0, name)
                covered.call("quantize_dequantize.format", *args)
                covered.call("dynamic_quantize.format", *args)
                covered.inputs += rows.numel()
    return covered.report()


# ---- random draws, and sums of errors -----------------------------------------------------------------


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


def format_draws(which):
    """Codes of corners and strides of the floats, drawn, against all neighbours in the format."""
    covered = Covered("format_draws", which)
    f = OF_NAME[FORMAT_SETS[which][0]]
    for i, x in enumerate(rows_of(2)):
        words = (which << 40) + i, -1 - which
        drawn = {"seed": torch.tensor(words)}
        u = (2 * draws_of(*words, x.numel()).astype(np.float64) + 1) / 2**17
        for s, z, given in parameters_for(x, which):
            q = covered.call("quantize.format", *given, **drawn)
            _, mask = covered.call("_fake_quantize_masked.format", *given, **drawn)
            v = x / as_scale(s) if z is None else x / as_scale(s) + z
            right, found = drawn_numbers(v, f, u.reshape(x.shape)), as_numbers(q, f).numpy()
            assert np.array_equal(found, right, equal_nan=True), "other codes"
            if not f.has_zero_point:
                signs = [np.signbit(t[~np.isnan(t)]) for t in (found, right)]
                assert np.array_equal(*signs), "other signs"
            assert torch.equal(mask, (v >= f.low) & (v <= f.high)), "another mask"
            covered.inputs += x.numel()
    return covered.report()


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


def format_sums(which):
    """Errors of corners and strides of the floats: their sums in Python's integers."""
    covered = Covered("format_sums", which)
    name, _, _, round_first, _ = FORMAT_SETS[which]
    for i, x in enumerate(rows_of(2)):
        ((scale, z, given),) = parameters_for(x, which, slice(1))
        q = OPERATORS["quantize.format"].reference(*given, round_first=round_first)
        e = OPERATORS["dequantize.format"].reference(q, scale, z, name) - x
        kept = e.isfinite()
        right = [whole_sum(x[kept]), whole_sum(e[kept])]
        most = e[kept].abs().amax() if kept.any() else torch.tensor(0.0)
        for over in (None, [1, -1], [i + 1, 3]):
            options = {"round_first": round_first, "over": over}
            limbs, greatest, counts = covered.call("measure_limbs", *given, **options)
            sums = limbs.reshape(-1, 2, limbs.shape[-1]).sum(0).tolist()
            assert [sum(n << 32 * k for k, n in enumerate(d)) for d in sums] == right, "other sums"
            assert greatest.amax() == most, "another greatest error"
            assert counts.reshape(-1, 2).sum(0)[1] == (~kept).sum(), "others left out"
            covered.call("measure", *given, **options)
            covered.inputs += x.numel()
    return covered.report()


# ---- scales of every float32 ------------------------------------------------------------------------

# Format, rule, dtype of scale, global_scale: what is chosen for a block of one element.
SCALE_SETS = [
    ("float8_e4m3fn", "ceil", E8M0, None),
    ("float8_e4m3fn", "floor", E8M0, None),
    ("float8_e5m2", "even", E8M0, None),
    ("float4_e2m1fn", "even", E8M0, None),
    ("float4_e2m1fn", "ceil", None, None),
    ("int4", "floor", torch.float32, None),
    ("float4_e2m1fn", None, E4M3, None),
    ("float4_e2m1fn", None, E4M3, 0.0137),
    ("int8", None, None, 3.0e-5),
]
SMALLEST = {E8M0: 2.0**-127, E4M3: 2.0**-6}


def expected_scales(x, which):
    """Scales by another formulation: in float64 and by numpy's frexp, exact but for the two quotients."""
    name, rule, dtype, global_scale = SCALE_SETS[which]
    f = OF_NAME[name]
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


def format_scales(which):
    """Scales of corners and strides of the floats, and of every half precision number."""
    covered = Covered("format_scales", which)
    name, rule, dtype, global_scale = SCALE_SETS[which]
    f, options = OF_NAME[name], {"scale_rule": rule, "scale_dtype": dtype}
    options["global_scale"] = None if global_scale is None else scalar(global_scale)
    halves = [every_half(t).float().view(-1, COLUMNS) for t in (torch.float16, torch.bfloat16)]
    for x in [*rows_of(16), *halves]:
        args = (x, [1, 1], f.low, f.high, SMALLEST.get(dtype, 2.0**-126), True, name)
        scale, _ = covered.call("choose_qparams.format", *args, **options)
        found, expected = (
            t.view(torch.uint8) if t.element_size() == 1 else t.nan_to_num(7.0)
            for t in (scale, expected_scales(x, which))
        )
        assert torch.equal(found, expected), "other scales"
        covered.inputs += x.numel()
    return covered.report()


# ---- every float32 through the loops of chosen parameters -----------------------------------------

# The greatest magnitude, elements of a row, symmetric: scale 1 for all; an ordinary pair of limits; and
# (text) the scale that is hard to divide by, for rows of 256.
DYNAMIC_SETS = [(127.0, CHUNK, True), (100.3, CHUNK, False), ("0x1.f63c0ep-7", 256, True)]


def with_limits(x, most, symmetric):
    """Rows of what is no greater than `most`, and it beside them, so that it decides their scale."""
    x = torch.where(x.abs() <= most, x, 0.0)
    limit = most.expand(len(x), 1)
    return torch.cat([x, limit] if symmetric else [x, limit, -limit], 1)


def choose_and_quantize(covered, x, symmetric):
    args = (x, [1, -1], -128, 127, 1e-8, symmetric, torch.int8)
    covered.call("quantize_dequantize", *args)
    covered.call("dynamic_quantize", *args)


def dynamic(which, index, every=1):
    """Every float32 no greater than the one that decides the scale: codes and x_hat."""
    given, row, symmetric = DYNAMIC_SETS[which]
    most = scalar(given) * (127 if isinstance(given, str) else 1)
    covered = Covered("dynamic", which, index)
    for begin in chunks(FLOAT_SLICES, index, every):
        x = floats_from(begin).view(-1, row)
        if (x.abs() <= most).any():
            choose_and_quantize(covered, with_limits(x, most, symmetric), symmetric)
            covered.inputs += CHUNK
    return covered.report()


def dynamic_halves(dtype, batch):
    """Every half precision number no greater than each of sixteen: in long rows, and in short ones."""
    dtype = getattr(torch, dtype)
    every = every_half(dtype)
    covered = Covered("dynamic_halves", dtype, batch)
    for most in every[1 + batch * 64 : 32768 : 2048]:
        if most.isfinite():
            for row, symmetric in ((65536, True), (65536, False), (128, True)):
                x = with_limits(every.view(-1, row), most, symmetric)
                choose_and_quantize(covered, x, symmetric)
                covered.inputs += x.numel()
    return covered.report()


# ---- every half precision number by many parameters -----------------------------------------------

GRANULARITIES = ("tensor", "channel", "last channel", "group", "block", "element")
SETS = 16  # parameter sets of one call


def every_half(dtype):
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def some_scales(generator, n, dtype):
    """Positive scales over the whole range of dtype, denormal ones too, and a few special ones."""
    info = torch.finfo(dtype)
    low, high = math.log2(info.smallest_normal) - 6, math.log2(info.max)
    low, high = max(low, -160.0), min(high, 140.0)
    s = torch.exp2(torch.rand(n, generator=generator, dtype=torch.float64) * (high - low) + low)
    near = torch.rand(n, generator=generator) < 0.5  # where codes are neither all 0 nor all limits
    s = torch.where(near, torch.exp2(torch.rand(n, generator=generator).double() * 16 - 12), s)
    special = torch.tensor([1.0, 0.5, 1 / 127, 1e-41, 0.0, -0.5, math.inf, math.nan]).double()
    at = torch.randperm(n, generator=generator)[: max(n // 8, 1)]
    s[at] = special[torch.randint(len(special), (len(at),), generator=generator)]
    return to_dtype(s, dtype)


def some_parameters(seed, n, dtype):
    generator = torch.Generator().manual_seed(seed)
    return some_scales(generator, n, dtype), some_zero_points(generator, n, dtype)


def some_zero_points(generator, n, dtype):
    z = torch.randint(-130, 131, (n,), generator=generator).double()
    kind = torch.rand(n, generator=generator)
    z = torch.where(kind < 0.3, torch.zeros_like(z), z)
    z = torch.where((kind > 0.7) & (kind < 0.85), z + 0.3, z)
    special = torch.tensor([2049.0, -40000.5, 1e9, math.inf, math.nan, 0.5]).double()
    rare = kind > 0.95
    z = torch.where(rare, special[torch.randint(6, (n,), generator=generator)], z)
    return to_dtype(z, dtype)


def to_dtype(t, dtype):
    return t.to(torch.float32).to(dtype) if dtype in FLOATS[2:] else t.to(dtype)


LIMITS = [
    (torch.int8, -128, 127),
    (torch.uint8, 0, 255),
    (torch.int8, -127, 127),
    (torch.int16, -32768, 32767),
    (torch.uint8, 3, 17),
]


def halves(dtype, granularity, batch):
    """Every pattern of a half precision type by SETS parameter sets, in one granularity."""
    dtype = getattr(torch, dtype)
    seed = batch * len(GRANULARITIES) + GRANULARITIES.index(granularity)
    generator = torch.Generator().manual_seed(seed)
    own = (dtype, dtype, torch.float32, torch.float64)
    s_dtype, z_dtype = own[batch % 4], own[batch // 4 % 4]
    scale = some_scales(generator, SETS, s_dtype)
    zero_point = some_zero_points(generator, SETS, z_dtype)
    code, q_min, q_max = LIMITS[batch % len(LIMITS)]
    every = every_half(dtype)
    covered = Covered("halves", dtype, granularity, batch)
    covered.draws(scale, zero_point)

    def sweep(x, scale, zero_point):
        covered.given(x, scale, zero_point, q_min, q_max, code)

    if granularity == "tensor":
        for s, z in zip(scale, zero_point, strict=True):
            sweep(every, s, z)
        return covered.report()
    x = every.expand(SETS, -1).contiguous()
    # Where a row has many scales, every set meets every pattern in one row or another.
    turned = (torch.arange(SETS)[:, None] + torch.arange(512)) % SETS
    if granularity == "channel":
        sweep(x, scale[:, None], zero_point[:, None])
    elif granularity == "last channel":
        sweep(x.T.contiguous(), scale[None], zero_point[None])
    elif granularity == "group":
        sweep(x, scale[turned], zero_point[turned])
    elif granularity == "block":
        turned = turned[:, :256]
        sweep(x.view(2 * SETS, -1), scale[turned], zero_point[turned])
    else:
        turned = turned.repeat_interleave(128, 1)
        sweep(x, scale[turned], zero_point[turned])
    return covered.report()


# ---- every code by many scales --------------------------------------------------------------------

SCALES_OF_A_TASK = 256
CODE_NAMES, FLOAT_NAMES = (
    [str(dtype).removeprefix("torch.") for dtype in dtypes] for dtypes in (CODES, FLOATS)
)


def codes(code, dtype, batch):
    """dequantize of every code by SCALES_OF_A_TASK scales: one for a row, one for a column."""
    code, dtype = getattr(torch, code), getattr(torch, dtype)
    scale, zero_point = some_parameters(batch, SCALES_OF_A_TASK, dtype)
    low, high = CODES[code]
    every = torch.arange(low, high + 1).to(code)
    covered = Covered("codes", code, dtype, batch)
    covered.draws(scale, zero_point)
    rows = max(1, CHUNK // len(every))
    for s, z in zip(scale.split(rows), zero_point.split(rows), strict=True):
        q = every.expand(len(s), -1).contiguous()
        covered.call("dequantize", q, s[:, None], z[:, None])
        covered.call("dequantize", q.T.contiguous(), s[None], z[None])
        covered.inputs += q.numel()
    return covered.report()


def format_codes(name, batch):
    """dequantize.format of every code by SCALES_OF_A_TASK scales: a row's, a column's, one of all."""
    f = OF_NAME[name]
    scale, zero_point = some_parameters(batch, SCALES_OF_A_TASK, torch.float32)
    scale[:4] = torch.tensor([2.0**118, -(2.0**119), 2.0**127, -(2.0**-149)])
    every = torch.arange(256 if f.bits <= 8 else 65536)  # bytes: all codes, however many share one
    every = every.to(torch.uint8).view(f.storage) if f.bits <= 8 else every.to(f.storage)
    covered = Covered("format_codes", name, batch)
    covered.draws(scale, zero_point)

    def back(q, s, z):
        z = z if f.has_zero_point else None
        y = covered.call("dequantize.format", q, s, z, name)
        numbers = as_numbers(q, f) if z is None else as_numbers(q, f) - z
        assert torch.equal((numbers * s).nan_to_num(7.0), y.nan_to_num(7.0)), "other numbers"
        covered.inputs += q.numel()

    rows = max(1, CHUNK // len(every))
    for s, z in zip(scale.split(rows), zero_point.split(rows), strict=True):
        q = every.expand(len(s), -1).contiguous()
        back(q, s[:, None], z[:, None])
        back(q.T.contiguous().repeat_interleave(f.per_byte, 1), *columns(s, z, f))
    for s, z in zip(scale[::8], zero_point[::8], strict=True):
        back(every, s, z)
    return covered.report()


def columns(s, z, f):
    """One parameter for each code of a row in which each byte stands as often as it has codes."""
    wide = f.per_byte**2
    return (p.repeat_interleave(wide)[None] for p in (s, z))


# ---- choosing parameters --------------------------------------------------------------------------

# q_min, q_max, symmetric, include_zero: divisions by 127, 255 and 254.
CHOICES = [
    (-128, 127, True, False),
    (-128, 127, False, False),
    (-127, 127, False, False),
    (0, 255, False, True),
]
PAIR_STRIDE = 29


def choose(covered, x, choice, eps):
    q_min, q_max, symmetric, include_zero = CHOICES[choice]
    covered.call("choose_qparams", x, [1, 2], q_min, q_max, eps, symmetric, include_zero)
    covered.inputs += x.shape[0]


def pairs(dtype, choice, begin, end):
    """Parameters of pairs of half precision numbers: some (by stride) beside every other.

    The diagonal is whole: each number beside itself, its negative and its neighbour.
    """
    dtype = getattr(torch, dtype)
    every = every_half(dtype)
    eps = 1e-8 if choice % 2 else 1e-4
    covered = Covered("pairs", dtype, choice, begin)
    for at in range(begin, end, PAIR_STRIDE):
        choose(covered, torch.stack([every[at].expand(65536), every], 1), choice, eps)
    bits = every.view(torch.int16)
    for other in (every, -every, (bits + 1).view(dtype)):
        diagonal = torch.stack([every, other], 1)[begin:end].contiguous()
        choose(covered, diagonal, choice, eps)
    return covered.report()


EXPONENTS = (-140, -126, -100, -20, -1, 0, 6, 100, 127)


def extents(choice, exponent, part, parts):
    """Every significand of a float32 extent: the division by 127, 254 or 255, whichever way it rounds.

    From 0 on, so that the extent is exact; then with a least value that lies half way between two codes.
    """
    covered = Covered("extents", choice, exponent, part)
    size = 2**23 // parts
    for begin in range(part * size, (part + 1) * size, CHUNK):
        significand = (torch.arange(begin, begin + CHUNK) + (1 << 23)).double()
        width = torch.ldexp(significand, torch.tensor(EXPONENTS[exponent] - 23))
        width = width.to(torch.float32)
        steps = torch.arange(CHUNK) % 511 / 2  # half steps of the scale below 0
        x_min = -(width.double() * steps / 255).to(torch.float32)
        x_max = (width.double() + x_min.double()).to(torch.float32)
        choose(covered, torch.stack([torch.zeros_like(width), width], 1), choice, 1e-45)
        choose(covered, torch.stack([x_min, x_max], 1), choice, 1e-45)
    return covered.report()
