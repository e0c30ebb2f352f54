"""Models of codes: quantized where their shards are, or wrapped when they hold codes."""

import torch
import torch.distributed as dist
from lib.shards.dtensors import Collectives, mesh_of, message_of, same, sharded, whole
from torch.distributed.tensor import DTensor, Replicate, Shard

import quantkit


class Layers(torch.nn.Module):
    """Layers of all kinds that tensor parallel cuts, and one that it leaves whole."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = torch.nn.Embedding(11, 16), torch.nn.Embedding(8, 16)
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)
        self.last = torch.nn.Linear(16, 4)

    def forward(self, i):
        x = self.tokens(i) + self.places(i % 8)
        return self.last(self.down(torch.relu(self.up(x))))


def layers(device="cpu"):
    torch.manual_seed(4)
    with torch.device(device):
        return Layers()


def tensor_parallel(model, world):
    from torch.distributed.tensor import parallel

    return parallel.parallelize_module(model, mesh_of(world), {
        "tokens": parallel.ColwiseParallel(output_layouts=Replicate()),
        "places": parallel.RowwiseParallel(input_layouts=Replicate()),
        "up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel(),
    })  # fmt: skip


def same_state(model, right):
    state = model.state_dict()
    assert list(state) == list(right)
    for name, t in right.items():
        same(state[name], t)


MODELS = ("nvfp4", {"dtype": "uint4", "sym": False, "block_size": [8]}, "int8_channel", "mxfp8")
ALL = {"include": ["*"]}  # embeddings and heads too


def quantized_models(world, folder):
    """quantize_model_ of shards: the bits of the whole model; tensor parallel runs as with floats."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    i = torch.tensor([[1, 2, 9], [7, 0, 3]])
    for number, scheme in enumerate(MODELS):
        plain = layers()
        quantkit.quantize_model_(plain, scheme, **ALL)
        right = plain.state_dict()
        model = tensor_parallel(layers(), world)
        with Collectives() as counted:
            quantkit.quantize_model_(model, scheme, **ALL)
        assert set(counted.calls) == {"all_reduce"}
        same_state(model, right)
        part = model.tokens.weight.to_local()
        assert part.numel() * world == model.tokens.weight.numel()
        floats = tensor_parallel(layers(), world)
        with torch.no_grad():
            for name, layer in plain.named_children():
                w = getattr(floats, name).weight
                whole_weight = layer.dequantized()
                w.copy_(sharded(whole_weight, mesh_of(world), *w.placements) if isinstance(w, DTensor)
                        else whole_weight)  # fmt: skip
        with Collectives() as one:
            y = model(i)
        with Collectives() as other:
            expected = floats(i)
        assert one.calls == other.calls and one.bytes == other.bytes  # no codes are sent
        same(y, expected)
        for m in (model, floats):
            m(i).square().sum().backward()
        same(model.up.bias.grad, whole(floats.up.bias.grad))

        if number < 2:
            # From these shards to a model that began without numbers, and to whole tensors.
            dcp.save(model.state_dict(), checkpoint_id=f"{folder}/{number}")
            empty = tensor_parallel(layers("meta"), world)
            quantkit.quantize_model_(empty, scheme, **ALL)
            state = empty.to_empty(device="cpu").state_dict()
            dcp.load(state, checkpoint_id=f"{folder}/{number}")
            empty.load_state_dict(state)
            same(empty(i), y)
            state = {name: torch.zeros_like(t) for name, t in right.items()}
            dcp.load(state, checkpoint_id=f"{folder}/{number}")
            for name, t in state.items():
                same(t, right[name])
        quantkit.dequantize_model_(model)
        same(model(i), y)

        # The shards of FSDP2, in a model that is not wrapped; then codes that are.
        wrapped, shards = fully_shard(layers(), mesh=mesh_of(world)), layers("meta")
        shards.load_state_dict(wrapped.state_dict(), assign=True)
        with Collectives() as counted:
            quantkit.quantize_model_(shards, scheme, **ALL)
        assert set(counted.calls) == {"all_reduce"}
        same_state(shards, right)
        if number < 2:
            dcp.save(shards.state_dict(), checkpoint_id=f"{folder}/shards{number}")
            served = layers("meta")
            quantkit.quantize_model_(served, scheme, **ALL)
            fully_shard(served, mesh=mesh_of(world)).to_empty(device="cpu")
            state = served.state_dict()
            dcp.load(state, checkpoint_id=f"{folder}/shards{number}")
            served.load_state_dict(state)
            same_state(served, right)
            same(served(i), plain(i))


