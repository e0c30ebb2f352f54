"""The gradient of fake_quantize: straight through inside the limits, 0 elsewhere (docs/numerics.md)."""

from __future__ import annotations

import torch

from . import _torch

_ops = torch.ops.quantkit


class _StraightThrough(torch.autograd.Function):
    """Saves what the mask is made of; every derivative is the mask times what comes in."""

    generate_vmap_rule = True

    @staticmethod
    def save(ctx, tensors, limits):
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.limits = limits

    @staticmethod
    def gradient(ctx, grad):
        return FakeQuantizeBackward.apply(grad, *ctx.saved_tensors, *ctx.limits)


class FakeQuantize(_StraightThrough):
    """fake_quantize with its gradient with respect to x, forward and reverse."""

    @staticmethod
    def forward(x, scale, zero_point, q_min, q_max):
        return _ops._fake_quantize(x, scale, zero_point, q_min, q_max)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _StraightThrough.save(ctx, inputs[:3], inputs[3:])

    @staticmethod
    def backward(ctx, *grads):
        return _StraightThrough.gradient(ctx, *grads), None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return _StraightThrough.gradient(ctx, tangents[0])


class FakeQuantizeBackward(_StraightThrough):
    """The gradient, linear in grad: its own gradient with respect to grad is itself."""

    @staticmethod
    def forward(grad, x, scale, zero_point, q_min, q_max):
        return _ops._fake_quantize_backward(grad, x, scale, zero_point, q_min, q_max)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _StraightThrough.save(ctx, inputs[1:4], inputs[4:])

    @staticmethod
    def backward(ctx, *grads):
        return _StraightThrough.gradient(ctx, *grads), None, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return _StraightThrough.gradient(ctx, tangents[0])


def is_differentiable(x: torch.Tensor) -> bool:
    """Whether a derivative of what is made of x may be asked for, in either mode."""
    wanted = getattr(x, "requires_grad", False) and torch.is_grad_enabled()
    return wanted or _torch.may_have_tangents()


_apply = _torch.fast_apply(FakeQuantize)


def kernel(x, scale, zero_point, q_min, q_max):
    """The operator's Autograd kernel."""
    if _torch.is_transformed():  # a kernel sees one level of them, a Function all
        raise RuntimeError(
            "torch.ops.quantkit.fake_quantize: torch.func's derivatives do not reach operators; "
            "call quantkit.fake_quantize, outside of torch.compile"
        )
    if not is_differentiable(x):
        return _ops._fake_quantize(x, scale, zero_point, q_min, q_max)
    return _apply(x, scale, zero_point, q_min, q_max)
