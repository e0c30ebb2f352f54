"""What ranks run (lib.ranks): DTensors against the whole tensor. Each function runs on every rank."""

import collections
import random
from functools import partial

import torch
from lib.cases import BITS, FLOATS, assert_same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import quantkit
from quantkit.formats import OF_DTYPE

F8, E8, F4 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2


# ---- comparing ----------------------------------------------------------------------------------------


def whole(t):
    """All of a DTensor on each rank: bits travel as int32, as gloo gathers neither int16 nor float8."""
    if not isinstance(t, DTensor):
        return t
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
    meshes = {1: [(1,)], 2: [(2,), (1, 2), (2, 1)], 4: [(4,), (2, 2)]}[world]
    sizes, shape = draw.choice(meshes), draw.choice(SHAPES)
    scheme = draw.choice(list(SCHEMES))
    dtype = draw.choice(FLOATS if draw.random() < 0.9 else INTEGERS)
    places = [Replicate(), *map(Shard, range(len(shape)))]
    place = [draw.choice(places[draw.random() < 0.8 and len(places) > 1 :]) for _ in sizes]
    version_1 = SCHEMES[scheme].keys() <= {"sym", "include_zero", "q_min", "q_max", "dtype"}
    f = OF_DTYPE[SCHEMES[scheme].get("dtype", torch.int8)]
    blocks = blocks_of(shape, not (version_1 and f.number is not None), draw)
    return sizes, shape, dtype, place, blocks, scheme


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
    except (ValueError, TypeError, RuntimeError) as error:
        return None, error


def table(seed, cases, world):
    """Cases of the table: how many results are equal, refused, wrong on both, and communicate."""
    found = collections.Counter()
    for number in range(cases):
        draw = random.Random(f"{seed} {number}")
        sizes, shape, dtype, place, blocks, scheme = case(draw, world)
        mesh = init_device_mesh("cpu", sizes)
        x = numbers(shape, dtype, draw)
        d = distribute_tensor(x, mesh, place, src_data_rank=None)
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
                    found["refused"] += 1
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
            assert set(counted.calls) <= {"all_reduce", "all_gather_into_tensor"}, (
                what,
                counted.calls,
            )
            found["all_gather"] += counted.calls["all_gather_into_tensor"]
        found["cases"] += 1
    return dict(found)
