"""What the table does not draw: other parameters, raw operators, meshes, layouts, and what is refused."""

import itertools
import random
from functools import cache, partial

import torch
import torch.distributed as dist
from lib.cases import assert_same
from lib.shards.dtensors import (
    FLOAT32,
    gradient,
    mesh_of,
    message_of,
    numbers,
    outcome,
    same,
    sharded,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import quantkit


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
