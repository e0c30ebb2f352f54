"""Observers: statistics of all ranks."""

import itertools
import random

import torch
import torch.distributed as dist
from lib.shards.dtensors import mesh_of, message_of, numbers, same, sharded
from lib.shards.models import layers, tensor_parallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import quantkit

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


def idle(world):
    """All but the first rank see nothing; the error where ranks observe different layers."""
    g, some = torch.Generator().manual_seed(8), dist.get_rank() == 0
    data = [torch.randint(0, 11, (2, 3), generator=g) for _ in range(3)]
    for form in FORMS:
        right = watched(exact(layers()), data, **form).state_dict()
        state = watched(exact(layers()), data[: 3 * some], **form).all_reduce().state_dict()
        assert list(state) == list(right)
        for name, t in right.items():
            same(state[name], t)
    stats = watched(layers(), [], include="up" if some else "down")
    return message_of(stats.all_reduce)


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
