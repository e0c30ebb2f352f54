"""aminmax: the extremes that choosing uses, in every dtype, and what is chosen from them."""

import itertools
import math

import pytest
import torch
from lib.backends import daily, on_every_backend
from lib.cases import BITS, FLOATS, LAYOUTS, SPECIAL, STRIDES, assert_same, ops, values
from lib.functions import MODULES

import quantkit
from quantkit import reference
from quantkit._checks import REAL_DTYPES

pytestmark = pytest.mark.fallback
INTEGERS = [dtype for dtype in REAL_DTYPES if not dtype.is_floating_point]


def integers(shape, dtype, seed=0):
    """Any bits, and the limits of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator).to(torch.uint8)
    if dtype is torch.bool:
        return x[..., 0] > 250
    x = x.view(dtype)[..., 0]
    for i, limit in enumerate((torch.iinfo(dtype).min, torch.iinfo(dtype).max)):
        x.view(-1)[(seed + i * 5) % x.numel()] = torch.tensor(limit, dtype=dtype)
    return x


def sizes_of(shape, blocks):
    """The blocks, and some whose last ones are short."""
    return (
        (blocks, None)
        if blocks is None
        else (blocks, [3] * len(shape), [-1, *[2] * len(shape)][: len(shape)])
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend(emulated=lambda dtype: dtype == torch.float16 or None)
def test_every_granularity_and_layout(dtype):
    for i, (shape, blocks, layout) in enumerate(LAYOUTS):
        x = STRIDES[layout](values(shape, dtype, i, special=i % 3 == 0))
        for sizes in sizes_of(shape, blocks):
            yield "aminmax", (x, sizes)


@pytest.mark.parametrize(
    "dtype", daily(INTEGERS, torch.bool, torch.int8, torch.int64, torch.uint64), ids=str
)
@on_every_backend(emulated=None)
def test_integers(dtype):
    for i, (shape, blocks, layout) in enumerate(LAYOUTS):
        x = STRIDES[layout](integers(shape, dtype, i))
        for sizes in sizes_of(shape, blocks):
            yield "aminmax", (x, sizes)


@on_every_backend(emulated=None)
def test_threads_that_share_blocks():
    for i, (dtype, sizes) in enumerate(
        itertools.product(FLOATS, (None, [1, -1], [-1, 1], [100, 128], [7, -1], [1, 8], [600, 3]))
    ):
        yield "aminmax", (values((601, 999), dtype, i), sizes)


def test_extremes_of_integers_are_exact(backend):
    for dtype, low, high in (
        (torch.int64, -(2**63), 2**63 - 1),
        (torch.int64, 2**53, 2**53 + 1),
        (torch.uint64, 2**63 - 1, 2**64 - 1),
        (torch.int32, 2**24, 2**24 + 1),
        (torch.uint8, 0, 255),
    ):
        x = torch.tensor([[high, low], [low, high]], dtype=dtype)
        for function in (ops.aminmax, reference.aminmax_op):
            assert [t.item() for t in function(x, None)] == [low, high]
            assert [t.tolist() for t in function(x, [1, -1])] == [[[low]] * 2, [[high]] * 2]
    x = torch.tensor([0, 2, 0], dtype=torch.uint8).view(torch.bool)  # any byte but 0 is True
    assert_same(ops.aminmax(x, None), (torch.tensor(False), torch.tensor(True)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_signed_zeros_and_nan(backend, dtype):
    """-0.0 is below 0.0. A NaN of either sign makes both the positive quiet NaN."""
    kind, sign = BITS[dtype.itemsize], 1 << (8 * dtype.itemsize - 1)

    def bits(*numbers):
        return torch.tensor(numbers, dtype=torch.float64).to(dtype).view(kind).tolist()

    zero, minus, nan = bits(0.0, -0.0, math.nan)
    negative_nan, payload = nan - sign, nan + 1
    one, inf, low_inf = bits(1.0, math.inf, -math.inf)
    cases = [
        ((zero, minus), (minus, zero)),
        ((minus, zero, minus), (minus, zero)),
        ((minus, minus), (minus, minus)),
        ((zero, zero), (zero, zero)),
        ((low_inf, one, inf), (low_inf, inf)),
        *(((one, n, low_inf), (nan, nan)) for n in (nan, negative_nan, payload, payload - sign)),
        ((negative_nan, payload), (nan, nan)),
    ]
    for numbers, expected in cases:
        x = torch.tensor(numbers, dtype=kind).view(dtype)
        rows = x.expand(5, -1)
        for function in (ops.aminmax, reference.aminmax_op):
            assert [t.view(kind).item() for t in function(x, None)] == list(expected)
            for t, e in zip(function(rows, [1, -1]), expected, strict=True):
                assert t.view(kind).tolist() == [[e]] * 5


@MODULES
def test_granularities_of_the_function(m):
    x = values((4, 6), torch.bfloat16, 1).requires_grad_()
    for arguments, blocks in (
        ({}, None),
        ({"per_channel": True}, [1, -1]),
        ({"per_channel": True, "channel_dim": -1}, [-1, 1]),
        ({"block_size": (3, 4)}, [3, 4]),
        ({"block_size": [1, 2**63 - 1]}, [1, -1]),
    ):
        low, high = m.aminmax(x, **arguments)
        assert_same((low, high), reference.aminmax_op(x, blocks))
        assert not low.requires_grad and not high.requires_grad
    assert m.aminmax(x)[0].shape == () and m.aminmax(x[0], True)[0].shape == (1,)
    assert_same(m.aminmax(torch.tensor(3), True), (torch.tensor(3), torch.tensor(3)))
    assert_same(m.aminmax(torch.tensor(2.5), block_size=[]), (torch.tensor(2.5),) * 2)
    x = x.detach().double()
    lazily_negated = torch.complex(x, -x).conj().imag
    assert lazily_negated.is_neg()
    assert_same(m.aminmax(lazily_negated), m.aminmax(x))


SCHEMES = [
    {},
    {"q_min": -300, "q_max": 400, "dtype": torch.int16},
    {"compute_dtype": torch.float32},
    {"dtype": torch.float8_e4m3fn, "scale_dtype": torch.float8_e8m0fnu},
    {"dtype": "float4_e2m1fn", "scale_dtype": torch.float8_e4m3fn, "global_scale": 0.5},
]


def chosen(x, options):
    """scale and zero_point of each scheme that takes the options, over the first dimension."""
    sizes = [-1, *[1] * (x.dim() - 1)]
    schemes = [quantkit.get_symmetric_qparams(x, block_size=sizes, **options)]
    if "scale_dtype" not in options:
        schemes.append(quantkit.get_asymmetric_qparams(x, block_size=sizes, **options))
        more = {"block_size": sizes, "include_zero": True, **options}
        schemes.append(quantkit.get_asymmetric_qparams(x, **more))
    return [t for p in schemes for t in (p.scale, p.zero_point)]


@pytest.mark.parametrize("options", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "dtype", [*FLOATS, torch.int8, torch.int64, torch.uint64, torch.bool], ids=str
)
def test_parameters_of_the_extremes_are_those_of_the_elements(dtype, options):
    x = values((30, 17), torch.float64, 3)
    if not dtype.is_floating_point:
        x = integers(x.shape, dtype)
    for i, value in enumerate(SPECIAL if dtype.is_floating_point else ()):
        x[i, i] = value
    x = x.to(dtype)
    extremes = torch.cat(quantkit.aminmax(x, True, 1))
    for ours, theirs in zip(chosen(extremes, options), chosen(x, options), strict=True):
        assert_same(ours, theirs)


@MODULES
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64], ids=str)
def test_parts_merge(m, dtype):
    """Tiles, batches and shards: the extremes of their extremes are those of the whole."""
    x = values((40, 24), torch.float32, 5).to(dtype)
    if dtype.is_floating_point:
        x[3, 2], x[17, 0], x[20, 5] = 0.0, -0.0, math.nan
    rows = [torch.cat(m.aminmax(part, True, 1)) for part in x.split([1, 7, 30, 2])]
    assert_same(m.aminmax(torch.cat(rows), True, 1), m.aminmax(x, True, 1))
    tiles = m.aminmax(x, block_size=[9, 5])  # short last blocks too
    assert_same(m.aminmax(torch.stack(tiles)), m.aminmax(x))


def test_outputs_of_integers():
    x = integers((6, 8), torch.uint64)
    expected = reference.aminmax_op(x, [4, 3])
    outs = {
        k: STRIDES["strided"](torch.zeros_like(t))
        for k, t in zip(("min", "max"), expected, strict=True)
    }
    assert ops.aminmax.out(x, [4, 3], **outs) is None
    assert_same(tuple(t.contiguous() for t in outs.values()), expected)
    wrong = outs | {"max": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match=r"max: expected dtype torch\.uint64, got torch\.int64"):
        ops.aminmax.out(x, [4, 3], **wrong)


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_exported():
    class Extremes(torch.nn.Module):
        def forward(self, x):
            return *quantkit.aminmax(x, block_size=[2, x.shape[1]]), *quantkit.aminmax(
                x.long(), True
            )

    rows = {0: torch.export.Dim("rows", min=3), 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Extremes(), (torch.randn(5, 6),), dynamic_shapes=(rows,)).module()
    compiled = torch.compile(Extremes(), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 6), (8, 3), (9, 40)):
        x = values(shape, torch.float32, shape[0])
        for function in (program, compiled):
            assert_same(tuple(function(x)), Extremes()(x))
