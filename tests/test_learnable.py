"""The gradients of fake_quantize's scale and zero_point: contract 2, section 13."""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from lib.cases import STRIDES, assert_same, given, values
from lib.exact import nearest
from torch.autograd import forward_ad

import quantkit
from quantkit import reference

pytestmark = pytest.mark.fallback
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Mantissa bits, the exponent of the smallest normal number, the greatest number.
ROUNDED = {
    torch.float64: (52, -1022), torch.float32: (23, -126),
    torch.bfloat16: (7, -126), torch.float16: (10, -14),
}  # fmt: skip
EVERY = pytest.mark.parametrize("fake_quantize", [quantkit.fake_quantize, reference.fake_quantize])


def gradients(x, p, grad, fake_quantize=quantkit.fake_quantize, **options):
    """(x's, scale's, zero_point's), None where there is none."""
    leaves = [t if t.is_floating_point() else None for t in (x, p.scale, p.zero_point)]
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in leaves]
    named = zip(("scale", "zero_point"), leaves[1:], strict=True)
    learned = dataclasses.replace(p, **{name: t for name, t in named if t is not None})
    y = fake_quantize(x if leaves[0] is None else leaves[0], learned, **options)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
    return tuple(None if t is None else next(found) for t in leaves)


def exact_sum(terms, dtype):
    """Of float64 numbers, by fractions, rounded once."""
    if special := [t for t in terms if not math.isfinite(t)]:
        return float(sum(special))
    total = nearest(sum(map(Fraction, terms), Fraction(0)), *ROUNDED[dtype])
    if abs(total) > Fraction(torch.finfo(dtype).max):
        return math.copysign(math.inf, total)
    return float(total)


