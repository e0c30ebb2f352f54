"""What ranks run (lib.ranks): DTensors against the whole tensor. Each function runs on every rank."""

import collections
import itertools
import random
from functools import cache, partial

import torch
import torch.distributed as dist
from lib.cases import BITS, FLOATS, assert_same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import quantkit
from quantkit.formats import OF_DTYPE

F8, E8, F4 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2


@cache  # each one has process groups of its own
def mesh_of(*sizes):
    return init_device_mesh("cpu", sizes)


# ---- comparing ----------------------------------------------------------------------------------------


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


# ---- the table ----------------------------------------------------------------------------------------

INTEGERS = (torch.int32, torch.int16, torch.uint8, torch.uint64, torch.bool)
SHAPES = ((8, 12), (7, 12), (12, 7), (3, 24), (1, 12), (16, 48), (5, 6, 8), (24,), (2,), (4, 1))
SHAPES += ((), (0, 8), (8, 0), (2, 3, 2, 5))
FLOAT32 = {"compute_dtype": torch.float32}
SCHEMES = {
    "int8": {},
    "int8 asymmetric": {"sym": False},
    "uint8 with zero": {"sym": False, "dtype": torch.uint8, "include_zero": True},
    "int16 wide": {"dtype": torch.int16, "q_min": -1000, "q_max": 1000},
    "int8 float32 steps": {**FLOAT32},
    "int8 asymmetric float32": {"sym": False, **FLOAT32},
    "half range": {"scale_rule": "half_range"},
    "ceil": {"scale_rule": "ceil"},
    "uint16": {"dtype": torch.uint16, "sym": False},
    "round first": {"sym": False, "round_first": True, "include_zero": True},
    "int4": {"dtype": torch.int4},
    "uint4": {"dtype": torch.uint4, "sym": False},
    "int2": {"dtype": torch.int2},
    "e4m3": {"dtype": F8},
    "e5m2": {"dtype": torch.float8_e5m2},
    "E8M0": {"dtype": F8, "scale_dtype": E8},
    "MXFP4": {"dtype": F4, "scale_dtype": E8, "scale_rule": "even"},
    "NVFP4": {"dtype": F4, "scale_dtype": F8, "global_scale": 0.01},
    "global scales": {"dtype": F8, "global_scale": "of blocks"},
    "seed": {"dtype": torch.int4, "seed": (3, 4)},
    "seed int8": {"seed": 5},
}


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


def case(draw, world):
    """One line of the table."""
    meshes = [(2, 2), (4,)] if world == 4 else [(world,), (1, world), (world, 1)]
    sizes, shape = draw.choice(meshes), draw.choice(SHAPES)
    scheme = draw.choice(list(SCHEMES))
    dtype = draw.choice(FLOATS if draw.random() < 0.9 else INTEGERS)
    places = [Replicate(), *map(Shard, range(len(shape)))]
    place = [draw.choice(places[draw.random() < 0.8 and len(places) > 1 :]) for _ in sizes]
    if len(sizes) == 2 and shape and draw.random() < 0.3:  # as FSDP2 over tensor parallel has it
        dim = draw.randrange(len(shape))
        place = [_StridedShard(dim, split_factor=sizes[1]), Shard(dim)]
    elif dtype.is_floating_point and draw.random() < 0.1:
        place[draw.randrange(len(place))] = Partial()
    version_1 = SCHEMES[scheme].keys() <= {"sym", "include_zero", "q_min", "q_max", "dtype"}
    f = OF_DTYPE[SCHEMES[scheme].get("dtype", torch.int8)]
    blocks = blocks_of(shape, not (version_1 and f.number is not None), draw)
    return sizes, shape, dtype, place, blocks, scheme


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


def chosen(x, blocks, options):
    return quantkit.dynamic_quantize(x, block_size=blocks, **options)[1]


def calls(x, blocks, options, p, plain, draw):
    """The public functions by name, each as a function without arguments. p: x's parameters."""
    given = {k: options[k] for k in ("seed",) if k in options}
    choosing = {k: v for k, v in options.items() if k not in ("sym", "seed")}
    symmetric = options.get("sym", True)
    choose = quantkit.get_symmetric_qparams if symmetric else quantkit.get_asymmetric_qparams
    if symmetric:
        choosing.pop("include_zero", None)
    if "seed" in options:
        choosing["compute_dtype"] = torch.float32
    over = blocks_of(x.shape, True, draw)
    return {
        "choose": lambda: choose(x, block_size=blocks, **choosing),
        "dynamic_quantize": lambda: quantkit.dynamic_quantize(x, block_size=blocks, **options),
        "quantize_dequant": lambda: quantkit.quantize_dequant(x, block_size=blocks, **options),
        "aminmax": lambda: quantkit.aminmax(x, block_size=over),
        "quantize_tensor": lambda: quantkit.quantize_tensor(x, p(), **given),
        "plain parameters": lambda: quantkit.quantize_tensor(x, plain(), **given),
        "dequantize_tensor": lambda: quantkit.dequantize_tensor(
            quantkit.quantize_tensor(x, p(), **given), p()
        ),
        "fake_quantize": lambda: quantkit.fake_quantize(x, p(), **given),
        "gradient": lambda: gradient(x, p(), **given),
        "measure": lambda: tuple(quantkit.measure(x, p())),
        "measure_limbs": lambda: quantkit.measure_limbs(x, p(), over=over),
    }


