"""torch.compile over shards."""

import itertools
import random

import torch
import torch.distributed as dist
from lib.shards.dtensors import E8, F4, F8, mesh_of, numbers, same, sharded
from lib.shards.models import ALL, layers, tensor_parallel
from torch.distributed.tensor import DTensor, Replicate, Shard


def compiled(world, backend):
    """Compiled calls over uneven shards, with a gradient; by inductor all of them."""
    import quantkit.distributed

    mesh, x = mesh_of(world), numbers((15, 24), torch.float32, random.Random(3))
    x = x.nan_to_num(1, 1, 1)
    every = slice(None, None, 1 if backend == "inductor" else 3)
    places = Shard(0), Shard(1)
    for place, blocks in [*itertools.product(places, (None, [1, -1], [1, 8], [5, 6]))][every]:
        torch._dynamo.reset()

        def both(t, blocks=blocks):
            q, x_hat, p = quantkit.quantize_dequant(t * 2, block_size=blocks, sym=False)
            return q, x_hat, p.scale, p.zero_point

        same(torch.compile(both, fullgraph=True, backend=backend)(sharded(x, mesh, place)), both(x))
    schemes = {"dtype": F8}, {"dtype": F8, "scale_dtype": E8}, {"dtype": F4, "scale_dtype": F8}
    for scheme, place in [*itertools.product(schemes, places)][every]:
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
