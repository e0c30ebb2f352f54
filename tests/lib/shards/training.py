"""Training: the codes of one process."""

import torch
import torch.distributed as dist
from lib.shards.dtensors import FLOAT32, mesh_of, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import quantkit


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


def parallel(world):
    """FSDP2 over tensor parallel: _StridedShard."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
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
