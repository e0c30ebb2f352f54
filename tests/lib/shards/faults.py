"""Faults of torch that are gone some day."""

import torch
import torch.distributed as dist
from lib.shards.dtensors import mesh_of, sharded, whole
from torch.distributed.tensor import DTensor, Replicate, Shard

import quantkit


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