def gradient(x, p, **given):
    """x's gradient, of a gradient that is x too."""
    if not x.is_floating_point():
        return x
    leaf = x.detach().clone().requires_grad_()
    quantkit.fake_quantize(leaf, p, **given).backward(x.detach())
    return leaf.grad


REFUSED = ("whole bytes",)  # what a refusal may say


def outcome(call):
    """(results, None), or (None, the error)."""
    try:
        return call(), None
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        return None, error


def table(seed, cases, world):
    """Cases of the table: how many results are equal, refused, wrong on both, and communicate."""
    found = collections.Counter()
    for number in range(cases):
        draw = random.Random(f"{seed} {number}")
        sizes, shape, dtype, place, blocks, scheme = case(draw, world)
        mesh = mesh_of(*sizes)
        x = numbers(shape, dtype, draw)
        d = placed(x, mesh, place)
        options = dict(SCHEMES[scheme])
        if options.get("global_scale") == "of blocks":
            options["global_scale"] = torch.tensor(0.3)
            if blocks is not None:
                scales = (
                    quantkit.get_symmetric_qparams(
                        x, block_size=blocks, compute_dtype=torch.float32
                    ).scale.shape
                    if x.numel()
                    else ()
                )
                sizes_of_it = [draw.choice((1, n)) for n in scales]
                options["global_scale"] = numbers(sizes_of_it, torch.float16, draw).abs() + 0.1
        of_x = partial(chosen, x, blocks, options)
        again = draw.random()
        expected = calls(x, blocks, options, of_x, of_x, random.Random(again))
        of_d = partial(chosen, d, blocks, options)
        actual = calls(d, blocks, options, of_d, of_x, random.Random(again))
        for name in expected:
            right, error = outcome(expected[name])
            counted = Collectives()
            with counted:
                made, raised = outcome(actual[name])
            what = (seed, number, sizes, shape, dtype, place, blocks, scheme, name)
            if raised is not None:
                if error is not None and (type(error), str(error)) == (type(raised), str(raised)):
                    found["the whole tensor's error"] += 1
                elif any(text in str(raised) for text in REFUSED):
                    found[f"refused: {next(text for text in REFUSED if text in str(raised))}"] += 1
                else:
                    raise AssertionError(f"{what}: raised") from raised
                continue
            assert error is None, f"{what}: expected {error}"
            try:
                same(made, right)
            except AssertionError as difference:
                raise AssertionError(f"{what}") from difference
            found["equal"] += 1
            found["communicate"] += bool(counted.calls)
            sent = {"all_reduce", "all_gather_into_tensor"}
            if name == "gradient" and any(p.is_partial() for p in place):
                sent.add("reduce_scatter_tensor")  # torch's, of the gradient that comes
            assert set(counted.calls) <= sent, (what, counted.calls)
            found["all_gather"] += counted.calls["all_gather_into_tensor"]
        found["cases"] += 1
    return dict(found)


# ---- what the table does not draw ---------------------------------------------------------------------


def sharded(t, mesh, *place):
    return distribute_tensor(t, mesh, place, src_data_rank=None)


def message_of(call):
    _, error = outcome(call)
    return str(error)


def given_parameters(world):
    """Scale and zero_point of other granularities and ranks, an index, a sum that is not made yet."""
    mesh, draw = mesh_of(world), random.Random(0)
    params = quantkit.QuantizationParams
    x = numbers((12, 20), torch.float32, draw)
    for one, other in [
        ((1, 20), (3, 1)), ((4, 1), (1, 5)), ((6, 5), (6, 1)), ((1, 5), (4, 5)), ((20,), (4, 1)),
        ((), (3, 4)), ((2, 4), ()), ((12, 1), (12, 20)),
    ]:  # fmt: skip
        scale = numbers(one, torch.float32, draw).abs().nan_to_num(1, 1, 1) + 0.1
        zero_point = torch.randint(-5, 5, other, generator=torch.Generator().manual_seed(1))
        for place, f, dtype in itertools.product(
            [Shard(0), Shard(1), Replicate()],
            [{}, FLOAT32, {"dtype": torch.int4, "q_min": -8, "q_max": 7}],
            [torch.int16, torch.int64],
        ):
            limits = {"q_min": -128, "q_max": 127, **f}
            plain = params(scale, zero_point.to(dtype), **limits)
            d = sharded(x, mesh, place)
            p = params(
                sharded(plain.scale, mesh, Shard(0) if scale.dim() else Replicate()),
                sharded(plain.zero_point, mesh, Shard(1) if len(other) > 1 else Replicate()), **limits,
            )  # fmt: skip
            for given in (plain, p):
                for function in (quantkit.quantize_tensor, quantkit.fake_quantize):
                    made, error = outcome(partial(function, d, given))
                    if error is not None:
                        assert "whole bytes" in str(error), error
                        continue
                    same(made, function(x, plain))
    p = params(0.3, 0.0, -8, 7)
    x = numbers((6, 8), torch.float32, draw)
    for place in (Shard(0), Shard(1)):
        index = quantkit.shard_index((100, 64), (5, 7))
        made = quantkit.quantize_tensor(sharded(x, mesh, place), p, seed=1, index=index)
        same(made, quantkit.quantize_tensor(x, p, seed=1, index=index))
    part = DTensor.from_local(torch.full((4, 6), 1.5), mesh, [Partial()])
    same(quantkit.quantize(part, "int8_token"), quantkit.quantize(part.full_tensor(), "int8_token"))


