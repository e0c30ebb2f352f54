"""Operators of torch that must give quantkit's bits, each with the condition under which it does.

torch has announced the removal of most of them. Each is therefore looked up when a test runs, and what it
answered is kept in ``fixtures/peers/answers.json``. To record the answers anew, from the project's root:

    PYTHONPATH=.:tests python -m lib.peers
"""

import functools
import hashlib
import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from lib.cases import ops

ANSWERS = Path(__file__).parent.parent / "fixtures" / "peers" / "answers.json"
INT8 = (-128, 127, torch.int8)


class Peer(NamedTuple):
    operator: str  # its full name in torch
    condition: str  # where its bits are quantkit's
    inputs: Callable  # () -> tensors
    theirs: Callable  # (operator, *inputs) -> tensors
    ours: Callable  # (*inputs) -> tensors


def find(name):
    """What torch has under a full name, None where it has no such thing."""
    try:
        if "quantized_decomposed" in name:  # this import registers them
            importlib.import_module("torch.ao.quantization.fx._decomposed")
        return functools.reduce(getattr, name.removeprefix("torch.").split("."), torch)
    except (ImportError, AttributeError):
        return None


# ---- inputs: exact arithmetic on integers, so that every torch and every machine makes the same -----

ROWS, COLUMNS = 512, 256