def summed(terms, parameter, block_size=None):
    """Over what shares each number of a parameter."""
    shape = (1,) * (terms.ndim - parameter.dim()) + tuple(parameter.shape)
    groups = {}
    for place in np.ndindex(*terms.shape):
        owner = tuple(
            min(i // block_size[dim], size - 1) if block_size else i * size // whole
            for dim, (i, size, whole) in enumerate(zip(place, shape, terms.shape, strict=True))
        )
        groups.setdefault(owner, []).append(float(terms[place]))
    expected = torch.zeros(shape, dtype=torch.float64)
    for owner, members in groups.items():
        expected[owner] = exact_sum(members, parameter.dtype)
    return expected.reshape(parameter.shape).to(parameter.dtype)


def spread(p, shape, block_size=None):
    """A parameter as float32 numbers of x's shape."""
    p = p.detach().to(torch.float32).numpy()
    p = p.reshape((1,) * (len(shape) - p.ndim) + p.shape)
    for dim, size in enumerate(p.shape):
        block = block_size[dim] if block_size else shape[dim] // size
        p = p.repeat(block, dim) if size > 1 else p
        p = p.take(range(min(p.shape[dim], shape[dim])), dim)
    return np.broadcast_to(p, shape)


def expected(x, p, grad, numbers, inside, block_size=None):
    """(scale's, zero_point's) of the formula, with numpy and fractions."""
    f32, shape = np.float32, tuple(x.shape)
    scale, zero = (spread(t, shape, block_size) for t in (p.scale, p.zero_point))
    with np.errstate(all="ignore"):
        quotient = x.detach().to(torch.float32).numpy() / scale
        d = numbers.astype(f32) - zero
        d = np.where(inside, d - quotient, d).astype(f32)
        g = grad.to(torch.float32).numpy()
        kept = ~np.isnan(quotient + zero)
        of_scale = np.where(kept, g.astype(float) * d.astype(float), 0.0)
        outside = np.where(kept & ~inside, -(g * scale), f32(0)).astype(float)
    return (
        summed(of_scale, p.scale, block_size),
        summed(outside, p.zero_point, block_size),
    )  # fmt: skip


BLOCKS = (None, [1, -1], [2, 3], [-1, 1], [-1, 2])
CASES = list(itertools.product(FLOATS, BLOCKS))


@EVERY
@pytest.mark.parametrize(("dtype", "blocks"), CASES, ids=str)
def test_version_1_steps(fake_quantize, dtype, blocks):
    for seed in range(3):
        scale, zero_point = given((4, 6), blocks, dtype, seed, integral=seed == 0)
        p = quantkit.QuantizationParams(scale, zero_point, -20, 19)
        x, grad = (values((4, 6), dtype, seed + s, special=seed == 2) for s in (0, 9))
        of_x, of_scale, of_zero = gradients(x, p, grad, fake_quantize)
        q = quantkit.quantize_tensor(x, p).numpy()
        inside = reference._mask(x, p.scale, p.zero_point, -20, 19).numpy()
        assert_same(of_x, torch.where(torch.from_numpy(inside), grad, torch.zeros((), dtype=dtype)))
        right = expected(x, p, grad, q, inside)
        assert_same((of_scale, of_zero), right)


@EVERY
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "float8_e4m3fn", "float4_e2m1fn"])
def test_float32_steps(fake_quantize, name, dtype):
    """Blocks whose last ones are short, too."""
    for seed, blocks in enumerate(([5, 6], [2, 4], [1, 4], [4, 3])):
        f = getattr(torch, {"float4_e2m1fn": "float4_e2m1fn_x2"}.get(name, name))
        x = values((5, 6), dtype, seed, special=True, spread=1.0)
        chosen = quantkit.get_symmetric_qparams(
            values((5, 6), dtype, 5), dtype=f, block_size=blocks, compute_dtype=torch.float32
        )
        p = quantkit.QuantizationParams(
            chosen.scale, chosen.zero_point + (0.5 if "int" in name else 0), chosen.q_min,
            chosen.q_max, dtype=f, block_size=blocks, compute_dtype=torch.float32,
        )  # fmt: skip
        grad = values((5, 6), dtype, seed + 9)
        _, of_scale, of_zero = gradients(x, p, grad, fake_quantize)
        ones = quantkit.QuantizationParams(
            torch.ones_like(p.scale), torch.zeros_like(p.zero_point), p.q_min, p.q_max, dtype=f,
            block_size=blocks, compute_dtype=torch.float32,
        )  # fmt: skip
        numbers = quantkit.dequantize_tensor(quantkit.quantize_tensor(x, p), ones).numpy()
        unit, _, _ = gradients(x, p, torch.ones_like(x), fake_quantize)
        inside = (unit == 1).numpy()
        scale, zero = expected(x, p, grad, numbers, inside, blocks)
        assert_same(of_scale, scale)
        if "int" in name:
            assert_same(of_zero, zero)
        else:
            assert of_zero is None


