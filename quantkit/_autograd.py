"""The gradient of fake_quantize: straight through inside the limits, 0 elsewhere (docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _torch

_is_compiling, _is_tracing = torch.compiler.is_compiling, _torch.is_tracing
_may_be_transformed = _torch.may_be_transformed


def straight_through(
    masked: Callable[..., Any], gradient: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """fake_quantize with its gradient with respect to x, forward and reverse: for transforms, and fast.

    Only the mask is saved: what is changed in place afterwards does not matter.
    """

    def save(ctx, mask):
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)

    def derivative(ctx, grad):
        (mask,) = ctx.saved_tensors
        if grad is None:
            return torch.zeros_like(mask, dtype=ctx.dtype)
        return Gradient.apply(grad, mask)

    class Gradient(torch.autograd.Function):
        """Linear in grad: its own gradient with respect to grad is itself."""

        generate_vmap_rule = True
        forward = staticmethod(gradient)

        @staticmethod
        def setup_context(ctx, inputs, output):
            save(ctx, inputs[1])

        @staticmethod
        def backward(ctx, *grads):
            return derivative(ctx, *grads), None

        @staticmethod
        def jvp(ctx, *tangents):
            return derivative(ctx, tangents[0])

    class FakeQuantize(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(masked)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_non_differentiable(output[1])
            ctx.set_materialize_grads(False)  # zeros for the mask, in every backward
            ctx.dtype = output[0].dtype
            save(ctx, output[1])

        @staticmethod
        def backward(ctx, *grads):
            return derivative(ctx, grads[0]), *[None] * 4

        @staticmethod
        def jvp(ctx, *tangents):
            return derivative(ctx, tangents[0]), None

    apply, fast_apply = FakeQuantize.apply, _torch.fast_apply(FakeQuantize)
    return lambda *args: apply(*args)[0], lambda *args: fast_apply(*args)[0]


def is_differentiable(x: torch.Tensor) -> bool:
    """Whether a derivative of what is made of x may be asked for, in either mode."""
    wanted = getattr(x, "requires_grad", False) and torch.is_grad_enabled()
    return wanted or _torch.may_have_tangents()


def by_mode(
    operator: Callable[..., Any], transformed: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """What quantkit.fake_quantize calls: without the gradient's cost where none is due."""

    def fake_quantize(x, scale, zero_point, q_min, q_max):
        if _is_compiling() or _is_tracing():
            call = operator  # a graph may be differentiated later, and read by others
        elif _may_be_transformed() and _torch.is_transformed() is not False:
            call = transformed
        else:
            call = operator if is_differentiable(x) else plain
        return call(x, scale, zero_point, q_min, q_max)

    return fake_quantize


def kernel(differentiable: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's Autograd kernel."""

    def fake_quantize(x, scale, zero_point, q_min, q_max):
        if _torch.is_transformed():  # a kernel sees one level of them, a Function all
            raise RuntimeError(
                "torch.ops.quantkit.fake_quantize: torch.func's derivatives do not reach operators; "
                "call quantkit.fake_quantize, outside of torch.compile"
            )
        call = differentiable if is_differentiable(x) else plain
        return call(x, scale, zero_point, q_min, q_max)

    return fake_quantize