def raw_operators(world):
    """torch.ops.quantkit: the bits of the functions; what takes no DTensor says so."""
    import quantkit.distributed

    mesh, ops = mesh_of(world), torch.ops.quantkit
    x = numbers((9, 16), torch.float32, random.Random(1)).nan_to_num(1, 1, 1)
    for place, blocks in itertools.product((Shard(0), Shard(1)), (None, [1, -1], [3, 4], [-1, 1])):
        d = sharded(x, mesh, place)
        choice = (blocks, -128, 127, 1e-8, False)
        right = ops.quantize_dequantize(x, *choice, torch.int8)
        same(ops.quantize_dequantize(d, *choice, torch.int8), right)
        same(ops.dynamic_quantize(d, *choice, torch.int8), right[:1] + right[2:])
        scale, zero_point = ops.choose_qparams(d, *choice)
        same((scale, zero_point), right[2:])
        same(ops.quantize(d, scale, zero_point, -128, 127, torch.int8), right[0])
        given = scale, zero_point, -100, 50
        same(ops.fake_quantize(d, *given), ops.fake_quantize(x, *right[2:], -100, 50))
        gradient = ops._fake_quantize_backward(d, d, *given)
        same(gradient, ops._fake_quantize_backward(x, x, *right[2:], -100, 50))
    q = torch.empty(9, 16, dtype=torch.int8)
    scale, zero = torch.tensor(0.1), torch.tensor(0.0)
    learned = torch.tensor(0.1, requires_grad=True)
    leaf = d.detach().clone().requires_grad_()
    params = partial(quantkit.QuantizationParams, q_min=-8, q_max=7)
    return [
        message_of(lambda: ops.quantize.out(d, scale, zero, -8, 7, torch.int8, out=q)),
        message_of(lambda: quantkit.linear_w8a8(d, q, scale)),
        message_of(lambda: quantkit.fake_quantize(d, params(learned, 0.0))),
        message_of(lambda: quantkit.fake_quantize(leaf, params(learned, 0.0))),
        message_of(
            lambda: quantkit.quantize_tensor(x, params(sharded(scale, mesh, Replicate()), 0.0))
        ),
        message_of(lambda: quantkit.dynamic_quantize(d, block_size=[4, -1])),
        message_of(lambda: quantkit.dynamic_quantize(d, eps=-1.0)),
        message_of(
            lambda: quantkit.dynamic_quantize(sharded(x[:, :6], mesh, Shard(1)), dtype="int4")
        ),
        message_of(
            lambda: quantkit.quantize_tensor(
                d, params(sharded(scale, named_mesh(world), Replicate()), 0.0)
            )
        ),
    ]


@cache
def named_mesh(world):
    return init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))


def plain_alone(world):
    """What takes no DTensors says so."""
    x = numbers((8, 16), torch.float32, random.Random(1)).nan_to_num(1, 1, 1)
    d, reference = sharded(x, mesh_of(world), Shard(0)), quantkit.reference
    q, p = quantkit.quantize(d, "int8_channel")
    messages = {
        "explain": [message_of(lambda: quantkit.explain(q, d, p))],
        "join_measures": [
            message_of(lambda: quantkit.join_measures(*quantkit.measure_limbs(d, p)))
        ],
        "reference": [
            message_of(lambda: reference.quantize(d, "nvfp4")),
            message_of(lambda: reference.quantize_tensor(x, p)),
            message_of(lambda: reference.fake_quantize(d, p)),
            message_of(lambda: reference.aminmax(d)),
        ],
    }
    for name, said in messages.items():
        assert len(set(said)) == 1, (name, said)
    return {name: said[0] for name, said in messages.items()}