@EVERY
def test_sums_are_exact(fake_quantize):
    """Products from 2^-298 to 2^254 side by side, cancellation, ties."""
    rng = np.random.default_rng(1)
    for dtype in (torch.float32, torch.float64):
        for n in (1, 2, 3, 17, 1000):
            g = np.ldexp(rng.standard_normal(n), rng.integers(-149, 127, n)).astype(np.float32)
            g[n // 2 :] = -g[: n - n // 2]  # what is left is tiny
            g[rng.integers(n)] = np.float32(1e-45)
            x = np.ldexp(rng.standard_normal(n), rng.integers(-126, 8, n)).astype(np.float32)
            x, g = torch.from_numpy(x), torch.from_numpy(g)
            p = quantkit.QuantizationParams(
                torch.ones((), dtype=dtype), torch.zeros(()), -(2**15), 2**15 - 1, dtype=torch.int16
            )
            q = quantkit.quantize_tensor(x, p).numpy()
            right, _ = expected(x, p, g, q, np.abs(q) < 2**15)
            assert_same(gradients(x, p, g, fake_quantize)[1], right)


@EVERY
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_sums_are_rounded_once(fake_quantize, dtype):
    """In float64 first the sum would become a tie, and then an even number."""
    tie = torch.finfo(dtype).eps / 2
    p = quantkit.QuantizationParams(
        torch.ones((), dtype=dtype), torch.zeros(()), -1, 1, compute_dtype=torch.float32
    )
    x, g = torch.full((3,), 20.0), torch.tensor([1.0, tie, 2.0**-80])
    found = gradients(x, p, g, fake_quantize)[1]
    assert_same(found, torch.tensor(1 + 2 * tie, dtype=dtype))


def test_any_order_and_threads_give_the_same_bits(threads):
    x, g = values((64, 96), torch.float32), values((64, 96), torch.float32, 3, spread=30.0)
    p = quantkit.QuantizationParams(torch.tensor(0.03), torch.tensor(0.0), -8, 7)
    found = gradients(x, p, g)[1:]
    for order in (torch.randperm(64), torch.arange(63, -1, -1)):
        assert_same(gradients(x[order], p, g[order])[1:], found)
    for n in (1, 3):
        threads(n)
        assert_same(gradients(x, p, g)[1:], found)
    for layout in STRIDES.values():
        x, grad = layout(values((8, 12), torch.float32)), layout(values((8, 12), torch.float32, 3))
        right = gradients(x.contiguous(), p, grad.contiguous())[1:]
        assert_same(gradients(x, p, grad)[1:], right)


@EVERY
def test_products_that_are_not_finite(fake_quantize):
    inf, nan = math.inf, math.nan
    p = quantkit.QuantizationParams(torch.ones(()), torch.zeros(()), -8, 7)
    for x, g, right in (
        ([0.25, 20, 1], [1, inf, 1], inf),
        ([0.25, 20, -20], [1, inf, inf], nan),  # 7 * inf and -8 * inf
        ([0.25, 20, 20], [1, nan, inf], nan),
        ([1.0, 0, 0], [inf, 1, 1], nan),  # d is 0
        ([nan, 20, 0], [inf, 1, 1], 7.0),  # a NaN adds nothing
        ([inf, -inf, 0], [1, 2, 1], -9.0),
        ([0.0, 0, 0], [-1, -1, -1], 0.0),  # +0.0
    ):
        found = gradients(torch.tensor(x), p, torch.tensor(g, dtype=torch.float32), fake_quantize)
        assert_same(found[1], torch.tensor(right))
        assert not found[1].eq(0) or not found[1].signbit()
    big = torch.tensor([3e38, 3e38])
    assert gradients(torch.full((2,), 20.0), p, big, fake_quantize)[1] == inf  # overflow at the end
    p = quantkit.QuantizationParams(torch.full((), 10.0), torch.zeros(()), -8, 7)
    found = gradients(torch.tensor([200.0, 0]), p, big, fake_quantize)[2]
    assert found == -inf  # grad · scale is one float32 product


@EVERY
def test_draws_are_those_of_the_forward_call(fake_quantize):
    x, g = values((4, 6), torch.float32), values((4, 6), torch.float32, 3)
    p = quantkit.QuantizationParams(
        torch.full((4, 1), 0.3), torch.zeros(4, 1), -8, 7, compute_dtype=torch.float32
    )
    q = quantkit.quantize_tensor(x, p, seed=(5, 1)).numpy()
    v = x.numpy() / np.float32(0.3)
    right = expected(x, p, g, q, (v >= -8) & (v <= 7))
    assert_same(gradients(x, p, g, fake_quantize, seed=(5, 1))[1:], right)


@EVERY
def test_who_gets_a_gradient(fake_quantize):
    scale, zero = torch.full((), 0.1), torch.zeros(())
    for which in itertools.product((False, True), repeat=3):
        x = torch.linspace(-2, 2, 9)
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, scale, zero), which, strict=True)]
        y = fake_quantize(leaves[0], quantkit.QuantizationParams(*leaves[1:], -8, 7))
        assert y.requires_grad == any(which)
        if any(which):
            y.sum().backward()
        assert [t.grad is not None for t in leaves] == list(which)
    with torch.no_grad():
        assert not fake_quantize(
            *leaves[:1], quantkit.QuantizationParams(*leaves[1:], -8, 7)
        ).requires_grad
    integers = fake_quantize(
        torch.arange(9, dtype=torch.int32), quantkit.QuantizationParams(*leaves[1:], -8, 7)
    )
    leaves[1].grad = None
    integers.sum().backward()
    assert leaves[1].grad is not None
    empty = fake_quantize(torch.zeros(0, 3), quantkit.QuantizationParams(leaves[1], zero, -8, 7))
    leaves[1].grad = None
    empty.sum().backward()
    assert_same(leaves[1].grad, torch.zeros(()))


