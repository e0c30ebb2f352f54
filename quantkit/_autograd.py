"""The gradient of fake_quantize: straight through inside the limits, 0 elsewhere (docs/numerics.md)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import _torch

_is_compiling, _is_tracing = torch.compiler.is_compiling, _torch.is_tracing
_may_be_transformed = _torch.may_be_transformed


def straight_through(
    masked: Callable[..., Any], gradient: Callable[..., Any], keywords: Mapping[str, Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """fake_quantize with its gradient with respect to x, forward and reverse: for transforms, and fast.

    Only the mask is saved: what is changed in place afterwards does not matter. keywords: the defaults
    of arguments that masked takes by name only. A Function takes all by position.
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

        @staticmethod
        def forward(*args):
            return masked(*args) if not keywords else named(args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_non_differentiable(output[1])
            ctx.set_materialize_grads(False)  # zeros for the mask, in every backward
            ctx.dtype = output[0].dtype
            save(ctx, output[1])

        @staticmethod
        def backward(ctx, *grads):
            return derivative(ctx, grads[0]), *[None] * (len(ctx.needs_input_grad) - 1)

        @staticmethod
        def jvp(ctx, *tangents):
            return derivative(ctx, tangents[0]), None

    def named(args):
        return masked(
            *args[: -len(keywords)], **dict(zip(keywords, args[-len(keywords) :], strict=True))
        )

    def applied(apply):
        if not keywords:
            return lambda *args: apply(*args)[0]
        return lambda *args, **options: apply(*args, *{**keywords, **options}.values())[0]

    return applied(FakeQuantize.apply), applied(_torch.fast_apply(FakeQuantize))


def keywords_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of the arguments that function takes by name only."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def is_differentiable(x: torch.Tensor) -> bool:
    """Whether a derivative of what is made of x may be asked for, in either mode."""
    wanted = getattr(x, "requires_grad", False) and torch.is_grad_enabled()
    return wanted or _torch.may_have_tangents()


def by_mode(
    operator: Callable[..., Any], transformed: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """What quantkit.fake_quantize calls: without the gradient's cost where none is due."""

    def fake_quantize(x, *args, **options):
        if _is_compiling() or _is_tracing():
            call = operator  # a graph may be differentiated later, and read by others
        elif _may_be_transformed() and _torch.is_transformed() is not False:
            call = transformed
        else:
            call = operator if is_differentiable(x) else plain
        return call(x, *args, **options)

    return fake_quantize


def reference(
    plain: Callable[..., Any], masked: Callable[..., Any], gradient: Callable[..., Any]
) -> Callable[..., Any]:
    """What quantkit.reference.fake_quantize calls."""
    differentiable, _ = straight_through(masked, gradient, keywords_of(masked))
    return by_mode(differentiable, differentiable, plain)


def kernel(differentiable: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's Autograd kernel."""

    def fake_quantize(x, *args, **options):
        if _torch.is_transformed():  # a kernel sees one level of them, a Function all
            raise RuntimeError(
                "torch.ops.quantkit.fake_quantize: torch.func's derivatives do not reach operators; "
                "call quantkit.fake_quantize, outside of torch.compile"
            )
        call = differentiable if is_differentiable(x) else plain
        return call(x, *args, **options)

    return fake_quantize