def other_shards(world):
    """Shards of 4 + 2k rows, which torch.chunk would make equal: what each rank says."""
    local = torch.ones(4 + 2 * dist.get_rank(), 16)
    shape, stride = torch.Size((sum(4 + 2 * k for k in range(world)), 16)), (16, 1)
    d = DTensor.from_local(
        local, mesh_of(world), [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    messages = [None] * world
    dist.all_gather_object(messages, message_of(lambda: quantkit.quantize(d, "int8_tensor")))
    return messages


def outside(world):
    """A rank that is not in the mesh has empty results, as of torch's operators."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh, x = DeviceMesh("cpu", [0]), numbers((8, 16), torch.float32, random.Random(1))
    d = sharded(x, mesh, Shard(0))
    for blocks, options in ((None, {}), ([1, -1], FLOAT32), ([1, 8], {"dtype": torch.int4})):

        def all_of(t, blocks=blocks, options=options):
            q, p = quantkit.dynamic_quantize(t, block_size=blocks, **options)
            chosen = quantkit.get_symmetric_qparams(t, block_size=blocks, **options)
            measured = tuple(quantkit.measure(t, p)[:3]) + quantkit.measure_limbs(
                t, p, over=[2, -1]
            )
            made = q, p.scale, chosen.scale, quantkit.quantize_tensor(t, p), *quantkit.aminmax(t)
            made += quantkit.dequantize_tensor(q, p), quantkit.fake_quantize(t, p), gradient(t, p)
            return *made, *measured

        for made, right in zip(all_of(d), all_of(x), strict=True):
            assert (made.shape, made.dtype, made.stride()) == (
                right.shape,
                right.dtype,
                right.stride(),
            )
            if dist.get_rank() == 0:
                assert_same(made.to_local(), right)
            else:
                assert made.to_local().shape == (d * 2).to_local().shape == (0,)


def layouts(world):
    """Transposed and sliced x: strides of the whole tensor's results, and shards that lie so."""
    mesh, x = mesh_of(world), numbers((8, 12), torch.float32, random.Random(8))
    p = quantkit.QuantizationParams(torch.full((1, 1), 0.1), 0.0, -128, 127)
    for place in (Shard(0), Shard(1), Replicate()):
        d, rows = sharded(x, mesh, place), sharded(x.t(), mesh, place)
        for t, right in (
            (d.t(), x.t()),
            (d[:, ::2], x[:, ::2]),
            (rows, x.t()),
            (d.t()[::2], x.t()[::2]),
        ):
            for call in (
                lambda t: quantkit.quantize_dequant(t, block_size=[5, -1], compute_dtype=torch.float32),
                lambda t: quantkit.quantize_tensor(t, p, seed=(1, 2)),
                lambda t: quantkit.dequantize_tensor(quantkit.quantize_tensor(t, p), p),
                lambda t: quantkit.fake_quantize(t, p),
            ):  # fmt: skip
                same(call(t), call(right))
        made = quantkit.fake_quantize(d[:, ::2], p)
        same(made.view(-1), quantkit.fake_quantize(x[:, ::2], p).view(-1))
    seed = sharded(torch.tensor([1, 2]), mesh, Replicate())
    same(quantkit.quantize_tensor(d, p, seed=seed), quantkit.quantize_tensor(x, p, seed=(1, 2)))


# ---- bytes on the wire --------------------------------------------------------------------------------


def layer_of(weight):
    layer = torch.nn.Linear(1, 1)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = torch.nn.Parameter(weight)
    return layer


def traffic(world, sizes=None):
    """Rows of docs/distributed.md: what a rank gives to collectives for a (512, 1024) float32 x.

    Sharded by rows, by columns, and a sum; on a mesh of several dimensions by rows and columns.
    """
    mesh, x = mesh_of(*(sizes or (world,))), numbers((512, 1024), torch.float32, random.Random(2))
    x = x.nan_to_num(1, 1, 1)
    plain = quantkit.get_asymmetric_qparams(x, block_size=[1, 64])
    places = [(Shard(0),), (Shard(1),), (Partial(),)] if sizes is None else [(Shard(0), Shard(1))]
    codes = {
        place: sharded(quantkit.quantize_tensor(x, plain), mesh, *place) for place in places[:2]
    }
    calls = {
        '`quantize(x, "int8_tensor")`': lambda d: quantkit.quantize(d, "int8_tensor"),
        '`quantize(x, "uint8_tensor")`': lambda d: quantkit.quantize(d, "uint8_tensor"),
        '`quantize(x, "int8_channel")`': lambda d: quantkit.quantize(d, "int8_channel"),
        '`quantize(x, "int4_group128")`': lambda d: quantkit.quantize(d, "int4_group128"),
        '`quantize(x, "nvfp4")`': lambda d: quantkit.quantize(d, "nvfp4"),
        "`dynamic_quantize(x, block_size=[-1, 1])`": lambda d: quantkit.dynamic_quantize(
            d, block_size=[-1, 1]
        ),
        "`aminmax(x)`": quantkit.aminmax,
        "`quantize_dequant(x)`": quantkit.quantize_dequant,
        "`quantize_tensor(x, p)`": lambda d: quantkit.quantize_tensor(d, plain),
        "`dequantize_tensor(q, p)`": lambda d: quantkit.dequantize_tensor(
            codes[d.placements], plain
        ),
        "`fake_quantize(x, p)` and its gradient": lambda d: gradient(d, plain),
        "`measure(x, p)`": lambda d: quantkit.measure(d, plain),
        "`measure_limbs(x, p)`": lambda d: quantkit.measure_limbs(d, plain),
        '`quantize_model_` of a Linear with this weight, "int8_channel"': lambda d: (
            quantkit.quantize_model_(torch.nn.Sequential(layer_of(d)), "int8_channel")
        ),
    }
    rows = []
    for name, call in calls.items():
        cells = [name]
        for place in places:
            if name.startswith("`dequantize") and place not in codes:
                cells.append("-")
                continue
            d = placed(x, mesh, place)
            with Collectives() as counted:
                call(d)
            assert set(counted.calls) <= {"all_reduce"}, counted.calls
            total, count = sum(counted.bytes.values()), sum(counted.calls.values())
            cells.append(f"{total:,} in {count}" if count else "0")
        rows.append(cells)
    return rows


# ---- torch.compile ------------------------------------------------------------------------------------


def compiled(world, backend):
    """Compiled calls over uneven shards, with a gradient."""
    import quantkit.distributed

    mesh, x = mesh_of(world), numbers((15, 24), torch.float32, random.Random(3))
    x = x.nan_to_num(1, 1, 1)
    for place, blocks in itertools.product((Shard(0), Shard(1)), (None, [1, -1], [1, 8], [5, 6])):
        torch._dynamo.reset()

        def both(t, blocks=blocks):
            q, x_hat, p = quantkit.quantize_dequant(t * 2, block_size=blocks, sym=False)
            return q, x_hat, p.scale, p.zero_point

        same(torch.compile(both, fullgraph=True, backend=backend)(sharded(x, mesh, place)), both(x))
    for place, scheme in itertools.product(
        (Shard(0), Shard(1)),
        ({"dtype": F8}, {"dtype": F8, "scale_dtype": E8}, {"dtype": F4, "scale_dtype": F8}),
    ):
        torch._dynamo.reset()

        def cut(t, scheme=scheme):
            q, p = quantkit.dynamic_quantize(t, block_size=[5, 8], **scheme)
            return q, quantkit.dequantize_tensor(q, p), quantkit.fake_quantize(t, p)

        same(torch.compile(cut, fullgraph=True, backend=backend)(sharded(x, mesh, place)), cut(x))
    torch._dynamo.reset()

    def loss(w):
        p = quantkit.get_symmetric_qparams(w, q_min=-8, q_max=7)
        return quantkit.fake_quantize(w * 1.5, p).sum()

    leaf, whole_leaf = sharded(x, mesh, Shard(0)).requires_grad_(), x.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend=backend)(leaf).backward()
    loss(whole_leaf).backward()
    same(leaf.grad, whole_leaf.grad)
    model, i = tensor_parallel(layers(), world), torch.tensor([[1, 2, 9]])
    quantkit.quantize_model_(model, "int8_channel", **ALL)
    made = torch.compile(model, fullgraph=True, backend=backend)(i)
    if backend == "inductor":  # another order of sums
        torch.testing.assert_close(made, model(i))
    else:
        same(made, model(i))


def graphs(world):
    """What depends on the rank, compiled by inductor, which looks for graphs on the disk."""
    import quantkit.distributed

    torch.compiler.config.cache_key_tag = "mine"  # the first call in a graph adds the rank
    mesh, x = mesh_of(world), numbers((8, 32), torch.float32, random.Random(4)).nan_to_num(1, 1, 1)
    p = quantkit.QuantizationParams(torch.arange(1.0, 9.0).reshape(8, 1) / 10, 0.0, -128, 127)
    for call in (
        lambda t: quantkit.fake_quantize(t, p),
        lambda t: quantkit.quantize(t, "int8_channel", seed=torch.tensor([1, 2]))[0],
        lambda t: t.redistribute(placements=[Shard(0)]) * 1 if isinstance(t, DTensor) else t * 1,
    ):
        for place in (Shard(0), Replicate()):
            torch._dynamo.reset()
            same(torch.compile(call, fullgraph=True)(sharded(x, mesh, place)), call(x))
    assert torch.compiler.config.cache_key_tag == f"mine rank {dist.get_rank()} of {world}"


# ---- models -------------------------------------------------------------------------------------------


class Linear(torch.nn.Linear):
    """4-bit weights in training."""

    def forward(self, x):
        p = quantkit.get_symmetric_qparams(self.weight, True, q_min=-8, q_max=7)
        return torch.nn.functional.linear(x, quantkit.fake_quantize(self.weight, p))


class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Linear(8, 7, bias=False), Linear(8, 7, bias=False)

    def forward(self, x):
        return self.a(x) + self.b(x)


def trained(wrap, data, targets):
    """A model whose gradients are sums of small integers: exact in every order."""
    torch.manual_seed(3)
    model = Sum()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 512).round() / 512)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 1 / 256)
    for _ in range(5):
        optimizer.zero_grad()
        (wrapped(data) * targets).sum().mul(1 / len(data)).backward()
        optimizer.step()
    return model


