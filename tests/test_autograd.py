"""fake_quantize's gradient in every mode of autograd, and what autograd learns of the other operators."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from lib.cases import (
    FLOATS,
    STRIDES,
    arguments,
    assert_same,
    flat,
    given,
    invoke,
    tensors_of,
    values,
)
from torch.autograd import forward_ad

import quantkit
from quantkit import reference
from quantkit.operators import OPERATORS, overloads

ops = torch.ops.quantkit
pytestmark = pytest.mark.fallback
BLOCKS = (None, [1, -1], [2, 3], [-1, 1])
LIMITS = (-20, 19)


def parameters(dtype, blocks=None, shape=(4, 6)):
    return quantkit.QuantizationParams(*given(shape, blocks, dtype, 1), *LIMITS)


def direct(x, p):
    return ops.fake_quantize(x, p.scale, p.zero_point, p.q_min, p.q_max)


def outs_of(name, x):
    """Arguments of a call, and outputs for it."""
    args = arguments(name, x, None, 4)
    results = flat(invoke(OPERATORS[name].reference, args))
    return args, dict(zip(OPERATORS[name].results, map(torch.zeros_like, results), strict=True))


def write(name, args, outs):
    invoke(partial(overloads(name)[1], **outs), args)


EACH_OPERATOR = pytest.mark.parametrize("name", OPERATORS)
EVERY = pytest.mark.parametrize(
    "fake_quantize", [quantkit.fake_quantize, direct, reference.fake_quantize]
)


@EVERY
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_passes_inside_the_limits_only(fake_quantize, dtype):
    x = torch.tensor([-9, -8.5, -8.4, 0, 7.4, 7.5, 8, float("nan"), float("inf")], dtype=dtype)
    p = quantkit.QuantizationParams(
        torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype), -8, 7
    )
    # Half to even: -8.5 rounds to -8, inside; 7.5 rounds to 8, outside.
    inside = torch.tensor([0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=dtype)
    leaf = x.requires_grad_()
    y = fake_quantize(leaf, p)
    y.backward(torch.full_like(y, 3))
    assert_same(leaf.grad, inside * 3)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_of_any_strides_is_the_references(dtype, blocks):
    p, x = parameters(dtype, blocks), values((4, 6), dtype, 2, special=True)
    incoming = [layout(values((4, 6), dtype, 3)) for layout in STRIDES.values()]
    incoming.append(torch.full((), 2, dtype=dtype).expand(4, 6))  # that of sum(): stride 0
    for grad in incoming:
        made = []
        for fake_quantize in (quantkit.fake_quantize, reference.fake_quantize):
            leaf = x.clone().requires_grad_()
            fake_quantize(leaf, p).backward(grad)
            made.append(leaf.grad)
        assert_same(made[0], made[1])


@EVERY
def test_gradient_is_linear_and_differentiable_again(fake_quantize):
    p = quantkit.QuantizationParams(torch.tensor(0.1), torch.tensor(0.0), -8, 7)
    x = torch.linspace(-1, 1, 21, requires_grad=True)
    weight = torch.ones(21, requires_grad=True)
    (grad,) = torch.autograd.grad((fake_quantize(x, p) * weight).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad((grad * 5).sum(), weight, create_graph=True)
    inside = (torch.round(x / 0.1) >= -8) & (torch.round(x / 0.1) <= 7)
    assert_same(again, inside.float() * 5)


@EVERY
def test_what_is_changed_in_place_afterwards_does_not_matter(fake_quantize):
    leaf = values((4, 6), torch.float32).requires_grad_()
    p = parameters(torch.float32, [1, -1])
    (expected,) = torch.autograd.grad(fake_quantize(leaf, p).sum(), leaf)
    assert 0 < expected.sum() < 24
    for changed in ("x", "scale", "zero_point"):
        x, p = leaf * 1, parameters(torch.float32, [1, -1])
        y = fake_quantize(x, p)
        with torch.no_grad():
            ({"x": x} | vars(p))[changed].mul_(1000).add_(1)
        assert_same(torch.autograd.grad(y.sum(), leaf)[0], expected)


@EVERY
def test_parameters_made_in_inference_mode(fake_quantize):
    x, p = values((4, 6), torch.float32).requires_grad_(), parameters(torch.float32)
    fake_quantize(x, p).sum().backward()
    with torch.inference_mode():
        same = dataclasses.replace(p, scale=p.scale.clone(), zero_point=p.zero_point.clone())
    leaf = x.detach().clone().requires_grad_()
    fake_quantize(leaf, same).sum().backward()
    assert_same(leaf.grad, x.grad)


@EVERY
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_byte_an_element_is_saved(fake_quantize, dtype):
    x, p = values((4, 6), dtype).t().requires_grad_(), parameters(dtype, shape=(6, 4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(x, p)
        fake_quantize(x.detach(), p)
        with torch.no_grad():
            fake_quantize(x, p)
    (mask,) = saved
    assert mask.dtype == torch.bool and mask.shape == x.shape and mask.stride() == x.stride()
    assert mask.untyped_storage().nbytes() == x.numel()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_gradient_has_the_bits_of_contract_1(dtype):
    for (layout, blocks), seed in itertools.product(itertools.product(STRIDES, BLOCKS), range(2)):
        x = STRIDES[layout](values((4, 6), dtype, seed, special=True))
        p, grad = parameters(dtype, blocks), values((4, 6), dtype, seed + 5, special=True)
        given = (x, p.scale, p.zero_point, *LIMITS)
        expected = ops._fake_quantize_backward(grad, *given)
        y, mask = ops._fake_quantize_masked(*given)
        assert_same(y, ops._fake_quantize(*given))
        assert_same(ops._masked_gradient(grad, mask), expected)
        leaf = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(quantkit.fake_quantize(leaf, p), leaf, grad)
        assert_same(found, expected)


def test_hooks_and_a_graph_that_is_kept():
    x, p = values((4, 6), torch.float32).requires_grad_(), parameters(torch.float32)
    seen = []
    x.register_hook(seen.append)
    y = quantkit.fake_quantize(x, p)
    y.backward(torch.ones(4, 6), retain_graph=True)
    y.backward(torch.ones(4, 6))
    assert_same(seen[0], seen[1])
    assert_same(x.grad, seen[0] * 2)


@EACH_OPERATOR
def test_out_claims_no_gradient(name):
    args, outs = outs_of(name, values((4, 6), torch.float32))
    leaf = args[0].float().clone().requires_grad_()
    args = args if name.startswith("dequantize") else (leaf, *args[1:])
    write(name, args, outs)
    assert not any(t.requires_grad for t in outs.values())


@EACH_OPERATOR
def test_which_results_carry_a_gradient(name):
    args = arguments(name, values((4, 6), torch.float32), [1, -1], 4)
    for t in tensors_of(args):
        if t.is_floating_point() and t.element_size() > 1:
            t.requires_grad_()
    results = flat(invoke(overloads(name)[0], args))
    carries = name.startswith(("fake_quantize", "linear"))
    assert any(t.requires_grad for t in results) == carries


def test_modes_without_gradient():
    x, p = values((4, 6), torch.float32).requires_grad_(), parameters(torch.float32)
    expected = reference.fake_quantize(x.detach(), p)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for fake_quantize in (quantkit.fake_quantize, direct):
                y = fake_quantize(x, p)
                assert not y.requires_grad
                assert y.is_inference() == (mode is torch.inference_mode)
            q, x_hat, _ = quantkit.quantize_dequant(x)
            assert not q.requires_grad and not x_hat.requires_grad
        assert_same(y.clone(), expected)
    q, x_hat, chosen = quantkit.quantize_dequant(x)
    for result in (q, x_hat, chosen.scale, quantkit.dequantize_tensor(q, chosen)):
        assert not result.requires_grad


def test_autocast_leaves_the_dtype_given():
    x, p = values((4, 6), torch.float32), parameters(torch.float32)
    expected = reference.fake_quantize(x, p), *reference.quantize_dequant(x)[:2]
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, results = quantkit.fake_quantize(leaf, p), quantkit.quantize_dequant(x)[:2]
        loss = (y @ torch.ones(6, 2)).sum()
    loss.backward()
    assert_same((y.detach(), *results), expected)
    assert leaf.grad.dtype == torch.float32


# ---- forward mode and torch.func ------------------------------------------------------------------


@EVERY
def test_derivatives_that_nobody_gives_are_zeros(fake_quantize):
    """A gradient that the next function leaves out."""

    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y * 1

        @staticmethod
        def backward(ctx, *grads):
            return None

    for dtype in (torch.float32, torch.bfloat16):
        p, leaf = parameters(dtype), values((4, 6), dtype).requires_grad_()
        Dropped.apply(fake_quantize(leaf, p)).sum().backward()
        assert_same(leaf.grad, torch.zeros((4, 6), dtype=dtype))


@pytest.mark.parametrize("fake_quantize", [quantkit.fake_quantize, direct])
def test_forward_mode(fake_quantize):
    x, p = values((4, 6), torch.float32), parameters(torch.float32)
    tangent = values((4, 6), torch.float32, 5)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(fake_quantize(forward_ad.make_dual(x, tangent), p))
    assert_same(y.primal, reference.fake_quantize(x, p))
    assert_same(y.tangent, ops._fake_quantize_backward(tangent, x, p.scale, p.zero_point, *LIMITS))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func():
    p = quantkit.QuantizationParams(torch.tensor(0.1), torch.tensor(0.0), -8, 7)
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    inside = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])

    def f(x):
        return quantkit.fake_quantize(x, p)

    def loss(x):
        return (f(x) * x * x).sum()

    y = f(x)
    assert_same(torch.func.grad(loss)(x), inside * x * x + 2 * x * y)
    second = torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)
    assert_same(second, inside * 2 * x + 2 * y + 2 * x * inside)
    value, tangent = torch.func.jvp(f, (x,), (torch.full((5,), 3.0),))
    assert_same((value, tangent), (y, inside * 3))
    assert_same(torch.func.jacrev(f)(x), torch.diag(inside))
    assert_same(torch.func.jacfwd(f)(x).contiguous(), torch.diag(inside))
    both = torch.stack([x, x / 2])
    assert_same(torch.vmap(f)(both), torch.stack([y, f(x / 2)]))
    each = torch.vmap(torch.func.grad(loss))(both)
    assert_same(each, torch.stack([torch.func.grad(loss)(x), torch.func.grad(loss)(x / 2)]))


def test_the_operator_refuses_the_derivatives_of_torch_func():
    x, p = values((4, 6), torch.float32), parameters(torch.float32)
    with pytest.raises(RuntimeError, match="outside of torch"):
        torch.func.grad(lambda x: direct(x, p).sum())(x)

    def nested(a):  # differentiable on the outer level, constant on the inner one
        return torch.func.grad(lambda y: (y * direct(a, p)).sum())(x).sum()

    with pytest.raises(RuntimeError, match="outside of torch"):
        torch.func.grad(nested)(x)


def test_compiled_derivatives_of_torch_func_are_right_or_refused():
    """torch 2.13 hands the operator what it cannot differentiate, later ones do not."""

    def loss(x):
        return (quantkit.fake_quantize(x, p) * 3).sum()

    x, p = values((4, 6), torch.float32), parameters(torch.float32)
    compiled = torch.compile(loss, backend="eager")
    for function in (
        torch.func.grad(compiled),
        torch.compile(torch.func.grad(loss), backend="eager"),
    ):
        try:
            gradient = function(x)
        except (RuntimeError, AssertionError):
            continue  # by the operator, or by dynamo itself (2.14.1: an assertion on is_leaf)
        else:
            assert_same(gradient, torch.func.grad(loss)(x))


def test_functional_call():
    class Layer(torch.nn.Linear):
        def forward(self, x):
            return super().forward(quantkit.fake_quantize(x, p))

    p, layer = parameters(torch.float32), Layer(6, 2)
    x = values((4, 6), torch.float32)
    weights = {name: torch.ones_like(t) for name, t in layer.named_parameters()}
    y = torch.func.functional_call(layer, weights, (x,))
    assert_same(
        y,
        torch.nn.functional.linear(reference.fake_quantize(x, p), torch.ones(2, 6), torch.ones(2)),
    )


# ---- out= -----------------------------------------------------------------------------------------


@EACH_OPERATOR
def test_out_counts_as_written(name):
    """A graph that saved the tensor must notice."""
    args, outs = outs_of(name, values((4, 6), torch.float32))
    versions = {k: t._version for k, t in outs.items()}
    write(name, args, outs)
    assert all(t._version > versions[k] for k, t in outs.items())
    for k, saved in outs.items():
        if saved.dtype.is_floating_point:
            leaf = torch.ones_like(saved, requires_grad=True)
            product = leaf * saved
            write(name, args, outs)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.sum().backward()
            view = torch.zeros(2, *saved.shape, dtype=saved.dtype)[0]
            product = leaf * view._base[0]
            write(name, args, outs | {k: view})
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.sum().backward()


@EACH_OPERATOR
def test_out_inside_a_graph_is_refused(name):
    args, outs = outs_of(name, values((4, 6), torch.float32))
    results = flat(invoke(overloads(name)[0], args))
    for (k, t), expected in zip(outs.items(), results, strict=True):
        if not t.dtype.is_floating_point:
            continue
        leaf = t.clone().requires_grad_()
        result = leaf * 1
        for bad in (leaf, result):
            before = bad.detach().clone()
            with pytest.raises(RuntimeError, match=f"^{k}: "):
                write(name, args, outs | {k: bad})
            assert torch.equal(bad.detach(), before)
            with torch.no_grad():
                write(name, args, outs | {k: bad})
            assert_same(bad.detach(), expected)


def test_inference_tensor_is_an_out_in_inference_mode_only():
    args, outs = outs_of("quantize", values((4, 6), torch.float32))
    with torch.inference_mode():
        out = torch.zeros_like(outs["out"])
        ops.quantize.out(*args, out=out)
        assert_same(out.clone(), ops.quantize(*args).clone())
        out.zero_()
    with pytest.raises(
        RuntimeError, match=r"^out: cannot be written: .*(InferenceMode|standard error)"
    ):
        ops.quantize.out(*args, out=out)
    assert not out.any()
