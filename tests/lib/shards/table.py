"""The table of placements and operators: cases that are drawn."""

import collections
import random
from functools import partial

import torch
from lib.cases import FLOATS
from lib.shards.dtensors import (
    E8,
    F4,
    F8,
    FLOAT32,
    Collectives,
    blocks_of,
    gradient,
    mesh_of,
    numbers,
    outcome,
    placed,
    same,
)
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import quantkit
from quantkit.formats import OF_DTYPE

INTEGERS = (torch.int32, torch.int16, torch.uint8, torch.uint64, torch.bool)
SHAPES = ((8, 12), (7, 12), (12, 7), (3, 24), (1, 12), (16, 48), (5, 6, 8), (24,), (2,), (4, 1))
SHAPES += ((), (0, 8), (8, 0), (2, 3, 2, 5))
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


def table(world, seed, cases):
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
                elif "whole bytes" in str(raised):
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
            sent = {"all_reduce", "all_gather_into_tensor"}
            if name == "gradient" and any(p.is_partial() for p in place):
                sent.add("reduce_scatter_tensor")  # torch's, of the gradient that comes
            assert set(counted.calls) <= sent, (what, counted.calls)
            found["all_gather"] += counted.calls["all_gather_into_tensor"]
        found["cases"] += 1
    return dict(found)
