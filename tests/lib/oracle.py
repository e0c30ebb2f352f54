"""A second, independent oracle: the contract's arithmetic element by element in numpy.

float16 rounds after each numpy operation; bfloat16 is float32 rounded by integer arithmetic on its bits.
"""

import numpy as np
import torch

NUMPY = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


def bfloat16(v):
    """float32 rounded to bfloat16, half to even, still float32."""
    v = np.asarray(v, np.float32)
    bits = v.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(v), v, rounded).astype(np.float32)


def rounder(dtype):
    """Rounds a float32 (float64 for that dtype) result of one step to dtype, still wide."""
    if dtype == torch.bfloat16:
        return bfloat16
    if dtype == torch.float16:
        return lambda v: np.asarray(v, np.float32).astype(np.float16).astype(np.float32)
    return lambda v: np.asarray(v, NUMPY[dtype])


def numpy(t):
    return t.to(torch.float32).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def at(p, shape, index):
    """The element of a parameter that belongs to an index of x."""
    p = p.reshape((1,) * (len(shape) - p.ndim) + p.shape)
    return p[tuple(i // (n // s) for i, n, s in zip(index, shape, p.shape, strict=True))]


def widened(x, q_min, q_max):
    half = x.dtype in (torch.float16, torch.bfloat16)
    outside = half and (q_min < -128 or q_max > 255)
    return x.to(torch.float32) if outside or not x.is_floating_point() else x


def step(dtype, dim, parameter):
    """The dtype of a step between data of `dtype` with `dim` dimensions and a parameter."""
    if dim > 0 and parameter.dim() == 0:
        return dtype
    return torch.promote_types(dtype, parameter.dtype)


def wide(dtype):
    return np.float64 if dtype == torch.float64 else np.float32


@np.errstate(all="ignore")
def quantize(x, scale, zero_point, q_min, q_max, dtype):
    """Floating zero points only."""
    x = widened(x, q_min, q_max)
    first = step(x.dtype, x.dim(), scale)
    second = step(first, x.dim(), zero_point)
    xs, ss, zs = numpy(x), numpy(scale), numpy(zero_point)
    out = np.zeros(xs.shape, np.int64)
    for index in np.ndindex(xs.shape):
        s = wide(first)(at(ss, xs.shape, index))
        z = rounder(second)(wide(second)(at(zs, xs.shape, index)))
        v = rounder(first)(wide(first)(xs[index]) / s)
        v = rounder(second)(wide(second)(v) + z)
        out[index] = 0 if np.isnan(v) else int(np.clip(np.rint(v), q_min, q_max))
    return torch.from_numpy(out).to(dtype)


@np.errstate(all="ignore")
def dequantize(q, scale, zero_point):
    first = step(torch.float32, q.dim(), zero_point)
    second = step(first, q.dim(), scale)
    qs, ss, zs = q.to(torch.float32).numpy(), numpy(scale), numpy(zero_point)
    out = np.zeros(qs.shape, NUMPY[second])
    for index in np.ndindex(qs.shape):
        v = NUMPY[first](qs[index]) - NUMPY[first](at(zs, qs.shape, index))
        out[index] = NUMPY[second](v) * NUMPY[second](at(ss, qs.shape, index))
    return torch.from_numpy(out)


@np.errstate(all="ignore")
def choose(x, block_size, q_min, q_max, eps, symmetric, include_zero=False):
    x = widened(x, q_min, q_max)
    r, w, xs = rounder(x.dtype), wide(x.dtype), numpy(x)
    sizes = xs.shape if block_size is None else block_size
    blocks = [n if b == -1 else b for n, b in zip(xs.shape, sizes, strict=True)]
    shape = [n // b for n, b in zip(xs.shape, blocks, strict=True)]
    scale, zero_point = np.zeros(shape, w), np.zeros(shape, w)
    for index in np.ndindex(*shape):
        part = xs[tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, blocks, strict=True))]
        part = part.astype(w)
        least = r(w(eps))
        low, high = part.min(), part.max()
        if include_zero:
            low, high = np.minimum(low, w(0)), np.maximum(high, w(0))
        extent = np.abs(part).max() if symmetric else r(high - low)
        n = max(q_max if symmetric else q_max - q_min, 1)
        s = r(w(extent) / w(n))
        s = s if np.isnan(s) else max(abs(s), least)
        scale[index] = s
        if not symmetric:
            z = r(w(q_min) - np.rint(r(w(low) / w(s))))
            zero_point[index] = z if np.isnan(z) else np.clip(z, q_min, q_max)
    return tuple(
        torch.from_numpy(p).reshape([] if block_size is None else shape).to(x.dtype)
        for p in (scale, zero_point)
    )
