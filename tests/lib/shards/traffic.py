"""Bytes on the wire."""

import random

import torch
from lib.shards.dtensors import Collectives, gradient, mesh_of, numbers, placed, sharded
from torch.distributed.tensor import Partial, Shard

import quantkit


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