GROUPS = {"dtype": "int4", "block_size": [4]}


def training(world):
    """DDP and FSDP2 end with the codes of one process, quantized where the shards are."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh, g, rank = mesh_of(world), torch.Generator().manual_seed(5), dist.get_rank()
    data = torch.randint(-3, 4, (world * 4, 8), generator=g).float()
    targets = torch.randint(-3, 4, (world * 4, 7), generator=g).float()
    mine = slice(rank * 4, rank * 4 + 4)

    def fsdp2(model):
        for layer in (model.a, model.b, model):
            fully_shard(layer, mesh=mesh)
        return model

    one = trained(lambda model: model, data, targets)
    before = trained(lambda model: model, data, targets * 0)
    assert not torch.equal(one.a.weight, before.a.weight)
    for wrap in (DistributedDataParallel, fsdp2):
        model = trained(wrap, data[mine], targets[mine])
        for layer in ("a", "b"):
            w, right = getattr(model, layer).weight, getattr(one, layer).weight
            assert isinstance(w, DTensor) == (wrap is fsdp2)
            for scheme in ("int8_tensor", "int8_channel", "fp8_token", GROUPS):
                same(quantkit.quantize(w, scheme), quantkit.quantize(right, scheme))


def parallel(sizes):
    """FSDP2 over tensor parallel: _StridedShard."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp"))
    torch.manual_seed(2)

    def floats():
        layers = torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 16)
        return torch.nn.Sequential(*layers)

    model = floats()
    right = {k: v.detach().clone() for k, v in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["dp"])
    kinds = set()
    for name, w in model.named_parameters():
        kinds |= {type(place).__name__ for place in w.placements}
        if w.dim() == 2:
            for blocks in (None, [1, -1], [-1, 1], [1, 8], [8, 8], [5, 3]):
                options = {"block_size": blocks, "sym": False, **FLOAT32}
                made = quantkit.quantize_dequant(w, **options)
                same(made, quantkit.quantize_dequant(right[name], **options))
    # Codes: tensor parallel, then quantize_model_, then FSDP2.
    model, x = floats(), torch.ones(2, 16)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    quantkit.quantize_model_(model, "mxfp8")
    y = model(x)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["dp"])
    same(model(x), y)
    return sorted(kinds - {"Replicate"})


