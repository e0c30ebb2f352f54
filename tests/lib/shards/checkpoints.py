"""Quantized tensors in distributed checkpoints."""

import random

import torch
import torch.distributed as dist
from lib.shards.dtensors import mesh_of, numbers, same, sharded
from torch.distributed.tensor import Replicate, Shard

import quantkit

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
