"""DTensors in any placements, what is sent for them, and the comparison with the whole tensor."""

import collections
from functools import cache

import torch
from lib.cases import BITS, assert_same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import quantkit

F8, E8, F4 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2
FLOAT32 = {"compute_dtype": torch.float32}


@cache  # each one has process groups of its own
def mesh_of(*sizes):
    return init_device_mesh("cpu", sizes)


def sharded(t, mesh, *place):
    return distribute_tensor(t, mesh, place, src_data_rank=None)


def placed(x, mesh, place):
    """x in any placements. Of a sum one rank has x, and others -0.0, which changes no number."""
    for m, p in enumerate(place):
        if p.is_partial() and mesh.get_coordinate()[m] > 0:
            x = torch.full_like(x, -0.0)
    whole_ones = [Replicate() if p.is_partial() else p for p in place]
    d = sharded(x, mesh, *[Replicate()] * mesh.ndim).redistribute(placements=whole_ones)
    return DTensor.from_local(
        d.to_local(), mesh, place, run_check=False, shape=x.shape, stride=x.stride()
    )


def numbers(shape, dtype, draw):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(2**32))) * 3
    if dtype.is_floating_point:
        flat = x.view(-1)
        for value in (float("nan"), float("inf"), -float("inf"), -0.0, 0.0):
            if flat.numel() and draw.random() < 0.15:
                flat[draw.randrange(flat.numel())] = value
    else:
        x = x * 100 if dtype.is_signed else x.abs() * 50
    return x.to(dtype)


def blocks_of(shape, short, draw):
    """None, or sizes of blocks: short last ones where these are allowed."""
    if draw.random() < 0.2:
        return None
    sizes = [[b for b in (1, 2, 3, 4, 5, 8, -1) if short or b == -1 or n % b == 0] for n in shape]
    return [draw.choice(s) for s in sizes]


def gradient(x, p, **given):
    """x's gradient, of a gradient that is x too."""
    if not x.is_floating_point():
        return x
    leaf = x.detach().clone().requires_grad_()
    quantkit.fake_quantize(leaf, p, **given).backward(x.detach())
    return leaf.grad


def whole(t):
    """All of a DTensor on each rank: bits travel as int32, as gloo gathers neither int16 nor float8."""
    if not isinstance(t, DTensor):
        return t
    order = sorted(range(t.dim()), key=lambda dim: -t.stride()[dim])
    assert t.to_local().permute(order).is_contiguous(), (t.stride(), t.to_local().stride())
    bits = BITS[t.element_size()]
    local = t.to_local().view(bits)
    local = local.to(torch.int32) if t.element_size() < 4 else local
    gathered = DTensor.from_local(
        local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
    ).full_tensor()
    carried = gathered.to(bits).view(t.dtype)
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    return made.copy_(carried)


def same(actual, expected):
    """By the contract's equality; parameters field by field."""
    if isinstance(expected, quantkit.QuantizationParams):
        fields = ("scale", "zero_point", "global_scale")
        pairs = [(getattr(actual, n), getattr(expected, n)) for n in fields]
        rest = ("q_min", "q_max", "dtype", "block_size", "compute_dtype", "round_first")
        assert all(getattr(actual, n) == getattr(expected, n) for n in rest)
        actual, expected = zip(*(p for p in pairs if p[1] is not None), strict=True)
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            same(a, e)
        return
    assert_same(whole(actual), expected)


def outcome(call):
    """(results, None), or (None, the error)."""
    try:
        return call(), None
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        return None, error


def message_of(call):
    _, error = outcome(call)
    return str(error)


class Collectives(TorchDispatchMode):
    """Counts collectives, and the bytes that a rank gives to each."""

    def __init__(self):
        super().__init__()
        self.bytes = collections.Counter()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func.namespace == "_c10d_functional":  # these call those of c10d
            name = func._schema.name.partition("::")[2]
            if name not in ("wait_tensor", "_wrap_tensor_autograd"):
                given = [t for t in args if isinstance(t, torch.Tensor)]
                self.calls[name] += 1
                self.bytes[name] += sum(t.numel() * t.element_size() for t in given)
        return func(*args, **(kwargs or {}))
