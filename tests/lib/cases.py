"""One table of cases, and the one comparison, that all tests share."""

import functools
import itertools
import math

import torch

import quantkit
from quantkit.formats import CODED_SCALES, E4M3, E8M0, OF_NAME
from quantkit.operators import OPERATORS, overloads
from quantkit.schemes import default_eps

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CODES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
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


def invoke(function, args):
    """function(*args); of those a dict at the end are arguments by name."""
    if args and isinstance(args[-1], dict):
        return function(*args[:-1], **args[-1])
    return function(*args)


def tensors_of(args):
    """Those among arguments, also by name."""
    every = [b for a in args for b in (a.values() if isinstance(a, dict) else (a,))]
    return [a for a in every if isinstance(a, torch.Tensor)]


def on_meta(args):
    """The same arguments with meta tensors of the same strides; of those by name too."""

    def there(a):
        if isinstance(a, dict):
            return {k: there(v) for k, v in a.items()}
        if not isinstance(a, torch.Tensor):
            return a
        return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")

    return [there(a) for a in args]


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
    if expected.dtype.is_floating_point and expected.element_size() == 1:  # codes, also of NaN
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    if expected.dtype.is_floating_point:
        if torch.equal(*(t.view(BITS[t.element_size()]) for t in (actual, expected))):
            return
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan), "NaN elsewhere"
        bits = BITS[expected.element_size()]
        actual, expected = (
            t.contiguous().view(bits).masked_fill(nan, 0) for t in (actual, expected)
        )
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} elements differ"


def bits_of(t):
    """A copy of t's bits, to show later that nothing was written."""
    return t.clone() if not t.is_floating_point() else t.clone().view(BITS[t.element_size()])


def coded(scale, turn=0):
    """(scale, global scale) by turns: coded or as it is, beside a number, or sizes that divide."""
    whole = None
    if turn % 5 == 3:
        whole = torch.tensor(0.3, dtype=FLOATS[turn % 4])
    elif turn % 5 == 4:
        whole = (
            values((1, *scale.shape[1:]) if scale.dim() else (), torch.float32, turn).abs() + 0.1
        )
    dtype = (None, E8M0, E4M3.dtype, None, E4M3.dtype)[turn % 5]
    return scale if dtype is None else scale.to(torch.float32).to(dtype), whole


def given_arguments(x, scale, zero_point, f, limits, turn, **options):
    """Of an operator that is given parameters: the scale coded by turns, beside what f and it need."""
    scale, whole = coded(scale, turn)
    zero_point = zero_point if f.has_zero_point else None
    return x, scale, zero_point, *limits, f.name, {"global_scale": whole, **options}


def params(qparams):
    return qparams.scale, qparams.zero_point


