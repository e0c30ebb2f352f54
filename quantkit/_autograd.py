"""The gradient of fake_quantize: straight through inside the limits, 0 elsewhere (docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _torch

_is_compiling, _is_tracing = torch.compiler.is_compiling, _torch.is_tracing
_may_be_transformed = _torch.may_be_transformed
_Function = type[torch.autograd.Function]


def straight_through(fake_quantize: Callable[..., Any], gradient: Callable[..., Any]) -> _Function:
    """fake_quantize with its gradient with respect to x, forward and reverse."""

    def save(ctx, given):
        *tensors, ctx.q_min, ctx.q_max = given
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    def derivative(ctx, grad):
        return Gradient.apply(grad, *ctx.saved_tensors, ctx.q_min, ctx.q_max)

    class Gradient(torch.autograd.Function):
        """Linear in grad: its own gradient with respect to grad is itself."""

        generate_vmap_rule = True
        forward = staticmethod(gradient)

        @staticmethod
        def setup_context(ctx, inputs, output):
            save(ctx, inputs[1:])

        @staticmethod
        def backward(ctx, *grads):
            return derivative(ctx, *grads), *[None] * 5

        @staticmethod
        def jvp(ctx, *tangents):
            return derivative(ctx, tangents[0])

    class FakeQuantize(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(fake_quantize)

        @staticmethod
        def setup_context(ctx, inputs, output):
            save(ctx, inputs)

        @staticmethod
        def backward(ctx, *grads):
            return derivative(ctx, *grads), *[None] * 4

        @staticmethod
        def jvp(ctx, *tangents):
            return derivative(ctx, tangents[0])

    return FakeQuantize


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


def kernel(function: _Function, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's Autograd kernel."""
    apply = _torch.fast_apply(function)

    def fake_quantize(x, scale, zero_point, q_min, q_max):
        if _torch.is_transformed():  # a kernel sees one level of them, a Function all
            raise RuntimeError(
                "torch.ops.quantkit.fake_quantize: torch.func's derivatives do not reach operators; "
                "call quantkit.fake_quantize, outside of torch.compile"
            )
        call = apply if is_differentiable(x) else plain
        return call(x, scale, zero_point, q_min, q_max)

    return fake_quantize
