"""The gradients of fake_quantize, and the errors of linear_w8a8, which has none (docs/numerics.md).

fake_quantize's x has one straight through inside the limits, 0 elsewhere; scale and zero_point learn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _checks, _torch

_is_compiling, _is_tracing = torch.compiler.is_compiling, _torch.is_tracing
_may_be_transformed = _torch.may_be_transformed


def differentiable(
    masked: Callable[..., Any],
    gradient: Callable[..., Any],
    of_parameters: Sequence[Callable[..., Any]],
    keywords: Mapping[str, Any],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """fake_quantize with its gradients, forward and reverse: for transforms, and fast.

    Where x alone requires grad only the mask is saved: what is changed in place afterwards does not
    matter. of_parameters: the gradients of scale and zero_point. keywords: the defaults of arguments
    that masked takes by name only. A Function takes all by position.
    """

    def save(ctx, mask, *others):
        ctx.save_for_backward(mask, *others)
        ctx.save_for_forward(mask)

    def derivative(ctx, grad, mask):
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
            return derivative(ctx, *grads, *ctx.saved_tensors), None

        @staticmethod
        def jvp(ctx, *tangents):
            return derivative(ctx, tangents[0], *ctx.saved_tensors)

    class ParameterGradient(torch.autograd.Function):
        """Of scale (which=0) or zero_point (1); it has no gradient of its own."""

        generate_vmap_rule = True

        @staticmethod
        def forward(which, *args):
            return named(of_parameters[which], args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise _not_again()

        @staticmethod
        def jvp(ctx, *tangents):
            raise _not_again()

    class FakeQuantize(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return named(masked, args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_non_differentiable(output[1])
            ctx.set_materialize_grads(False)  # zeros for the mask, in every backward
            ctx.dtype = output[0].dtype
            ctx.learned = [which for which in (0, 1) if ctx.needs_input_grad[1 + which]]
            places = [i for i, v in enumerate(inputs) if isinstance(v, torch.Tensor)]
            ctx.places = places if ctx.learned else []
            ctx.inputs = [None if i in places else v for i, v in enumerate(inputs)]
            save(ctx, output[1], *(inputs[i] for i in ctx.places))

        @staticmethod
        def backward(ctx, *grads):
            mask, *tensors = ctx.saved_tensors
            made: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
            if ctx.needs_input_grad[0]:
                made[0] = derivative(ctx, grads[0], mask)
            if ctx.learned and grads[0] is not None:
                args = list(ctx.inputs)
                for place, tensor in zip(ctx.places, tensors, strict=True):
                    args[place] = tensor
                for which in ctx.learned:
                    made[1 + which] = ParameterGradient.apply(which, grads[0], *args)
            return tuple(made)

        @staticmethod
        def jvp(ctx, *tangents):
            if any(tangent is not None for tangent in tangents[1:]):
                raise RuntimeError(
                    "fake_quantize: scale and zero_point have a gradient in reverse mode only"
                )
            return derivative(ctx, tangents[0], ctx.saved_tensors[0]), None

    def named(function, args):
        if not keywords:
            return function(*args)
        split = len(args) - len(keywords)
        return function(*args[:split], **dict(zip(keywords, args[split:], strict=True)))

    def applied(apply):
        def fake_quantize(*args, **options):
            _checks.learnable(args[1], options.get("global_scale"))
            return apply(*args, *{**keywords, **options}.values())[0]

        return fake_quantize

    return applied(FakeQuantize.apply), applied(_torch.fast_apply(FakeQuantize))


def _not_again() -> RuntimeError:
    return RuntimeError(
        "fake_quantize: the gradients of scale and zero_point cannot be differentiated again"
    )


def keywords_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of the arguments that function takes by name only."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _is_differentiable(args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a derivative with respect to a tensor among them may be asked for, in either mode."""
    tensors = (*args[:3], options.get("global_scale"))  # x, scale, zero_point
    wanted = any(getattr(t, "requires_grad", False) for t in tensors) and torch.is_grad_enabled()
    return wanted or _torch.may_have_tangents()


def by_mode(
    operator: Callable[..., Any], transformed: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """What quantkit.fake_quantize calls: without the gradient's cost where none is due."""

    def fake_quantize(*args, **options):
        if _is_compiling() or _is_tracing():
            call = operator  # a graph may be differentiated later, and read by others
        elif _may_be_transformed() and _torch.is_transformed() is not False:
            call = transformed
        else:
            call = operator if _is_differentiable(args, options) else plain
        return call(*args, **options)

    return fake_quantize


def reference(
    plain: Callable[..., Any],
    masked: Callable[..., Any],
    gradient: Callable[..., Any],
    of_parameters: Sequence[Callable[..., Any]],
) -> Callable[..., Any]:
    """What quantkit.reference.fake_quantize calls."""
    transformed, _ = differentiable(masked, gradient, of_parameters, keywords_of(masked))
    return by_mode(transformed, transformed, plain)


def kernel(differentiable: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's Autograd kernel."""

    def fake_quantize(*args, **options):
        if _torch.is_transformed():  # a kernel sees one level of them, a Function all
            raise RuntimeError(
                "torch.ops.quantkit.fake_quantize: torch.func's derivatives do not reach operators; "
                "call quantkit.fake_quantize, outside of torch.compile"
            )
        call = differentiable if _is_differentiable(args, options) else plain
        return call(*args, **options)

    return fake_quantize


# The gradients of linear_w8a8, which has none. An operator, so that a compiler's graph of the backward
# raises when it runs, and not when it is made: the forward must not fail.
NO_GRADIENT = "_no_gradient(Tensor grad, SymInt[] size, ScalarType dtype) -> Tensor"


def no_gradient_op(*args: Any) -> torch.Tensor:
    raise RuntimeError("linear_w8a8: it has no gradient; call it under torch.no_grad()")


def no_gradient_fake(grad: torch.Tensor, size: Any, dtype: Any) -> torch.Tensor:
    return grad.new_empty(size, dtype=dtype)


def keep_forms(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.forms = [t if t is None else (t.shape, t.dtype) for t in inputs]


def no_gradient(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
    raising = torch.ops.quantkit._no_gradient
    needed = zip(ctx.needs_input_grad, ctx.forms, strict=True)
    return tuple(raising(grads[0], *form) if needs else None for needs, form in needed)


def without_gradient(operator: Callable[..., Any]) -> Callable[..., Any]:
    """operator, with the backward that raises."""

    class Forward(torch.autograd.Function):
        forward = staticmethod(operator)
        setup_context = staticmethod(keep_forms)
        backward = staticmethod(no_gradient)

    return Forward.apply


def without_tangents(operator: Callable[..., Any]) -> Callable[..., Any]:
    """operator, which would drop those of forward mode: they are an error here."""

    def linear_w8a8(*args):
        if not _is_compiling() and _torch.may_have_tangents():
            tensors = [t for t in args if isinstance(t, torch.Tensor)]
            if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
                no_gradient_op()
        return operator(*args)

    return linear_w8a8