def microscaled(x):
    """What graphs do with coded scales: they pass from operator to operator.

    inductor has no C++ type for E8M0, so nothing else is done with it.
    """
    q, p = quantkit.quantize(x, "mxfp4")
    nv, nv_p = quantkit.quantize(x, "nvfp4")
    y = quantkit.dequantize(q, p), quantkit.fake_quantize(x, p)
    return *y, q + 0, p.scale, nv, quantkit.dequantize(nv, nv_p), nv_p.scale, nv_p.global_scale


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
    """The shape of scale for block_size; a last block may be short."""
    if block_size is None:
        return ()
    return tuple(1 if b == -1 else -(-n // b) for n, b in zip(shape, block_size, strict=True))


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

NAMES = tuple(OPERATORS)


@functools.cache
def argument_names(name):
    """(names of the arguments by position, of those by name) of an operator, by its schema."""
    every = overloads(name)[0]._schema.arguments
    return tuple([a.name for a in every if a.kwarg_only == by_name] for by_name in (False, True))


def takes_format(name):
    """Whether the operator takes the name of a format; others take a dtype of version 1, or none."""
    return "format" in argument_names(name)[0]


def call_of(name, table):
    """The arguments of an operator from a table by argument: positional ones, and a dict of others."""
    positional, by_name = argument_names(name)
    args = tuple(table[k] for k in positional)
    return (*args, {k: table[k] for k in by_name if k in table}) if by_name else args


def inputs(name):
    """Arguments of several dtypes, strides and granularities."""
    for i, (dtype, blocks) in enumerate(zip(FLOATS, (None, [1, -1], [2, 3], [-1, 1]), strict=True)):
        x = values((4, 6), dtype, i)
        x = x.t().contiguous().t() if i % 2 else x
        yield arguments(name, x, blocks, i)


# Of the .format overloads: one of each kind of format and of scale, and the options, by turns.
TURNS = (
    ("int8", {"scale_rule": "half_range"}, {"round_first": True}),
    ("uint4", {"scale_dtype": torch.float32}, {"seed": torch.tensor([-3, 0, 2**40])[::2]}),
    ("float8_e4m3fn", {"scale_dtype": E8M0, "scale_rule": "floor"}, {"seed": torch.tensor([1, 2])}),
    ("float4_e2m1fn", {"scale_dtype": E4M3.dtype, "global_scale": torch.tensor(0.5)}, {}),
)
# Of the others.
LIMITS = ((torch.int8, -128, 127), (torch.uint8, 0, 255), (torch.int16, -7, 7))


def arguments(name, x, blocks, turn=0, /, **others):
    """Those of one call of an operator on x, which has as many dimensions as blocks, or others."""
    own = x.dtype if x.is_floating_point() else torch.float32
    scale, zero_point = given(x.shape, blocks, own, turn)
    dtype, low, high = LIMITS[turn % 3]
    table = {
        "x": x, "grad": torch.ones_like(x), "mask": x > 0, "q": x.to(torch.int8),
        "scale": scale, "zero_point": zero_point, "block_size": blocks,
        "q_min": low, "q_max": high, "eps": 1e-8, "symmetric": turn % 2 == 0, "dtype": dtype,
        "include_zero": turn % 4 == 3,
    }  # fmt: skip
    if takes_format(name):
        table |= of_format(x, blocks, scale, zero_point, turn % len(TURNS))
    if name.startswith("fake_quantize") and x.is_floating_point():
        table["x"] = x.clone().requires_grad_(turn < 2)
    if name == "linear_w8a8":
        table |= of_linear(x, turn)
    return call_of(name, table | others)


def of_linear(x, turn):
    """By turns one scale or one for each output, and with a bias."""
    x = x if x.is_floating_point() else x.to(torch.float32)
    q = values((5, x.shape[-1]), torch.float32, turn, spread=60.0).to(torch.int8)
    scale = torch.tensor(0.25) if turn % 2 else torch.linspace(0.1, 0.5, 5).reshape(5, 1)
    bias = None if turn % 3 else torch.linspace(-1, 1, 5, dtype=x.dtype)
    return {"x": x, "q": q, "scale": scale, "bias": bias}


def of_format(x, blocks, scale, zero_point, turn):
    name, choosing, rounding = TURNS[turn]
    f, scale_dtype = OF_NAME[name], choosing.get("scale_dtype")
    if turn == 2:
        larger, start = [n + 2 for n in x.shape], [1] * x.dim()
        rounding = {**rounding, "index": list(quantkit.shard_index(larger, start))}
    return {
        "q": codes(f, x.shape),
        "scale": scale.to(scale_dtype) if scale_dtype in CODED_SCALES else scale,
        "zero_point": zero_point if f.has_zero_point and turn else None,
        "q_min": f.low, "q_max": f.high, "eps": default_eps(f, scale_dtype),
        "symmetric": f.low < 0, "include_zero": False, "format": name,
        "output_dtype": (None, torch.float16, torch.bfloat16, torch.float32)[turn],
        "over": (None, [1, -1], [3, 4], [-1, 1])[turn] if x.dim() == 2 else None,
        **choosing, **rounding,
    }  # fmt: skip


def codes(f, shape, seed=0):
    """Any codes of a format, for elements of a shape."""
    generator = torch.Generator().manual_seed(seed)
    size = (*shape[:-1], shape[-1] // f.per_byte) if f.per_byte > 1 else tuple(shape)
    high = 1 << (16 if f.bits == 16 else 8)
    q = torch.randint(0, high, size, generator=generator).to(torch.int32)
    return q.to(torch.int16).view(f.storage) if f.bits == 16 else q.to(torch.uint8).view(f.storage)


# ---- the operators, here or on another device -----------------------------------------------------


class _Operator:
    """Two overloads that take tensors of the CPU and, where a device is set, run there.

    Storages travel whole, so strides, offsets and aliases stay; results and `out=` tensors come back.
    """

    def __init__(self, operators, name):
        self._operators, self._names = operators, OPERATORS[name].results
        self._functional, self._out = overloads(name)

    def __call__(self, *args, **options):
        return self._on_device(self._functional, args, options)

    default = property(lambda self: self._functional)

    def out(self, *args, **options):
        return self._on_device(self._out, args, options)

    def _on_device(self, overload, args, options):
        device = self._operators.device
        if device is None:
            return overload(*args, **options)
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
            results = overload(*map(there, args), **{k: there(t) for k, t in options.items()})
        finally:
            for name in set(self._names) & options.keys():
                place = options[name].untyped_storage().data_ptr()
                near, far = storages.get(place, (None, None))
                if far is not None:
                    near.copy_(far)

        def back(t):
            near = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            return near.copy_(t)

        if isinstance(results, tuple):
            return tuple(map(back, results))
        return None if results is None else back(results)


class Operators:
    """Every operator by its name in OPERATORS, on every backend; `device` is set by the fixture."""

    device = None

    def __getattr__(self, name):
        return _Operator(self, name)


ops = Operators()


# ---- outputs that are given --------------------------------------------------------------------------


def dense(t):
    return t.clone(memory_format=torch.contiguous_format)


def written(name, args, expected, layout):
    """What the overload writes into `out=` tensors of a layout; between their elements stays what was."""
    outs = [STRIDES[layout if t.dim() else "contiguous"](dense(t).fill_(7)) for t in expected]
    memory = [torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()) for t in outs]
    before, strides = list(map(bits_of, memory)), [t.stride() for t in outs]
    named = dict(zip(OPERATORS[name].results, outs, strict=True))
    assert invoke(functools.partial(getattr(ops, name).out, **named), args) is None
    found = tuple(map(dense, outs))
    for out, whole, bits in zip(outs, memory, before, strict=True):
        out.fill_(7)
        assert torch.equal(bits_of(whole), bits), "written between the elements of out"
    assert [t.stride() for t in outs] == strides
    return found


def check_results(name, args, expected, layout=None):
    """What an operator returns, and what it writes into outputs of a layout (None: no such call)."""
    assert_same(invoke(getattr(ops, name), args), expected)
    if layout is not None:
        results = flat(expected)
        for a, e in zip(written(name, args, results, layout), results, strict=True):
            assert_same(a, dense(e))