def quantized_convolutions(world):
    """Matrices of uneven shards of outputs, and of even ones of channels."""
    for outputs, place in ((5, Shard(0)), (5, Shard(1)), (1, Shard(0))):
        torch.manual_seed(8)
        plain, model = (torch.nn.Sequential(torch.nn.Conv2d(4, outputs, 3)) for _ in range(2))
        model.load_state_dict(plain.state_dict())
        model[0].weight = torch.nn.Parameter(
            sharded(plain[0].weight.detach(), mesh_of(world), place)
        )
        for m in (model, plain):
            quantkit.quantize_model_(m, "int8_channel")
        same_state(model, plain.state_dict())
        same(model[0].dequantized(), plain[0].dequantized())


def refused_models(world, folder):
    """What cannot be quantized where it is, or run."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from quantkit.nn import load_checkpoint_

    wrapped = torch.nn.Sequential(fully_shard(layers(), mesh=mesh_of(world)))
    parallel = tensor_parallel(layers(), world)
    spoiled = tensor_parallel(layers(), world)
    with torch.no_grad():
        if dist.get_rank() == world - 1:
            spoiled.up.weight.to_local()[0, 0] = float("nan")
    before = {name: type(m) for name, m in spoiled.named_modules()}
    uneven = torch.nn.Sequential(torch.nn.Conv2d(4 * world + 1, 3, 3))
    uneven[0].weight = torch.nn.Parameter(
        sharded(uneven[0].weight.detach(), mesh_of(world), Shard(1))
    )
    messages = [
        message_of(lambda: quantkit.quantize_model_(wrapped)),
        message_of(lambda: quantkit.dequantize_model_(wrapped[0])),
        message_of(lambda: quantkit.quantize_model_(DistributedDataParallel(layers()))),
        message_of(lambda: load_checkpoint_(wrapped, folder)),
        message_of(lambda: load_checkpoint_(parallel, folder)),
        message_of(lambda: quantkit.quantize_model_(parallel, activations="int8")),
        message_of(lambda: quantkit.quantize_model_(spoiled)),
        message_of(lambda: quantkit.quantize_model_(uneven)),
    ]
    assert before == {name: type(m) for name, m in spoiled.named_modules()}
    parallel.up.register_forward_hook(lambda *_: None)
    return [*messages, message_of(lambda: quantkit.quantize_model_(parallel))]


# ---- layers of codes that are wrapped -----------------------------------------------------------------


def floats():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(10, 96), torch.nn.Linear(96, 7), torch.nn.ReLU(),
        torch.nn.Linear(7, 64, bias=False), torch.nn.Linear(64, 3),
    )  # fmt: skip


def of_codes(scheme, device="cpu"):
    with torch.device(device):
        model = floats()
    quantkit.quantize_model_(model, [("3", "int8_channel"), ("4", "int8_tensor"), ("*", scheme)])
    return model


def ddp(world, schemes):
    """The bits and the gradients of a model that is not wrapped."""
    from torch.nn.parallel import DistributedDataParallel

    i = torch.tensor([[1, 2, 9]])
    for scheme in schemes:
        plain, wrapped = of_codes(scheme), DistributedDataParallel(of_codes(scheme))
        same(wrapped(i), plain(i))
        for m in (plain, wrapped):
            m(i).square().sum().backward()
        for name, p in plain.named_parameters():
            other = wrapped.module.get_parameter(name)
            same(other.detach(), p.detach())
            assert (p.grad is None) == (other.grad is None)
            assert p.grad is None or torch.equal(p.grad, other.grad)
        assert plain[4].bias.grad is not None and plain[4].weight.grad is None


def fsdp2(world, folder, schemes):
    """Codes are sharded; what the parts save, others load that began without numbers."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    def cut(model):
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh_of(world))
        return fully_shard(model, mesh=mesh_of(world))

    i = torch.tensor([[1, 2, 9]])
    for scheme in schemes:
        plain, parts = of_codes(scheme), cut(of_codes(scheme))
        y = plain(i)
        for layer in (parts[0], parts[1]):
            assert layer.weight.to_local().numel() < layer.weight.numel(), scheme
        same(parts(i), y)
        parts(i).sum().backward()
        same_state(parts, plain.state_dict())
        dcp.save({"model": get_model_state_dict(parts)}, checkpoint_id=f"{folder}/{scheme}")
        others = cut(of_codes(scheme, "meta"))
        others.to_empty(device="cpu")
        state = {"model": get_model_state_dict(others)}
        dcp.load(state, checkpoint_id=f"{folder}/{scheme}")
        set_model_state_dict(others, state["model"])
        same(others(i), y)
        before = plain[1].weight_scale.dtype
        assert parts.half()[1].weight_scale.dtype == before
        assert parts(i).dtype == torch.float16
