"""Stochastic rounding: a code follows from its number, the seed and the element's place alone."""

import itertools

import numpy as np
import pytest
import torch
from lib.backends import daily, on_every_backend
from lib.cases import (
    FLOATS,
    LAYOUTS,
    SPECIAL,
    STRIDES,
    assert_same,
    given,
    given_arguments,
    ops,
    values,
)
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import quantkit
from quantkit import philox, reference
from quantkit.formats import FORMATS, OF_NAME, scale_numbers

pytestmark = pytest.mark.fallback
SEEDS = (0, 1), (2**40 + 3, 2**33 + 1), (-1, -1), (-(2**63), 2**63 - 1)
# Counters, keys and words that the generator's authors publish (Random123, kat_vectors).
PUBLISHED = (
    ("0" * 32, "0" * 16, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("f" * 32, "f" * 16, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a8885a308d313198a2e03707344", "a4093822299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def words(text):
    text = text.replace(" ", "")
    return [torch.tensor(int(text[i : i + 8], 16)) for i in range(0, len(text), 8)]


@pytest.mark.parametrize(("counter", "key", "made"), PUBLISHED)
def test_published_vectors(counter, key, made):
    assert philox.words(words(counter), words(key)) == words(made)


@pytest.mark.parametrize(
    ("seed", "first", "draws"),
    [
        ((0, 0), 0, [59605, 26151, 50573, 57705, 44108, 48215, 56280, 39680]),
        (SEEDS[1], 2**35 + 5, [11208, 63137]),
        (SEEDS[2], 0, [58119, 15675]),
    ],
)
def test_draws_of_the_contract(seed, first, draws):
    made = philox.draws(torch.tensor(seed), torch.arange(first, first + len(draws)))
    assert made.tolist() == draws


@pytest.mark.parametrize("name", OF_NAME)
def test_probability_is_exact_to_half_a_draw(name):
    """Of all 2^16 draws, as many round up as the fraction says; a number of the format never moves."""
    f = OF_NAME[name]
    u = (2 * torch.arange(2**16) + 1).to(torch.float32) * 2.0**-17
    limit = min(f.high, 100.0)
    numbers = [0.1, 1 / 3, 2**-16, 2**-17, 1 - 2**-17, 1.0, 0.5, 1.7, limit - 0.3, limit, 1e-30]
    for v in numbers + ([-v for v in numbers] if f.low < 0 else []):
        if not f.low <= v <= f.high:
            continue
        v = torch.tensor(float(v))
        made = f.decode(f.encode(v.expand(2**16), f.low, f.high, u))
        below, above = made.abs().min().double(), made.abs().max().double()
        if below == above:  # a number of the format, or as good as one
            fraction = torch.tensor(0.0)
            assert (v.abs() - below).abs() <= 2.0**-17 * max(1.0, float(above))
        else:
            assert below < v.abs() < above
            fraction = (v.abs() - below) / (above - below)
        count = (made.abs().double() == above).sum() if below != above else 0
        assert abs(count / 2**16 - fraction) <= 2.0**-17


def calls(f, x, scale, zero_point, blocks, seed, index, turn):
    options = {"block_size": blocks, "seed": torch.tensor(seed), "index": index}
    args = given_arguments(x, scale, zero_point, f, (f.low, f.high), turn, **options)
    if f.per_byte == 1 or (x.dim() and x.shape[-1] % f.per_byte == 0):
        yield "quantize.format", args
    yield "_fake_quantize_masked.format", args
    yield "fake_quantize.format", args


def choosing_calls(f, x, blocks, seed, index):
    options = {"seed": torch.tensor(seed), "index": index}
    args = (x, blocks, f.low, f.high, 1e-8, f.low < 0, f.name, options)
    if f.per_byte == 1 or (x.dim() and x.shape[-1] % f.per_byte == 0):
        yield "dynamic_quantize.format", args
        yield "quantize_dequantize.format", args


@pytest.mark.parametrize("name", daily(OF_NAME, "int8", "uint4", "float8_e4m3fn", "float4_e2m1fn"))
@on_every_backend(emulated=lambda name: name in ("int8", "float4_e2m1fn") or None)
def test_every_layout(name):
    """Codes follow the place in the tensor, however it lies in memory."""
    f = OF_NAME[name]
    for turn, (shape, blocks, layout) in enumerate(LAYOUTS):
        shape = (*shape[:-1], shape[-1] * (f.per_byte if shape[-1] % f.per_byte else 1))
        sizes = blocks and [
            b if b == -1 or n % b == 0 else 1 for b, n in zip(blocks, shape, strict=True)
        ]
        x = STRIDES[layout](values(shape, FLOATS[turn % 4], turn, special=turn % 3 == 0))
        scale, zero_point = given(shape, sizes, torch.float32, turn)
        index = None
        if turn % 2:  # a part of a larger tensor
            larger = [n + 3 for n in shape]
            index = list(quantkit.shard_index(larger, [turn % 3] * len(shape)))
        seed = SEEDS[turn % 4]
        yield from calls(f, x, scale, zero_point, sizes, seed, index, turn)
        yield from choosing_calls(f, x[:, ...], sizes, seed, index)


@on_every_backend(emulated=True)
def test_special_values_and_places():
    x = torch.tensor(SPECIAL * 4)
    places = ([0, 1], [7, 1], [2**63 - 51, 1], [52, -1], [5, 0], [3, 2**40], [2**32 * 8 - 9, 1])
    for f, (i, index) in itertools.product(FORMATS, enumerate(places)):
        for scale in (0.5, 0.0, -1.0, float("nan"), 1e-40):
            p = torch.tensor(scale), torch.tensor(3.0)
            yield from calls(f, x[:51], *p, None, SEEDS[i % 4], index, 0)
    for f in FORMATS:
        p = torch.tensor(0.3), torch.tensor(0.0)
        yield from calls(f, torch.tensor(1.1), *p, None, SEEDS[1], [9], 0)
        yield from calls(f, torch.ones(0, 8), *p, None, SEEDS[1], [9, -5, -7], 0)


@pytest.mark.parametrize("scheme", ["int8_channel", "fp8_tensor", "mxfp4", "uint8_token"])
def test_shards_have_the_codes_of_the_whole(backend, scheme):
    x = values((24, 128), torch.bfloat16, 5)
    x = torch.where(x.isfinite(), x, 1)
    whole, p = quantkit.quantize(x, scheme, seed=(7, 3))
    assert_same(whole, reference.quantize(x, scheme, seed=(7, 3))[0])
    numbers = quantkit.dequantize(whole, p)
    for rows, columns in itertools.product(
        ((0, 24), (0, 1), (5, 24)), ((0, 128), (32, 96), (96, 128))
    ):
        part = x[slice(*rows), slice(*columns)]
        index = quantkit.shard_index(x.shape, (rows[0], columns[0]))
        scale = scale_numbers(p.scale).expand(24, -1) if p.scale.dim() else p.scale
        block = 128 // scale.shape[1] if p.scale.dim() else 1
        if p.scale.dim():
            scale = scale[slice(*rows), columns[0] // block : -(-columns[1] // block)]
        zero_point = p.zero_point[slice(*rows)] if p.zero_point.dim() else p.zero_point
        own = quantkit.QuantizationParams(
            scale, zero_point, p.q_min, p.q_max, dtype=p.dtype, compute_dtype=torch.float32
        )
        codes = quantkit.quantize_tensor(part, own, seed=torch.tensor([7, 3]), index=index)
        assert_same(
            quantkit.dequantize(codes, own).clone(), numbers[slice(*rows), slice(*columns)].clone()
        )


def test_threads_and_chunks_do_not_show(native, threads):
    x = values((301, 1003), torch.float32, 1)
    scale, zero_point = given((301, 1003), [1, -1], torch.float32)
    seed, seen = torch.tensor([5, 6]), []
    for count in (1, 2, 5):
        threads(count)
        for t in (x, x.t().contiguous().t()):
            args = (t, scale, zero_point, -128, 127, "int8")
            seen.append(getattr(ops, "quantize.format")(*args, seed=seed).contiguous())
    assert all(torch.equal(q, seen[0]) for q in seen)


def test_seeds(backend):
    """An int is the pair with stream 0, and a tensor the same; another seed or stream gives others."""
    x = torch.rand(4096) + 0.5
    p = quantkit.QuantizationParams(1.0, 0.0, -128, 127)
    one = quantkit.quantize_tensor(x, p, seed=5)
    assert_same(one, quantkit.quantize_tensor(x, p, seed=(5, 0)))
    assert_same(one, quantkit.quantize_tensor(x, p, seed=torch.tensor([5, 0, 9, 9])[:2]))
    assert_same(one, quantkit.quantize_tensor(x, p, seed=torch.tensor([5, 9, 0, 9])[::2]))
    for other in (6, (5, 1), (5, 2**32), 5 + 2**32, -5):
        assert (one != quantkit.quantize_tensor(x, p, seed=other)).float().mean() > 0.3
    assert 0.4 < (one != torch.floor(x)).float().mean() < 0.6


def test_gradient_is_that_of_clipping(backend):
    """1 where x / scale + zero_point lies within the limits before it is rounded."""
    x = torch.tensor([-8.6, -8.4, -8.0, 0.3, 7.0, 7.2, 7.6, float("nan")], requires_grad=True)
    p = quantkit.QuantizationParams(1.0, 0.0, -8, 7, dtype=torch.int4)
    for module in (quantkit, reference):
        x.grad = None
        module.fake_quantize(x, p, seed=3).sum().backward()
        assert x.grad.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func():
    """Each sample of vmap is a tensor by itself: of one seed all have the same draws."""
    x, p = values((3, 4, 6), torch.float32, 2), quantkit.QuantizationParams(0.3, 0.0, -8, 7)
    seeds = torch.tensor([[1, 2], [3, 4], [1, 2]])

    def each(t, seed):
        return quantkit.quantize_tensor(t, p, seed=seed), quantkit.fake_quantize(t, p, seed=seed)

    for many, dims in ((seeds, (0, 0)), (seeds[:1].expand(3, 2), (0, None))):
        right = tuple(map(torch.stack, zip(*map(each, x, many), strict=True)))
        given_seed = many if dims[1] == 0 else many[0]
        assert_same(torch.vmap(each, in_dims=dims)(x, given_seed), right)

    def loss(t):
        return (quantkit.fake_quantize(t, p, seed=seeds[0]) * t).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert_same(torch.func.grad(loss)(x), leaf.grad)
    inside = (x / 0.3 >= -8) & (x / 0.3 <= 7)
    tangent = torch.func.jvp(lambda t: each(t, seeds[0])[1], (x,), (x + 1,))[1]
    assert_same(tangent, torch.where(inside, x + 1, 0.0))


def test_checkpointing_repeats_the_draws():
    x = torch.randn(64, 64, requires_grad=True)
    p = quantkit.get_symmetric_qparams(x.detach())
    seed = torch.tensor([1, 2])

    def layer(t):
        return quantkit.fake_quantize(t, p, seed=seed).sin().sum()

    layer(x).backward()
    plain, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=False).backward()
    assert torch.equal(x.grad, plain)


def test_compiled_and_exported_seeds_are_inputs(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, x, seed):
            q, p = quantkit.quantize(x, "fp8_token", seed=seed)
            return quantkit.dequantize(q, p), quantkit.fake_quantize(x, p, seed=seed)

    x, layer = torch.randn(6, 64), Layer()
    compiled = torch.compile(layer, fullgraph=True)
    rows = torch.export.Dim("rows", min=2, max=100)
    shapes = {"x": {0: rows}, "seed": None}
    program = torch.export.export(layer, (x, torch.tensor([0, 0])), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for seed in ([0, 0], [5, 6], [-1, 2**40]):
        for t in (x, torch.randn(9, 64)):
            right = layer(t, torch.tensor(seed))
            assert_same(compiled(t, torch.tensor(seed)), right)
            assert_same(tuple(loaded(t, torch.tensor(seed))), right)


def test_compiled_shards_share_a_graph():
    """Where a shard begins is a symbol of the graph; its codes are those of the whole."""
    x, seed = torch.randn(64, 256), torch.tensor([7, 3])
    whole = quantkit.quantize(x, "int4_group128", seed=seed)[0]

    def rows(part, seed, start):
        index = quantkit.shard_index(x.shape, (start, 0))
        return quantkit.quantize(part, "int4_group128", seed=seed, index=index)[0]

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(rows, fullgraph=True, dynamic=True, backend="aot_eager")
    for begin, end in ((5, 20), (20, 33), (33, 64)):
        assert_same(compiled(x[begin:end], seed, begin), whole[begin:end])
    assert counters["stats"]["unique_graphs"] == 1


class SecondHalf(torch.nn.Module):
    """Codes of a part whose size, and whose place in the whole, are known at run time."""

    def forward(self, x, seed):
        rows, columns = x.shape
        index = quantkit.shard_index((2 * rows, columns), (rows, 0))
        codes = quantkit.quantize_tensor(x, P, seed=seed, index=index)
        return codes, quantkit.fake_quantize(x, P, seed=seed, index=torch.Size(index))


@pytest.mark.parametrize("rows", [torch.export.Dim("rows", min=2), torch.export.Dim.DYNAMIC])
def test_exported_shards_have_any_size(rows):
    seed = torch.tensor([7, 3])
    free = {0: rows, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(SecondHalf(), (X, seed), dynamic_shapes=(free, None)).module()
    for shape in ((4, 6), (9, 5), (2, 300)):
        whole = torch.randn(2 * shape[0], shape[1])
        codes, made = program(whole[shape[0] :], seed)
        assert_same(codes, quantkit.quantize_tensor(whole, P, seed=seed)[shape[0] :])
        assert_same(made, quantkit.fake_quantize(whole, P, seed=seed)[shape[0] :])


def test_lists_of_places():
    whole = torch.randn(8, 6)
    right = quantkit.quantize_tensor(whole, P, seed=1)[4:]
    for shape, start in ((torch.Size([8, 6]), (4, 0)), ([8, 6], torch.Size([4, 0]))):
        index = quantkit.shard_index(shape, start)
        for each in (index, list(index), torch.Size(index), [np.int64(n) for n in index]):
            assert_same(quantkit.quantize_tensor(whole[4:], P, seed=1, index=each), right)


X, P = torch.randn(4, 6), quantkit.QuantizationParams(0.1, 0.0, -128, 127)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"seed": 1.5}, TypeError, "seed: expected an int, a pair of ints or a torch.Tensor, got 1.5"),
        ({"seed": (1, 2, 3)}, TypeError, "a pair of ints or a torch.Tensor, got [1, 2, 3]"),
        ({"seed": 2**63}, ValueError, "ints from -2^63 to 2^63 - 1, got [9223372036854775808, 0]"),
        ({"seed": torch.tensor(1)}, TypeError, "torch.int64 of shape (2,), got torch.int64 of shape ()"),
        ({"seed": torch.ones(2)}, TypeError, "torch.int64 of shape (2,), got torch.float32"),
        ({"index": [0, 6, 1]}, ValueError, "index: expected None without seed, got [0, 6, 1]"),
        ({"seed": 1, "index": [0, 1]}, ValueError, "index: expected an offset and a stride for each"),
        ({"seed": 1, "index": [0, 6, 2**64]}, ValueError, "index: expected ints from -2^63 to 2^63 - 1"),
        ({"seed": 1, "index": 3}, TypeError, "index: expected a list of ints or None"),
        ({"seed": 1, "index": [-1, 6, 1]}, ValueError, "index: expected places of x's elements in [0"),
        ({"seed": 1, "index": [0, -1, 0]}, ValueError, "index: expected places of x's elements"),
        ({"seed": 1, "index": [2**63 - 10, 6, 1]}, ValueError, "index: expected places of x's elements"),
        ({"seed": 1, "index": [0, 2**62, 2**62]}, ValueError, "index: expected places of x's elements"),
    ],
)  # fmt: skip
def test_bad_seeds_and_places(options, error, text):
    functions = [
        lambda m: m.quantize_tensor(X, P, **options),
        lambda m: m.fake_quantize(X, P, **options),
        lambda m: m.dynamic_quantize(X, **options),
        lambda m: m.quantize_dequant(X, **options),
    ]
    for function, module in itertools.product(functions, (quantkit, reference)):
        with pytest.raises(error) as raised:
            function(module)
        assert text in str(raised.value)
    if all(isinstance(v, (list, torch.Tensor)) for v in options.values()):
        with pytest.raises(RuntimeError) as raised:
            args = (X, torch.tensor(0.1), None, -128, 127, "int8")
            torch.ops.quantkit.quantize.format(*args, **options)
        assert text in str(raised.value)


def test_rounding_first_is_for_nearest():
    p = quantkit.QuantizationParams(0.1, 0.0, -128, 127, round_first=True)
    with pytest.raises(ValueError, match="round_first: expected False with seed, got True"):
        quantkit.quantize_tensor(X, p, seed=1)
    with pytest.raises(ValueError, match="round_first: expected False with seed, got True"):
        quantkit.dynamic_quantize(X, round_first=True, seed=1)


def test_strides_that_lead_nowhere():
    """Of sizes of 1, and of no elements, any int64 will do; beyond are no places."""
    p = quantkit.QuantizationParams(0.1, 0.0, -128, 127)
    for m, (shape, index) in itertools.product(
        (quantkit, reference),
        (((1, 6), [5, 2**63 - 1, 1]), ((1, 6), [5, -(2**63), 1]), ((0, 6), [-1, 2**62, 2**62])),
    ):
        x = values(shape, torch.float32, 1)
        plain = reference.quantize_tensor(x, p, seed=1, index=[5, 6, 1])
        assert_same(m.quantize_tensor(x, p, seed=1, index=index), plain)
        for place in range(3):
            far = [*index[:place], 2**64, *index[place + 1 :]]
            with pytest.raises(ValueError, match="index: expected ints from"):
                m.quantize_tensor(x, p, seed=1, index=far)


def test_shard_index():
    assert quantkit.shard_index((4, 6, 5), (1, 2, 3)) == (1 * 30 + 2 * 5 + 3, 30, 5, 1)
    assert quantkit.shard_index((), ()) == (0,)
    places = quantkit.shard_index([np.int64(2**40), 2**40, 1], (np.int32(3), True, 0))
    assert places == (3 * 2**40 + 1, 2**40, 1, 1) and all(type(n) is int for n in places)
    for error, shape, start, text in (
        (ValueError, (4, 6), (1,), "start: expected 2 ints, one per dimension of [4, 6], got [1]"),
        (ValueError, (4, 6), (1, 7), "start: expected a place within [4, 6], got [1, 7]"),
        (ValueError, (4, 6), (-1, 0), "start: expected a place within [4, 6], got [-1, 0]"),
        (ValueError, (4, -1), (0, 0), "global_shape: expected sizes from 0 on, got [4, -1]"),
        (TypeError, (4, 6), None, "start: expected a list of ints, got NoneType"),
        (TypeError, (4, 6.0), (0, 0), "global_shape: expected a list of ints, got [4, 6.0]"),
        (TypeError, 4, (0,), "global_shape: expected a list of ints, got 4"),
        (TypeError, X, (0, 0), "global_shape: expected a list of ints, got Tensor"),
    ):
        with pytest.raises(error) as raised:
            quantkit.shard_index(shape, start)
        assert str(raised.value) == text
