"""One table of cases, and the one comparison, that all tests share."""

import itertools
import math

import torch

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CODES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = (
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    6e-8,
    3.3e38,
    -65504.0,
    0.5,
    1.5,
    -2.5,
)


def flat(results):
    """What an operator returned, as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def assert_same_kind(actual, expected):
    """Dtype, shape and strides."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    strides = [
        (a, e)
        for n, a, e in zip(actual.shape, actual.stride(), expected.stride(), strict=True)
        if n != 1
    ]
    assert all(a == e for a, e in strides), f"strides {actual.stride()}, not {expected.stride()}"


def assert_same(actual, expected):
    """The contract's equality: bits of values (any NaN equals any NaN), dtype, shape and strides."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
        return
    assert_same_kind(actual, expected)
    if expected.dtype.is_floating_point:
        if torch.equal(*(t.view(BITS[t.element_size()]) for t in (actual, expected))):
            return
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan), "NaN elsewhere"
        bits = BITS[expected.element_size()]
        actual, expected = (
            t.masked_fill(nan, 0.0).contiguous().view(bits) for t in (actual, expected)
        )
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} elements differ"


def bits_of(t):
    """A copy of t's bits, to show later that nothing was written."""
    return t.clone() if not t.is_floating_point() else t.clone().view(BITS[t.element_size()])


def params(qparams):
    return qparams.scale, qparams.zero_point


# ---- inputs ---------------------------------------------------------------------------------------