SAVED = ("int8_tensor", "int8_channel", "int4_group128", "fp8_token", "mxfp8", "mxfp4", "nvfp4")


def states(place):
    """Quantized states, of the whole tensors and of their shards."""
    right, state = {}, {}
    for number, scheme in enumerate(SAVED):
        w = numbers((7, 512), torch.bfloat16, random.Random(number)).nan_to_num(1, 1, 1)
        for there, t in ((right, w), (state, place(w))):
            q, p = quantkit.quantize(t, scheme)
            there |= {f"{scheme}.q": q, f"{scheme}.scale": p.scale}
            if p.global_scale is not None:
                there[f"{scheme}.global_scale"] = p.global_scale
    return right, state


def save_checkpoint(world, folder):
    import torch.distributed.checkpoint as dcp

    mesh = mesh_of(world)
    dcp.save(states(lambda w: sharded(w, mesh, Shard(0)))[1], checkpoint_id=folder)


def load_checkpoint(world, folder):
    """What any number of ranks has saved, in other placements and by one process."""
    import torch.distributed.checkpoint as dcp

    right = states(lambda w: w)[0]
    for sizes, place in (
        ((world,), (Shard(0),)), ((world,), (Shard(1),)), ((world,), (Replicate(),)),
        ((1, world), (Shard(0), Shard(1))), ((world, 1), (Shard(0), Shard(0))),
    ):  # fmt: skip
        mesh = mesh_of(*sizes)
        loaded = {
            k: sharded(torch.zeros_like(v), mesh, *(place if v.dim() == 2 else [Replicate()] * mesh.ndim))
            for k, v in right.items()
        }  # fmt: skip
        dcp.load(loaded, checkpoint_id=folder)
        for name, t in loaded.items():
            same(t, right[name])
    if dist.get_rank() == 0:
        alone = {k: torch.zeros_like(v) for k, v in right.items()}
        dcp.load(alone, checkpoint_id=folder, no_dist=True)
        for name, t in alone.items():
            same(t, right[name])
    dist.barrier()


