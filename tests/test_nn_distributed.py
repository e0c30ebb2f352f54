"""quantkit.nn under DDP and FSDP2: processes that talk by gloo, each with a part of the codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantkit

ROOT = Path(__file__).resolve().parent.parent
# Arguments: the rank, the number of processes, a folder, schemes.
PROGRAM = """
import os, sys, warnings
import torch
import torch.distributed as dist
from torch import nn
import quantkit

warnings.simplefilter("ignore")
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
i = torch.tensor([[1, 2, 9]])

def floats():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(10, 96), nn.Linear(96, 7), nn.ReLU(), nn.Linear(7, 64, bias=False),
        nn.Linear(64, 3),
    )

def model(scheme, make=floats):
    m = make()
    quantkit.quantize_model_(m, [("3", "int8_channel"), ("4", "int8_tensor"), ("*", scheme)])
    return m

def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)

def gathered(t):
    # gloo moves no float8: bytes
    if not hasattr(t, "full_tensor"):
        return t
    bits = torch.uint8 if t.element_size() == 1 else t.dtype
    return t.view(bits).full_tensor().view(t.dtype)

def end():
    # Threads of gloo and of a distributed checkpoint may outlive the interpreter, which aborts then.
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
"""
DDP = """
for scheme in sys.argv[4:]:
    plain, ddp = model(scheme), nn.parallel.DistributedDataParallel(model(scheme))
    assert same(ddp(i), plain(i)), scheme
    for m in (plain, ddp):
        m(i).square().sum().backward()
    for name, p in plain.named_parameters():
        other = ddp.module.get_parameter(name)
        assert same(other.detach(), p.detach())
        assert (p.grad is None) == (other.grad is None)
        assert p.grad is None or torch.equal(p.grad, other.grad)
    assert plain[4].bias.grad is not None and plain[4].weight.grad is None
end()
"""
FSDP = """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

def sharded(m):
    for layer in m:
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(m)

def on_meta():
    with torch.device("meta"):
        return floats()

for scheme in sys.argv[4:]:
    plain, parts = model(scheme), sharded(model(scheme))
    y = plain(i)
    for layer in (parts[0], parts[1]):
        part, whole = layer.weight.to_local(), layer.weight
        assert part.numel() < whole.numel() or world == 1, scheme
    assert same(parts(i), y), scheme
    parts(i).sum().backward()
    state = parts.state_dict()
    for name, t in plain.state_dict().items():
        assert same(gathered(state[name]), t) or t.element_size() == 1
        assert torch.equal(gathered(state[name]).view(torch.uint8), t.view(torch.uint8)), name

    # Saved by the parts, loaded by others, which began without numbers.
    dcp.save({"model": get_model_state_dict(parts)}, checkpoint_id=f"{folder}/{scheme}")
    others = sharded(model(scheme, on_meta))
    others.to_empty(device="cpu")
    state = {"model": get_model_state_dict(others)}
    dcp.load(state, checkpoint_id=f"{folder}/{scheme}")
    set_model_state_dict(others, state["model"])
    assert same(others(i), y), scheme

    before = plain[1].weight_scale.dtype
    assert parts.half()[1].weight_scale.dtype == before
    assert parts(i).dtype == torch.float16
end()
"""


def run(program, processes, folder, schemes):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM + program]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(processes), str(folder), *schemes],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        for process in started:
            text, _ = process.communicate(timeout=240)
            assert process.returncode == 0, text
    finally:
        for process in started:
            process.kill()
            process.wait()


pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


def test_ddp_gives_the_same_bits(tmp_path):
    run(DDP, 1, tmp_path, quantkit.SCHEMES)


@pytest.mark.full
def test_ddp_of_two_processes_gives_the_same_bits(tmp_path):
    run(DDP, 2, tmp_path, quantkit.SCHEMES)


def test_fsdp2_gives_the_same_bits(tmp_path):
    run(FSDP, 1, tmp_path, ["int8_channel", "mxfp8"])


@pytest.mark.full
def test_fsdp2_of_two_processes_shards_codes_and_gives_the_same_bits(tmp_path):
    run(FSDP, 2, tmp_path, quantkit.SCHEMES)