def _bits(seed, n):
    """n integers of 32 random bits (the finalizer of MurmurHash3 over a counter)."""
    h = (torch.arange(n) + seed * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _integers(seed, low, high, *shape):
    """Integers of [low, high)."""
    return (low + _bits(seed, torch.Size(shape).numel()) % (high - low)).view(shape)


def _floats(seed, low, high, *shape):
    """Values of either sign in [2^low, 2^high): every exponent as often, any mantissa."""
    fraction = _bits(seed, torch.Size(shape).numel()) & 0x807FFFFF
    bits = fraction | _integers(seed + 1, 127 + low, 127 + high, fraction.numel()) << 23
    return bits.sub(2**31).to(torch.int32).bitwise_xor(-(2**31)).view(torch.float32).view(shape)


def _powers_of_two(seed, low, high, *shape):
    exponents = _integers(seed, 127 + low, 127 + high, *shape)
    return (exponents << 23).to(torch.int32).view(torch.float32)


def _data(rows=ROWS):
    """131,072 values: half of them multiples of 1/16, many of which tie beside a power of two."""
    n = ROWS * COLUMNS
    tied = _integers(1, -4096, 4096, n).to(torch.float32) / 16
    return torch.where(_bits(2, n) % 2 == 0, tied, _floats(3, -12, 8, n)).view(rows, -1)


def _off_ties(x, scale, zero_point):
    """x with 0 in place of what lies within 2^-12 of a tie.

    x * (1 / scale) + zero_point is rounded three times, x / scale + zero_point twice, each time by at
    most 2^-24 of a value. Near the limits of int8 all values are below 2^9: together less than 2^-12.
    """
    size = x.shape[1] // scale.shape[1]
    scale, zero_point = (p.repeat_interleave(size, 1).double() for p in (scale, zero_point))
    v = x.double() / scale + zero_point
    return x.masked_fill((v - v.floor() - 0.5).abs() < 2**-12, 0.0)


def _wide_rows():
    """Rows of 16 values for the choosers: of both signs, of one sign, all zero, tiny."""
    x = _floats(5, -6, 6, ROWS * COLUMNS // 16, 16)
    x[1::8], x[2::8] = x[1::8].abs(), -x[2::8].abs()
    x[3::64], x[4::64] = 0.0, x[4::64] * 2.0**-60
    return (x,)


def _rows_off_ties():
    """Rows whose scale is above eps and whose x_min / scale lies off the ties (see _off_ties).

    Half a dozen roundings of values up to 255 stay below 2^-13.
    """
    (x,) = _wide_rows()
    low, high = x.amin(1).clamp(max=0).double(), x.amax(1).clamp(min=0).double()
    v = low * 255 / (high - low)
    return (x[(high - low > 2**-22 * 255) & ((v - v.floor() - 0.5).abs() > 2**-12)],)


def _rows_of_exact_width():
    """Rows of multiples of 1/16: float32 holds x_max - x_min. Their x_min / scale are off the ties."""
    x = _data(ROWS * COLUMNS // 16)
    x = torch.where(x * 16 == (x * 16).round(), x, 0.0)
    low, high = x.amin(1).clamp(max=0).double(), x.amax(1).clamp(min=0).double()
    v = low * 255 / (high - low)
    return (x[(v - v.floor() - 0.5).abs() > 2**-12],)


def _exact(zero_point="any", groups=1, rows=ROWS):
    """x, power-of-two scales, zero points: x / scale is x * (1 / scale)."""
    scale = _powers_of_two(7, -6, 2, rows, groups)
    zero_points = {
        "none": torch.zeros(rows, groups),
        "any": _integers(8, -100, 100, rows, groups).to(torch.float32),
        "fractions": _integers(8, -400, 400, rows, groups).to(torch.float32) / 4,
    }
    return _data(rows), scale, zero_points[zero_point]


def _inexact(groups=1, rows=ROWS):
    """x off the ties, scales of 24 bits, zero points."""
    scale = _floats(9, -7, 1, rows, groups).abs()
    zero_point = _integers(10, -100, 100, rows, groups).to(torch.float32)
    return _off_ties(_data(rows), scale, zero_point), scale, zero_point


def _codes(groups=1, rows=ROWS):
    """Codes, scales of 24 bits, zero points."""
    q = _integers(11, -128, 128, rows, ROWS * COLUMNS // rows).to(torch.int8)
    zero_point = _integers(12, -128, 128, rows, groups).to(torch.float32)
    return q, _floats(13, -30, 30, rows, groups).abs(), zero_point


# ---- how they are called -----------------------------------------------------------------------------


def _chosen(scale, zero_point):
    """float32, as quantkit returns them; what torch gives in float64 or int64 must fit."""
    for p in (scale, zero_point):
        assert torch.equal(p.to(torch.float32).to(torch.float64), p.to(torch.float64))
    return scale.to(torch.float32).flatten(), zero_point.to(torch.float32).flatten()


def _choose(x, low=-128, high=127, eps=1e-8, symmetric=False):
    """Per row, with 0 in the range."""
    scale, zero_point = ops.choose_qparams(x, [1, -1], low, high, eps, symmetric, not symmetric)
    return scale.flatten(), zero_point.flatten()


def _quantize(x, scale, zero_point):
    return (ops.quantize(x, scale, zero_point, *INT8),)


def _dequantize(q, scale, zero_point):
    return (ops.dequantize(q, scale, zero_point),)


def _fake_quantize(x, scale, zero_point):
    args = (x, scale, zero_point, -128, 127)
    return ops.fake_quantize(*args), ops._fake_quantize_backward(x.abs(), *args)


def _with_gradient(function, x, *args):
    """The result, and what a gradient becomes; a negative one would become -0.0 outside the limits."""
    leaf = x.clone().requires_grad_()
    y = function(leaf, *args)
    y.backward(x.abs())
    return y.detach(), leaf.grad


def _each_row(function):
    """A per-tensor operator with the parameters of each row in turn."""

    def call(operator, x, scale, zero_point):
        rows = zip(x, scale.flatten().tolist(), zero_point.flatten().int().tolist(), strict=True)
        results = [function(operator, *row) for row in rows]
        return tuple(map(torch.stack, zip(*results, strict=True)))

    return call


def _observed(qscheme, low, high):
    def call(observer, x):
        dtype = torch.qint8 if low < 0 else torch.quint8
        made = observer(0, dtype, qscheme, quant_min=low, quant_max=high, eps=1e-8)
        made(x)
        return _chosen(*made.calculate_qparams())

    return call


def _native_choice(operator, x):
    """Its scale is float64: the condition makes it round to float32 as the steps of float32 do."""
    scales, zero_points = zip(*(operator(row, False) for row in x), strict=True)
    scale = torch.tensor(scales, dtype=torch.float64).to(torch.float32)
    return scale, torch.tensor(zero_points).to(torch.float32)


def _row_choices(low, high, dtype):
    """A per-tensor chooser on each row in turn."""

    def call(operator, x):
        results = [operator(row, low, high, 1e-8, dtype) for row in x]
        return _chosen(*map(torch.cat, zip(*results, strict=True)))

    return call


def _few_rows():
    (x,) = _wide_rows()
    return (x[:250],)


_DECOMPOSED = "torch.ops.quantized_decomposed."
_OBSERVER = "torch.ao.quantization.observer.PerChannelMinMaxObserver"
_ZERO = "include_zero, "
_TWO = "scales that are powers of two, "
_ANY = "off the ties"
EIGHT = 8  # rows, each with a scale and a zero point that a per-tensor operator gets in turn


def _rounds_first(operator, theirs, ours, rows=ROWS):
    """A peer of round(x / scale) + zero_point, in which other ties go the other way."""
    yield Peer(operator, _TWO + "zero point 0", lambda: _exact("none", rows=rows), theirs, ours)
    yield Peer(operator, _ANY, lambda: _inexact(rows=rows), theirs, ours)


CHOOSERS = [
    *(
        Peer(
            _DECOMPOSED + "choose_qparams.tensor",
            _ZERO + f"[{low}, {high}]",
            _few_rows,
            _row_choices(low, high, dtype),
            functools.partial(_choose, low=low, high=high),
        )
        for low, high, dtype in (
            (-128, 127, torch.int8),
            (0, 255, torch.uint8),
            (-8, 7, torch.int8),
        )
    ),
    *(
        Peer(
            _DECOMPOSED + "choose_qparams_symmetric.tensor",
            f"[-{n}, {n}]",
            _few_rows,
            _row_choices(-n, n, torch.int8),
            functools.partial(_choose, low=-n, high=n, symmetric=True),
        )
        for n in (127, 7)
    ),
    # Division is monotonic: max(max_abs, 1e-5) / 127 is max(max_abs / 127, 1e-5 / 127).
    *(
        Peer(
            _DECOMPOSED + "choose_qparams_per_token.default",
            f"{dtype}, eps 1e-5 / 127",
            lambda dtype=dtype: (_wide_rows()[0].to(dtype),),
            lambda operator, x: tuple(p.flatten() for p in operator(x, torch.int8)),
            functools.partial(
                _choose, eps=float(torch.tensor(1e-5, dtype=dtype) / 127), symmetric=True
            ),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ),
    # Its zero point is round(-128 - x_min / scale), or that of x_max where the error is less.
    Peer(
        _DECOMPOSED + "choose_qparams_per_token_asymmetric.default",
        _ZERO + "scale above 2^-23, x_min / scale off the ties",
        _rows_off_ties,
        lambda operator, x: _chosen(*operator(x, torch.int8)),
        _choose,
    ),
    *(
        Peer(
            _OBSERVER,
            f"per_channel_affine: {_ZERO}[{low}, {high}]",
            _wide_rows,
            _observed(torch.per_channel_affine, low, high),
            functools.partial(_choose, low=low, high=high),
        )
        for low, high in ((-128, 127), (0, 255), (-8, 7))
    ),
    Peer(
        _OBSERVER,
        "per_channel_symmetric: [-127, 127]",
        _wide_rows,
        _observed(torch.per_channel_symmetric, -127, 127),
        functools.partial(_choose, low=-127, high=127, symmetric=True),
    ),
    Peer(
        "torch._choose_qparams_per_tensor",
        _ZERO + "[0, 255], x_max - x_min exact, x_min / scale off the ties",
        _rows_of_exact_width,
        _native_choice,
        functools.partial(_choose, low=0, high=255),
    ),
]

QUANTIZERS = [
    # The first two add before they round, as the contract does.
    *(
        Peer(
            _DECOMPOSED + "quantize_per_token.default",
            condition,
            inputs,
            lambda operator, x, s, z: (operator(x, s, z, *INT8),),
            _quantize,
        )
        for condition, inputs in (
            (_TWO + "integer zero points", _exact),
            (_TWO + "zero points with fractions", lambda: _exact("fractions")),
            (_ANY, _inexact),
        )
    ),
    *(
        Peer(
            _DECOMPOSED + "quantize_per_channel_group.default",
            condition,
            inputs,
            lambda operator, x, s, z: (operator(x, s, z, *INT8, x.shape[1] // s.shape[1]),),
            _quantize,
        )
        for condition, inputs in (
            (_TWO + "integer zero points", lambda: _exact(groups=8)),
            (_ANY, lambda: _inexact(groups=8)),
        )
    ),
    *_rounds_first(
        _DECOMPOSED + "quantize_per_channel.default",
        lambda operator, x, s, z: (operator(x, s[:, 0], z[:, 0], 0, *INT8),),
        _quantize,
    ),
    *_rounds_first(
        _DECOMPOSED + "quantize_per_tensor.default",
        _each_row(lambda operator, x, s, z: (operator(x, s, z, *INT8),)),
        _quantize,
        EIGHT,
    ),
    # With FBGEMM (on x86) these two add first; elsewhere they round first.
    *_rounds_first(
        "torch.quantize_per_channel",
        lambda operator, x, s, z: (
            operator(x, s[:, 0].double(), z[:, 0].long(), 0, torch.qint8).int_repr(),
        ),
        _quantize,
    ),
    *_rounds_first(
        "torch.quantize_per_tensor",
        _each_row(lambda operator, x, s, z: (operator(x, s, z, torch.qint8).int_repr(),)),
        _quantize,
        EIGHT,
    ),
]

DEQUANTIZERS = [
    Peer(name, "any scale, any integer zero point" + more, inputs, theirs, _dequantize)
    for name, more, inputs, theirs in (
        (
            _DECOMPOSED + "dequantize_per_tensor.default",
            "",
            lambda: _codes(rows=EIGHT),
            _each_row(lambda operator, q, s, z: (operator(q, s, z, *INT8),)),
        ),
        (
            _DECOMPOSED + "dequantize_per_channel.default",
            "",
            _codes,
            lambda operator, q, s, z: (operator(q, s[:, 0], z[:, 0].int(), 0, *INT8),),
        ),
        (
            _DECOMPOSED + "dequantize_per_token.default",
            ", float32",
            _codes,
            lambda operator, q, s, z: (operator(q, s, z.int(), *INT8, torch.float32),),
        ),
        (
            _DECOMPOSED + "dequantize_per_token.default",
            ", float64",  # it holds the product of a code and a float32 scale: one rounding
            _codes,
            lambda operator, q, s, z: (operator(q, s.double(), z.int(), *INT8, torch.float32),),
        ),
        (
            _DECOMPOSED + "dequantize_per_channel_group.default",
            "",
            lambda: _codes(groups=8),
            lambda operator, q, s, z: (
                operator(q, s, z.int(), *INT8, q.shape[1] // s.shape[1], torch.float32),
            ),
        ),
        (
            "torch._make_per_tensor_quantized_tensor",
            ": .dequantize()",
            lambda: _codes(rows=EIGHT),
            _each_row(lambda operator, q, s, z: (operator(q, s, z).dequantize(),)),
        ),
        (
            "torch._make_per_channel_quantized_tensor",
            ": .dequantize()",
            _codes,
            lambda operator, q, s, z: (
                operator(q, s[:, 0].double(), z[:, 0].long(), 0).dequantize(),
            ),
        ),
    )
]

FAKE_QUANTIZERS = [  # and their gradients
    *_rounds_first(
        "torch.fake_quantize_per_tensor_affine",
        _each_row(lambda operator, x, s, z: _with_gradient(operator, x, s, z, -128, 127)),
        _fake_quantize,
        EIGHT,
    ),
    *(
        peer
        for name in (
            "torch.fake_quantize_per_channel_affine",
            _DECOMPOSED + "fake_quant_per_channel.default",
        )
        for peer in _rounds_first(
            name,
            lambda operator, x, s, z: _with_gradient(
                operator, x, s[:, 0], z[:, 0].int(), 0, -128, 127
            ),
            _fake_quantize,
        )
    ),
]

PEERS = CHOOSERS + QUANTIZERS + DEQUANTIZERS + FAKE_QUANTIZERS


def label(peer):
    return f"{peer.operator.removeprefix('torch.')} ({peer.condition})"


# ---- what they answered -------------------------------------------------------------------------------


def digest(t):
    return hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def summary(tensors):
    """Every bit in a digest, and some values to read when it differs."""
    return [
        {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "some": t.flatten()[:: max(1, t.numel() // 16)].tolist(),
            "sha256": digest(t),
        }
        for t in tensors
    ]


def answers(peer, operator):
    """The peer's results on its inputs, contiguous as quantkit's are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the announced removal
        return tuple(t.contiguous() for t in peer.theirs(operator, *peer.inputs()))


def record():
    """One line a peer."""
    lines = []
    for peer in PEERS:
        answer = {
            "inputs": [digest(t) for t in peer.inputs()],
            "results": summary(answers(peer, find(peer.operator))),
        }
        lines.append(f" {json.dumps(label(peer))}: {json.dumps(answer)}")
    lines = [f' "torch": {json.dumps(torch.__version__)}', *lines]
    ANSWERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