class Layers(torch.nn.Module):
    """Layers of all kinds that tensor parallel cuts, and one that it leaves whole."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = torch.nn.Embedding(11, 16), torch.nn.Embedding(8, 16)
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)
        self.last = torch.nn.Linear(16, 4)

    def forward(self, i):
        x = self.tokens(i) + self.places(i % 8)
        return self.last(self.down(torch.relu(self.up(x))))


def layers(device="cpu"):
    torch.manual_seed(4)
    with torch.device(device):
        return Layers()


def tensor_parallel(model, world):
    from torch.distributed.tensor import parallel

    return parallel.parallelize_module(model, mesh_of(world), {
        "tokens": parallel.ColwiseParallel(output_layouts=Replicate()),
        "places": parallel.RowwiseParallel(input_layouts=Replicate()),
        "up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel(),
    })  # fmt: skip


def same_state(model, right):
    state = model.state_dict()
    assert list(state) == list(right)
    for name, t in right.items():
        same(state[name], t)


MODELS = ("nvfp4", {"dtype": "uint4", "sym": False, "block_size": [8]}, "int8_channel", "mxfp8")
ALL = {"include": ["*"]}  # embeddings and heads too


def quantized_models(world, folder):
    """quantize_model_ of shards: the bits of the whole model; tensor parallel runs as with floats."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    i = torch.tensor([[1, 2, 9], [7, 0, 3]])
    for number, scheme in enumerate(MODELS):
        plain = layers()
        quantkit.quantize_model_(plain, scheme, **ALL)
        right = plain.state_dict()
        model = tensor_parallel(layers(), world)
        with Collectives() as counted:
            quantkit.quantize_model_(model, scheme, **ALL)
        assert set(counted.calls) == {"all_reduce"}
        same_state(model, right)
        part = model.tokens.weight.to_local()
        assert part.numel() * world == model.tokens.weight.numel()
        floats = tensor_parallel(layers(), world)
        with torch.no_grad():
            for name, layer in plain.named_children():
                w = getattr(floats, name).weight
                whole_weight = layer.dequantized()
                w.copy_(sharded(whole_weight, mesh_of(world), *w.placements) if isinstance(w, DTensor)
                        else whole_weight)  # fmt: skip
        with Collectives() as one:
            y = model(i)
        with Collectives() as other:
            expected = floats(i)
        assert one.calls == other.calls and one.bytes == other.bytes  # no codes are sent
        same(y, expected)
        for m in (model, floats):
            m(i).square().sum().backward()
        same(model.up.bias.grad, whole(floats.up.bias.grad))

        if number < 2:
            # From these shards to a model that began without numbers, and to whole tensors.
            dcp.save(model.state_dict(), checkpoint_id=f"{folder}/{number}")
            empty = tensor_parallel(layers("meta"), world)
            quantkit.quantize_model_(empty, scheme, **ALL)
            state = empty.to_empty(device="cpu").state_dict()
            dcp.load(state, checkpoint_id=f"{folder}/{number}")
            empty.load_state_dict(state)
            same(empty(i), y)
            state = {name: torch.zeros_like(t) for name, t in right.items()}
            dcp.load(state, checkpoint_id=f"{folder}/{number}")
            for name, t in state.items():
                same(t, right[name])
        quantkit.dequantize_model_(model)
        same(model(i), y)

        # The shards of FSDP2, in a model that is not wrapped; then codes that are.
        wrapped, shards = fully_shard(layers(), mesh=mesh_of(world)), layers("meta")
        shards.load_state_dict(wrapped.state_dict(), assign=True)
        with Collectives() as counted:
            quantkit.quantize_model_(shards, scheme, **ALL)
        assert set(counted.calls) == {"all_reduce"}
        same_state(shards, right)
        if number < 2:
            dcp.save(shards.state_dict(), checkpoint_id=f"{folder}/shards{number}")
            served = layers("meta")
            quantkit.quantize_model_(served, scheme, **ALL)
            fully_shard(served, mesh=mesh_of(world)).to_empty(device="cpu")
            state = served.state_dict()
            dcp.load(state, checkpoint_id=f"{folder}/shards{number}")
            served.load_state_dict(state)
            same_state(served, right)
            same(served(i), plain(i))


def quantized_convolutions(world):
    """Matrices of uneven shards of outputs, and of even ones of channels."""
    for outputs, place in ((5, Shard(0)), (5, Shard(1)), (1, Shard(0))):
        torch.manual_seed(8)
        plain, model = (torch.nn.Sequential(torch.nn.Conv2d(4, outputs, 3)) for _ in range(2))
        model.load_state_dict(plain.state_dict())
        model[0].weight = torch.nn.Parameter(
            sharded(plain[0].weight.detach(), mesh_of(world), place)
        )
        for m in (model, plain):
            quantkit.quantize_model_(m, "int8_channel")
        same_state(model, plain.state_dict())
        same(model[0].dequantized(), plain[0].dequantized())


def refused_models(world, folder):
    """What cannot be quantized where it is, or run."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from quantkit.nn import load_checkpoint_

    wrapped = torch.nn.Sequential(fully_shard(layers(), mesh=mesh_of(world)))
    parallel = tensor_parallel(layers(), world)
    spoiled = tensor_parallel(layers(), world)
    with torch.no_grad():
        if dist.get_rank() == world - 1:
            spoiled.up.weight.to_local()[0, 0] = float("nan")
    before = {name: type(m) for name, m in spoiled.named_modules()}
    uneven = torch.nn.Sequential(torch.nn.Conv2d(4 * world + 1, 3, 3))
    uneven[0].weight = torch.nn.Parameter(
        sharded(uneven[0].weight.detach(), mesh_of(world), Shard(1))
    )
    messages = [
        message_of(lambda: quantkit.quantize_model_(wrapped)),
        message_of(lambda: quantkit.dequantize_model_(wrapped[0])),
        message_of(lambda: quantkit.quantize_model_(DistributedDataParallel(layers()))),
        message_of(lambda: load_checkpoint_(wrapped, folder)),
        message_of(lambda: load_checkpoint_(parallel, folder)),
        message_of(lambda: quantkit.quantize_model_(parallel, activations="int8")),
        message_of(lambda: quantkit.quantize_model_(spoiled)),
        message_of(lambda: quantkit.quantize_model_(uneven)),
    ]
    assert before == {name: type(m) for name, m in spoiled.named_modules()}
    parallel.up.register_forward_hook(lambda *_: None)
    return [*messages, message_of(lambda: quantkit.quantize_model_(parallel))]


# ---- observers ----------------------------------------------------------------------------------------

FORMS = ({}, {"granularity": "channel", "counts": True}, {"granularity": "token"})
FORMS += ({"granularity": "group", "group_size": 2},)


def watched(model, data, run=None, include=("up", "down"), **form):
    with torch.no_grad(), quantkit.observe(model, include=include, **form) as stats:
        for x in data:
            (run or model)(x)
    return stats


def exact(model):
    """Weights whose products with small integers have no rounding."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 16).round())
    return model


