"""How near x_hat is to x: half a step inside the limits."""

import itertools
import os

import pytest
import torch
from lib.cases import GRANULARITIES, given, values

import quantkit
from benchmarks import real_weights
from quantkit import QuantizationParams, reference

pytestmark = pytest.mark.fallback
LIMITS = {
    "int8": (torch.int8, -128, 127),
    "uint8": (torch.uint8, 0, 255),
    "int16": (torch.int16, -32768, 32767),
    "without -128": (torch.int8, -127, 127),
    "int4": (torch.int8, -8, 7),
    "uint4": (torch.uint8, 0, 15),
}

# ---- the bound ----------------------------------------------------------------------------------------

# One rounding to float32 moves a result r by at most 2^-24 * |r|. The rest is for float64, in which the
# tests reckon, and whose own roundings are far smaller.
U = 2.0**-24 + 2.0**-50


def element_wise(p, shape):
    """A parameter of any granularity as float64, one value for each element."""
    p = p.double()
    if p.dim() == len(shape):
        for dim, (size, whole) in enumerate(zip(p.shape, shape, strict=True)):
            p = p.repeat_interleave(whole // size, dim)
    return p.expand(shape)


def check_half_a_step(x, q, x_hat, qparams):
    """|x_hat - x| <= scale / 2 inside the limits, and what float32 rounds; the nearest limit outside.

    With v = x / scale, w = v + zero_point, q = round(w) and x_hat = (q - zero_point) * scale,

        x_hat - x = scale * (q - w) + roundings of v, w and x_hat,

    where |q - w| <= 1/2. The roundings are at most U * |x|, U * scale * |w| and U * |x_hat|, if
    q - zero_point is exact, as it is for the integers here, and nothing is subnormal. Returns by how
    much of a step the farthest element lies outside.
    """
    assert x.dtype == x_hat.dtype == torch.float32 and q.dtype == qparams.dtype
    scale, zero_point = (element_wise(p, x.shape) for p in (qparams.scale, qparams.zero_point))
    x, x_hat, q = x.double(), x_hat.double(), q.double()
    w = x / scale + zero_point
    beyond = torch.maximum(w - (qparams.q_max + 0.5), (qparams.q_min - 0.5) - w)
    inside = beyond <= 0
    slack = U * (x.abs() + scale * (q.abs() + 0.5) + x_hat.abs())
    assert torch.all(((x_hat - x).abs() <= scale / 2 + slack)[inside])
    assert torch.equal(q[~inside], w[~inside].clamp(qparams.q_min, qparams.q_max))
    return float(beyond.max())


def inputs(shape, seed):
    """Values over many powers of ten; none subnormal."""
    for i, factor in enumerate((1.0, 1e-3, 1e3)):
        yield values(shape, torch.float32, seed + i) * factor


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
def test_half_a_step_with_chosen_parameters(sym, limits):
    """With 0 in the range every element is inside: parameters that lose some are wrong ones."""
    dtype, low, high = limits
    for shape, every in GRANULARITIES:
        for blocks, include_zero in itertools.product(every, {False, not sym}):
            for x in inputs(shape, low & 15):
                x = x.abs() if sym and low == 0 else x
                options = {"q_min": low, "q_max": high, "include_zero": include_zero}
                q, x_hat, p = quantkit.quantize_dequant(
                    x, dtype=dtype, sym=sym, block_size=blocks, **options
                )
                beyond = check_half_a_step(x, q, x_hat, p)
                # Symmetric: max_abs / scale is q_max but for two roundings of the scale. Asymmetric: the
                # zero point is off by half a step, and the width and the scale were rounded as well as
                # x_min / scale: at most five U of q_max - q_min.
                if sym or include_zero:
                    assert beyond <= 5 * U * (high - low)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_half_a_step_with_given_parameters(limits):
    dtype, low, high = limits
    for shape, every in GRANULARITIES:
        for i, blocks in enumerate(every):
            scale, zero_point = given(shape, blocks, torch.float32, i)
            p = QuantizationParams(scale, zero_point, low, high, dtype=dtype)
            x = values(shape, torch.float32, i)
            q = quantkit.quantize_tensor(x, p)
            check_half_a_step(x, q, quantkit.dequantize_tensor(q, p), p)
            check_half_a_step(x, q, quantkit.fake_quantize(x, p), p)


MISTAKES = {
    "truncates": lambda x, s, z: (x / s + z).trunc(),
    "rounds down": lambda x, s, z: (x / s + z).floor(),
    "the next channel's scale": lambda x, s, z: (x / s.roll(1, 0) + z).round(),
    "the next channel's zero point": lambda x, s, z: (x / s + z.roll(1, 0)).round(),
    "forgets the zero point": lambda x, s, z: (x / s).round(),
    "a scale of half the bits": lambda x, s, z: (x / s.bfloat16().float() + z).round(),
    "a quotient of half the bits": lambda x, s, z: ((x / s).bfloat16().float() + z).round(),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_bound_finds_mistakes(mistake):
    x = values((12, 400), torch.float32, 1)
    q, x_hat, p = reference.quantize_dequant(x, per_channel=True, sym=False)
    check_half_a_step(x, q, x_hat, p)
    q = mistake(x, p.scale, p.zero_point).clamp(-128, 127).to(torch.int8)
    with pytest.raises(AssertionError):
        check_half_a_step(x, q, reference.dequantize_tensor(q, p), p)


# ---- real weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    """MiniLM's, which `make test` installs and demands."""
    try:
        return real_weights.load_weights(real_weights.default_weights())
    except real_weights.Refused as reason:
        if os.environ.get("QUANTKIT_REQUIRE_EXTENSION") == "1":
            raise
        pytest.skip(str(reason))


def sqnr_db(x, **scheme):
    return quantkit.measure(x, quantkit.quantize_dequant(x, **scheme)[2]).sqnr_db.item()


def test_one_sided_weights_need_include_zero(weights):
    """This LayerNorm's weights lie in [0.39, 0.73], more than 255 steps above 0.

    So the zero point ends at q_min, every code at q_max, and nothing but a constant comes back.
    """
    x = weights["encoder.layer.1.output.LayerNorm.weight"]
    q, _, p = quantkit.quantize_dequant(x, sym=False)
    assert p.zero_point == p.q_min and torch.all(q == p.q_max)
    assert sqnr_db(x, sym=False) < 6.6
    assert sqnr_db(x, sym=False, include_zero=True) >= 57.1
