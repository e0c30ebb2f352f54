"""Scales that .format operators choose: exact arithmetic, rules, coded scales, the contract's edges."""

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from lib import exact
from lib.backends import daily
from lib.cases import assert_same, values
from lib.formats import (
    BLOCKS,
    CHOOSE,
    DEQUANTIZE,
    DYNAMIC,
    DYNAMIC_BACK,
    E4,
    E8M0,
    EACH,
    INF,
    NAN,
    ONE,
    SHAPE,
    assert_numbers,
    bytes_of,
    fractions,
    nan_of,
    numbers_of,
    quantized,
)

from quantkit import reference
from quantkit.formats import FORMATS, OF_NAME
from quantkit.schemes import powers_of

pytestmark = pytest.mark.fallback

CODED = [{"scale_dtype": E8M0}, {"scale_dtype": E8M0, "scale_rule": "floor"}, {"scale_dtype": E4}]


def symmetric_schemes(f):
    yield from [{}, {"scale_dtype": E8M0}, {"scale_dtype": E4}]
    yield from [{"scale_rule": "half_range"}] if f.low < 0 and f.has_zero_point else []
    for rule in powers_of(f):
        yield from [{"scale_rule": rule}, {"scale_rule": rule, "scale_dtype": E8M0}]


def smallest(options):
    return {E8M0: 2.0**-127, E4: 2.0**-6}.get(options.get("scale_dtype"), 1e-8)


@EACH
def test_choosing_agrees_with_exact_arithmetic(f):
    schemes = [(True, options) for options in symmetric_schemes(f)]
    schemes += [(True, {"scale_dtype": d, "global_scale": 0.013}) for d in (None, E4)]
    if f.has_zero_point:
        schemes += [(False, {}), (False, {"include_zero": True})]
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    for i, ((symmetric, options), blocks) in enumerate(itertools.product(schemes, BLOCKS)):
        x = values(SHAPE, torch.float64, i + 40) + (9 if i % 3 == 2 else 0)
        x = x.to(torch.float32).to(dtypes[i % 4])
        narrow = f.has_zero_point and i % 2 == 0
        low, high = (max(f.low, -5), min(f.high, 6)) if narrow else (f.low, f.high)
        eps = (smallest(options), 0.02)[i % 5 == 4]
        whole = options.get("global_scale")
        tensor = {} if whole is None else {"global_scale": torch.tensor(whole)}
        scale, zero_point = CHOOSE(
            x, blocks, low, high, eps, symmetric, f.name, **{**options, **tensor}
        )
        xs = fractions(x.to(torch.float32))
        found = [
            exact.chosen(f.name, [xs[at] for at in elements], low, high, eps, symmetric, **options)
            for _, elements in exact.blocks_of(SHAPE, blocks or [-1, -1])
        ]
        assert scale.dtype == (options.get("scale_dtype") or torch.float32)
        assert_numbers(scale.to(torch.float32), [s for s, _ in found])
        if f.has_zero_point:
            assert zero_point.shape == scale.shape
            assert_numbers(zero_point, [z for _, z in found])
        else:
            assert zero_point.shape == () and zero_point == 0 and zero_point.dtype == torch.float32


# A rule sees a format's limits and mantissa, no more.
OF_RULES = [f for f in FORMATS if not f.has_zero_point or f.name in ("int8", "int4")]


@pytest.mark.parametrize("f", daily(FORMATS, *OF_RULES), ids=lambda f: f.name)
def test_scales_of_hard_numbers_agree_with_exact_arithmetic(f):
    """Each beside powers of two, beside what rounds to one, subnormal or near the end of float32."""
    powers = 2.0 ** torch.tensor([-149, -140, -128, -127, -126, -125, -8, -1, 0, 1, 9, 126, 127.0])
    between = torch.tensor([1.0, 1.125, 1.25, 1.5, 1.625, 1.75, 1.875])
    x = torch.outer(powers.double(), between.double()).flatten().float()
    x = torch.cat([x, *(x.nextafter(torch.tensor(v)) for v in (INF, -INF))])
    x = torch.cat([x[x.isfinite()], torch.finfo(torch.float32).max * ONE[None], ONE[None] * 0])
    exactly = list(map(Fraction, x.tolist()))
    highs = (f.high, 1, 0) if f.has_zero_point else (f.high, 1, 2)
    for i, (options, high) in enumerate(itertools.product(symmetric_schemes(f), highs)):
        low = max(f.low, -max(high, 2)) if f.has_zero_point else -high
        least = smallest(options)
        eps = (least, least, 2.0**-126 * 1.5 if least < 1e-6 else 0.02, 0.75)[i % 4]
        scale, _ = CHOOSE(x, [1], low, high, eps, True, f.name, **options)
        found = [exact.chosen(f.name, [v], low, high, eps, True, **options)[0] for v in exactly]
        assert_numbers(scale.to(torch.float32), found)


def test_block_of_zeros():
    zeros = torch.tensor([[0.0, -0.0] * 4])
    for f in FORMATS:
        cases = [({}, eps, eps) for eps in (1e-8, 2.0**-126, 0.1)]
        cases += [(options, smallest(options), smallest(options)) for options in CODED]
        cases += [({"scale_rule": "ceil"}, 2.0**-126, 2.0**-126), (CODED[0], 0.1, 2.0**-3)]
        cases += [(CODED[1], 0.1, 2.0**-4), (CODED[2], 0.1, 13 / 128)]
        for options, eps, expected in cases:
            x_hat, scale = DYNAMIC_BACK(zeros, [1, 4], f.low, f.high, eps, True, f.name, **options)[
                1:3
            ]
            assert_same(scale.float(), torch.full((1, 2), expected, dtype=torch.float64).float())
            assert (x_hat == 0).all()
            assert torch.equal(
                x_hat.signbit(), zeros.signbit() if not f.has_zero_point else x_hat < 0
            )