def values(shape, dtype, seed=0, special=False, spread=3.0):
    """Normal values with many ties at scale 0.5, and special ones where asked for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    x = torch.where(torch.rand(shape, generator=generator) < 0.3, torch.round(x * 4) / 4, x)
    if special and x.numel():
        flat = x.view(-1)
        for i, value in enumerate(SPECIAL):
            flat[(i * 7 + seed) % flat.numel()] = value
    return x.to(torch.float32).to(dtype) if dtype in FLOATS[2:] else x.to(dtype)


def offset(x, by):
    """The same tensor, `by` elements into its memory: aligned to its element only."""
    base = torch.empty(x.numel() + by, dtype=x.dtype)
    view = base[by:].view(x.shape)
    return view.copy_(x)


def _strided(x):
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] * 3, dtype=x.dtype)
    wide[..., ::3] = x
    return wide[..., ::3]


def _sliced(x):
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 5, dtype=x.dtype)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


STRIDES = {
    "contiguous": lambda x: x,
    "misaligned": lambda x: offset(x, 3),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "permuted": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1) if x.dim() == 3 else x,
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
    "sliced": _sliced,
    "strided": _strided,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}

# x's shape and the block sizes that give every granularity: None is per tensor.
GRANULARITIES = [
    ((7,), [None, [-1], [1], [7]]),
    ((12, 40), [None, [1, -1], [-1, 1], [1, 8], [4, 10], [3, -1], [1, 1], [12, 40]]),
    ((6, 5, 33), [None, [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [2, 5, 11], [-1, 1, 3], [1, 1, -1]]),
    ((4, 6, 3, 3), [None, [1, -1, -1, -1], [-1, 1, -1, -1], [1, 1, -1, -1], [2, 3, 1, 3]]),
    ((2, 1, 300), [None, [1, -1, -1], [-1, -1, 1], [1, 1, 100]]),
]
ONLY = {"permuted": 3, "channels_last": 4}  # dimensions
LAYOUTS = [
    (shape, blocks, name)
    for (shape, every), name in itertools.product(GRANULARITIES, STRIDES)
    for blocks in every
    if ONLY.get(name, len(shape)) == len(shape)
]


def parameter_shape(shape, block_size):
    """The shape of scale for block_size."""
    if block_size is None:
        return ()
    return tuple(1 if b == -1 else n // b for n, b in zip(shape, block_size, strict=True))


def given(shape, block_size, dtype, seed=0, scale=None, integral=True):
    """A scale and a zero point of one granularity."""
    generator = torch.Generator().manual_seed(seed + 1)
    size = parameter_shape(shape, block_size)
    s = torch.rand(size, generator=generator) * 0.2 + 0.01
    s = s if scale is None else torch.full(size, scale, dtype=torch.float64)
    z = torch.randint(-20, 20, size, generator=generator).to(torch.float32)
    z = z if integral else z + 0.3
    return (t.to(torch.float32).to(dtype) if dtype in FLOATS[2:] else t.to(dtype) for t in (s, z))


# ---- calls of every operator ------------------------------------------------------------------------

NAMES = (
    "choose_qparams", "quantize", "dequantize", "dynamic_quantize", "quantize_dequantize",
    "fake_quantize", "_fake_quantize", "_fake_quantize_masked", "_masked_gradient",
    "_fake_quantize_backward",
)  # fmt: skip


def inputs(name):
    """Arguments of several dtypes, strides and granularities."""
    for i, (dtype, blocks) in enumerate(zip(FLOATS, (None, [1, -1], [2, 3], [-1, 1]), strict=True)):
        x = values((4, 6), dtype, i)
        x = x.t().contiguous().t() if i % 2 else x
        scale, zero_point = given((4, 6), blocks, dtype, i)
        symmetric = i % 2 == 0
        yield {
            "choose_qparams": (x, blocks, -128, 127, 1e-8, symmetric),
            "quantize": (x, scale, zero_point, -128, 127, torch.int8),
            "dequantize": (x.to(torch.int8), scale, zero_point),
            "dynamic_quantize": (x, blocks, 0, 255, 1e-8, symmetric, torch.uint8),
            "quantize_dequantize": (x, blocks, -7, 7, 1e-8, symmetric, torch.int16),
            "fake_quantize": (x.clone().requires_grad_(i < 2), scale, zero_point, -128, 127),
            "_fake_quantize": (x, scale, zero_point, -128, 127),
            "_fake_quantize_masked": (x, scale, zero_point, -128, 127),
            "_masked_gradient": (torch.ones_like(x), x > 0),
            "_fake_quantize_backward": (torch.ones_like(x), x, scale, zero_point, -128, 127),
        }[name]


# ---- the operators, here or on another device -----------------------------------------------------


class _Overload:
    """An operator that takes tensors of the CPU and, where a device is set, runs there.

    Storages travel whole, so strides, offsets and aliases stay; results and `out=` tensors come back.
    """

    def __init__(self, operators, operator):
        self._operators, self._operator = operators, operator

    def __getattr__(self, name):
        return _Overload(self._operators, getattr(self._operator, name))

    def __call__(self, *args, **outs):
        device = self._operators.device
        if device is None:
            return self._operator(*args, **outs)
        storages = {}

        def there(t):
            if not isinstance(t, torch.Tensor) or t.device.type != "cpu":
                return t
            near = t.untyped_storage()
            if near.data_ptr() not in storages:
                far = torch.UntypedStorage(near.nbytes(), device=device)
                storages[near.data_ptr()] = (near, far.copy_(near))
            far = storages[near.data_ptr()][1]
            place = t.storage_offset(), t.shape, t.stride()
            return torch.empty(0, dtype=t.dtype, device=device).set_(far, *place)

        try:
            results = self._operator(*map(there, args), **{k: there(t) for k, t in outs.items()})
        finally:
            for t in outs.values():
                near, far = storages.get(t.untyped_storage().data_ptr(), (None, None))
                if far is not None:
                    near.copy_(far)

        def back(t):
            near = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            return near.copy_(t)

        if isinstance(results, tuple):
            return tuple(map(back, results))
        return None if results is None else back(results)


class Operators:
    """torch.ops.quantkit for tests that run on every backend; `device` is set by the fixture."""

    device = None

    def __getattr__(self, name):
        return _Overload(self, getattr(torch.ops.quantkit, name))


ops = Operators()
