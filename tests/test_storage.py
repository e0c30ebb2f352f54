"""Copies, pickles and files of what quantkit returns."""

import copy
import io
import json
import pickle

import pytest
import torch
from lib.cases import assert_same, params, values
from safetensors import safe_open
from safetensors.torch import save_file

import quantkit

pytestmark = pytest.mark.fallback


def made(dtype=torch.uint8):
    return quantkit.dynamic_quantize(
        values((4, 6), torch.float32), block_size=[1, 3], dtype=dtype, q_min=3, q_max=99, sym=False
    )


def same(a, b):
    assert type(a) is type(b) is quantkit.QuantizationParams
    assert_same(params(a), params(b))
    assert (a.q_min, a.q_max, a.dtype) == (b.q_min, b.q_max, b.dtype)


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p)), saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_parameters_survive(copied):
    _, qparams = made()
    again = copied(qparams)
    same(again, qparams)
    shares = again.scale.data_ptr() == qparams.scale.data_ptr()
    assert shares == (copied is copy.copy)
    x = values((4, 6), torch.float32, 2)
    assert_same(quantkit.quantize_tensor(x, again), quantkit.quantize_tensor(x, qparams))


class QuantizedLinear(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        q, p = quantkit.dynamic_quantize(weight, True)
        self.q_min, self.q_max = p.q_min, p.q_max
        for name, tensor in (("q", q), ("scale", p.scale), ("zero_point", p.zero_point)):
            self.register_buffer(name, tensor)

    def forward(self, x):
        p = quantkit.QuantizationParams(self.scale, self.zero_point, self.q_min, self.q_max)
        return torch.nn.functional.linear(x, quantkit.dequantize_tensor(self.q, p))


def test_state_dict_round_trip():
    layer = QuantizedLinear(values((4, 6), torch.float32))
    other = QuantizedLinear(torch.ones(4, 6))
    state = saved_and_loaded(layer.state_dict())
    assert {k: t.dtype for k, t in state.items()} == {
        "q": torch.int8, "scale": torch.float32, "zero_point": torch.float32,
    }  # fmt: skip
    other.load_state_dict(state)
    x = torch.randn(3, 6)
    assert_same(other(x), layer(x))


def test_a_public_module_keeps_its_buffers_when_moved():
    layer = QuantizedLinear(values((4, 6), torch.float32)).to(torch.bfloat16)
    assert layer.q.dtype == torch.int8 and layer.scale.dtype == torch.bfloat16
    assert layer(torch.ones(2, 6)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16], ids=str)
def test_safetensors_round_trip(tmp_path, dtype):
    """The layout that README documents; examples/safetensors_file.py writes it."""
    q, p = made(dtype)
    limits = {"q_min": p.q_min, "q_max": p.q_max}
    tensors = {"w.q": q, "w.scale": p.scale, "w.zero_point": p.zero_point}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"w": json.dumps(limits)})
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        limits = json.loads(file.metadata()["w"])
        q2 = file.get_tensor("w.q")
        scale, zero_point = file.get_tensor("w.scale"), file.get_tensor("w.zero_point")
    again = quantkit.QuantizationParams(scale, zero_point, **limits, dtype=q2.dtype)
    same(again, p)
    assert_same(quantkit.dequantize_tensor(q2, again), quantkit.dequantize_tensor(q, p))