@EVERY
def test_what_has_no_gradient_says_so(fake_quantize):
    x, one = torch.randn(2, 32), torch.ones(())
    coded = torch.ones(2, 1).to(torch.float8_e4m3fn).requires_grad_()
    kinds = {"dtype": torch.float4_e2m1fn_x2, "block_size": (1, 32)}
    p = quantkit.QuantizationParams(coded, torch.zeros(()), -6, 6, **kinds)
    with pytest.raises(ValueError, match=r"^scale: torch.float8_e4m3fn requires grad"):
        fake_quantize(x, p)
    p = quantkit.QuantizationParams(
        coded.detach(), torch.zeros(()), -6, 6, global_scale=one.clone().requires_grad_(), **kinds
    )
    with pytest.raises(ValueError, match=r"^global_scale: requires grad"):
        fake_quantize(x, p)
    p = quantkit.QuantizationParams(
        torch.ones(2, 1, requires_grad=True), torch.zeros(()), -6, 6, global_scale=one, **kinds
    )
    with pytest.raises(ValueError, match=r"^scale: requires grad.*global_scale"):
        fake_quantize(x, p)
    with torch.no_grad():
        fake_quantize(x, p)


@EVERY
def test_derivatives_that_are_refused(fake_quantize):
    x = torch.linspace(-2, 2, 9).requires_grad_()
    scale = torch.full((), 0.1, requires_grad=True)
    p = quantkit.QuantizationParams(scale, torch.zeros(()), -8, 7)
    weight = torch.ones(9, requires_grad=True)
    of_x, of_scale = torch.autograd.grad(
        (fake_quantize(x, p) * weight).sum(), (x, scale), create_graph=True
    )
    torch.autograd.grad(of_x.sum(), weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(of_scale, weight)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scale.detach(), torch.ones(()))
        p = quantkit.QuantizationParams(dual, torch.zeros(()), -8, 7)
        with pytest.raises(RuntimeError, match="reverse mode only"):
            fake_quantize(x.detach(), p)


@EVERY
def test_a_change_in_place_is_an_error(fake_quantize):
    for changed in (0, 1, 2):
        leaves = [
            t.clone() for t in (torch.linspace(-2, 2, 9), torch.full((), 0.1), torch.zeros(()))
        ]
        roots = [t.requires_grad_() for t in leaves]
        x, scale, zero = (t * 1 for t in roots)
        y = fake_quantize(x, quantkit.QuantizationParams(scale, zero, -8, 7))
        with torch.no_grad():
            (x, scale, zero)[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_compiled_and_checkpointed():
    x, g = values((8, 16), torch.float32), values((8, 16), torch.float32, 3)
    for options in ({}, {"compute_dtype": torch.float32, "block_size": (1, -1)}):
        p = quantkit.QuantizationParams(
            torch.full((8, 1), 0.3), torch.zeros(8, 1), -8, 7, **options
        )

        def checkpointed(x, p):
            return torch.utils.checkpoint.checkpoint(
                quantkit.fake_quantize, x, p, use_reentrant=False
            )

        right = gradients(x, p, g)
        assert_same(gradients(x, p, g, checkpointed), right)
        compiled = torch.compile(quantkit.fake_quantize, fullgraph=True, backend="aot_eager")
        assert_same(gradients(x, p, g, compiled), right)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func():
    x = values((3, 8), torch.float32)
    p = quantkit.QuantizationParams(torch.full((), 0.3), torch.zeros(()), -8, 7)

    def loss(scale, zero, x):
        return quantkit.fake_quantize(x, quantkit.QuantizationParams(scale, zero, -8, 7)).sum()

    found = torch.func.grad(loss, (0, 1))(p.scale, p.zero_point, x)
    assert_same(found, gradients(x, p, torch.ones_like(x))[1:])
    each = torch.vmap(torch.func.grad(loss), (None, None, 0))(p.scale, p.zero_point, x)
    rows = [gradients(row, p, torch.ones_like(row))[1] for row in x]
    assert_same(each, torch.stack(rows))