def observed(world):
    """Statistics of all ranks are those of one process that sees all batches."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    g, rank = torch.Generator().manual_seed(6), dist.get_rank()
    data = [torch.randint(0, 11, (2, 3), generator=g) for _ in range(2 * world)]
    for form in FORMS:
        right = watched(exact(layers()), data, **form).state_dict()
        ddp, fsdp2 = exact(layers()), fully_shard(exact(layers()), mesh=mesh_of(world))
        for stats in (
            watched(ddp, data[rank::world], DistributedDataParallel(ddp), **form),
            watched(fsdp2, data[rank::world], **form),
            # Each rank sees all batches, and of down its columns.
            watched(tensor_parallel(exact(layers()), world), data, **form),
        ):
            state = stats.all_reduce().state_dict()
            assert list(state) == list(right)
            for name, t in right.items():
                same(state[name], t)
    # What has no DTensors counts once for each rank.
    once = watched(exact(layers()), data, include="last")
    often = watched(tensor_parallel(exact(layers()), world), data, include="last").all_reduce()
    same(often["last"].counts, once["last"].counts * world)
    for method, sym in itertools.product(("minmax", "percentile"), (True, False)):
        assert often.qparams(method, sym=sym) == once.qparams(method, sym=sym)


def observed_shards(world):
    """Each element of a DTensor counts once, wherever it lies; what is refused."""
    from quantkit.observers import MovingAverage, Observer

    x = numbers((2, 7, 48), torch.bfloat16, random.Random(7))
    x[1, 2, 3], x[0, 6, 0] = float("nan"), -float("inf")
    places = [Replicate(), *map(Shard, range(3))]
    for form in (*FORMS, {"granularity": "group", "group_size": 6, "counts": True}):
        right = Observer(**form)
        right.update(x)
        right.update(x * 2)
        for mesh, place in [
            *((mesh_of(world), (p,)) for p in places),
            *((mesh_of(1, world), (p, q)) for p in places[:2] for q in places),
        ]:
            made = Observer(**form)
            made.update(sharded(x, mesh, *place))
            made.update(sharded(x * 2, mesh, *place))
            made.all_reduce()
            for name, t in right.state_dict().items():
                same(made.state_dict()[name], t)
    mesh = mesh_of(world)
    made, right = Observer(), Observer()
    made.update(DTensor.from_local(torch.full((2, 3), 1.5), mesh, [Partial()]))
    right.update(torch.full((2, 3), 1.5 * world))
    same(made.all_reduce().max, right.max)
    made, right = MovingAverage(momentum=0.5), MovingAverage(momentum=0.5)
    for k in (1, 4):
        made.update(sharded(x * k, mesh, Shard(1)), all_ranks=True)
        right.update(x * k)
    same((made.min, made.max), (right.min, right.max))
    d, some = sharded(x, mesh, Shard(2)), Observer()
    some.update(sharded(x, mesh, Replicate()))
    assert (some.seen.sum() == 0) == (dist.get_rank() > 0)
    return [
        message_of(lambda: Observer("group", group_size=5).update(d)),
        message_of(lambda: MovingAverage().update(d)),
    ]


# ---- faults of torch ----------------------------------------------------------------------------------


def sharding_cache(world):
    """Which values of an int[] argument torch asks a rule of register_sharding for, of three."""
    from torch.distributed.tensor.experimental import register_sharding

    @torch.library.custom_op("quantkit_tests::f", mutates_args=())
    def f(x: torch.Tensor, block: list[int], n: int) -> torch.Tensor:
        return x.clone()

    f.register_fake(lambda x, block, n: torch.empty_like(x))
    seen = []

    @register_sharding(torch.ops.quantkit_tests.f.default)
    def rule(x, block, n):
        seen.append(list(block))
        return [([Replicate()], [Replicate(), None, None])]

    d = sharded(torch.ones(4), mesh_of(world), Replicate())
    for block in ([1], [2], [4]):
        torch.ops.quantkit_tests.f(d, block, 3)
    return seen


def maximum_of_nan(world):
    """gloo's maximum of floats, NaN on the last rank, and of their keys."""
    value = float("nan") if dist.get_rank() == world - 1 else 1.0
    t = torch.tensor([value])
    dist.all_reduce(t, dist.ReduceOp.MAX)
    d = DTensor.from_local(torch.tensor([value]), mesh_of(world), [Shard(0)])
    return [t.isnan().item(), whole(quantkit.aminmax(d)[1]).isnan().item()]


def uneven_graphs(world):
    """What each rank gets of a compiled graph of uneven shards: its error, or nothing."""
    torch.compiler.config.cache_key_tag = ""  # quantkit.distributed adds the rank
    d = sharded(torch.randn(15, 24), mesh_of(world), Shard(0))
    _, error = outcome(lambda: torch.compile(lambda t: t * 2 + 1, fullgraph=True)(d).to_local())
    errors = [None] * world
    dist.all_gather_object(errors, error and type(error).__name__)
    return errors