@EACH
def test_edges_of_scales_that_are_chosen_coded(f):
    """NaN, infinities, the largest numbers and the smallest: codes of scales, numbers of codes."""
    big = torch.finfo(torch.float32).max
    x = torch.tensor([[1, NAN, 3, INF], [1, -INF, -3, 0], [big, -big, 1, 0], [1e-45, 0, 0, -1e-40]])
    nan, low = [nan_of(f)] * 4, max(f.low, -f.high)
    ends = [0, low, 0, 0]
    for options, scales, infinite in (
        ({"scale_dtype": E8M0}, [255, 254, None, 0], ends),
        ({"scale_dtype": E8M0, "scale_rule": "floor"}, [255, 254, None, 0], ends),
        ({"scale_dtype": E4}, [0x7F, 0x7E, 0x7E, 8], None),
        ({"scale_dtype": E4, "global_scale": torch.tensor(2.0)}, [0x7F, 0x7E, 0x7E, 8], None),
        ({"scale_rule": "ceil"}, [NAN, 2.0**127, None, 2.0**-127], ends),
        ({}, [NAN, INF, None, 2.0**-126], [0, nan_of(f), 0, 0]),
    ):
        eps = smallest(options) if "scale_dtype" in options else 2.0**-126
        eps = 2.0**-127 if "scale_rule" in options else eps
        choice = (x, [1, -1], low, f.high, eps, True, f.name)
        q, x_hat, scale, _ = DYNAMIC_BACK(*choice, **options)
        found = bytes_of(scale) if "scale_dtype" in options else scale
        for i, code in enumerate(scales):
            if code is not None:
                assert_same(found[i, 0], torch.tensor(code, dtype=found.dtype))
        numbers = f.decode(f.unpack(q))
        assert_same(numbers[0] + 0.0, torch.tensor(nan))
        assert x_hat[0].isnan().all()
        if infinite is not None:
            assert_same(numbers[1] + 0.0, torch.tensor(infinite, dtype=torch.float32))
            assert infinite is not ends or x_hat[1, 1] == low * 2.0**127
        else:  # 448, or 896
            at = 448 * options.get("global_scale", ONE)
            assert_same(
                numbers[1:3], numbers_of(x[1:3].flatten(), f, at, None, low, f.high).view(2, 4)
            )
            assert numbers[1, 1] == low and x_hat[1, 1] == low * at


def test_scales_that_are_codes_stand_for_their_numbers():
    """0, subnormal, largest and NaN, in both directions, also times a global scale."""
    for dtype in (E8M0, E4):
        scale = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)[:, None]
        numbers = scale.to(torch.float32)  # torch agrees
        theirs = bytes_of(scale).numpy().view(getattr(ml_dtypes, str(dtype)[6:]))
        assert_same(numbers, torch.from_numpy(theirs.astype(np.float32)))
        x = values((256, 8), torch.float32) * numbers.nan_to_num(1.0)
        for name, whole in itertools.product(
            ("float8_e4m3fn", "float4_e2m1fn", "int4"), (None, 0.3)
        ):
            f, options = OF_NAME[name], {}
            plain = numbers if whole is None else numbers * torch.tensor(whole)
            if whole is not None:
                if dtype == E8M0:
                    continue
                options = {"global_scale": torch.tensor(whole)}
            q = quantized(x, f, scale, **options)
            assert_same(q, quantized(x, f, plain))
            assert_same(
                DEQUANTIZE(q, scale, None, name, **options), DEQUANTIZE(q, plain, None, name)
            )
            made, right = (
                reference.fake_quantize_masked_format_op(x, s, None, f.low, f.high, name, **o)
                for s, o in ((scale, options), (plain, {}))
            )
            assert_same(made, right)


def test_a_global_scale_is_float32_whatever_its_dtype():
    x = values((4, 32), torch.float32, 2)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for shape in ((), (1, 1), (4, 1), (2, 2), (4, 2)):
            whole = (values(shape, torch.float32, 1).abs() + 0.01).to(dtype)
            f = OF_NAME["float4_e2m1fn"]
            for scale_dtype in (E4, None):
                choice = (x, [1, 16], f.low, f.high, 2.0**-6, True, f.name)
                results = (
                    DYNAMIC_BACK(*choice, global_scale=g, scale_dtype=scale_dtype)
                    for g in (whole, whole.float())
                )
                assert_same(*results)


def test_choosing_from_no_elements():
    for f in FORMATS:
        for shape, blocks, expected in (
            ((0, 4), [1, -1], (0, 1)),
            ((4, 0), [-1, 3], (1, 0)),
            ((0, 4), [3, 2], (0, 2)),
        ):
            q, scale, zero_point = DYNAMIC(
                torch.zeros(shape), blocks, f.low, f.high, 1e-8, True, f.name
            )
            assert scale.shape == expected and q.numel() == 0
            assert zero_point.shape == (expected if f.has_zero_point else ())
            assert f.has_zero_point or zero_point == 0
        for shape, blocks in (((0, 4), None), ((0, 4), [-1, 1]), ((4, 0), [1, -1])):
            with pytest.raises(ValueError, match="x: expected at least one element"):
                DYNAMIC(torch.zeros(shape), blocks, f.low, f.high, 1e-8, True, f.name)
