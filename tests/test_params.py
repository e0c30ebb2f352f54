"""QuantizationParams as an object: equality, hash, moves, pickles of version 1, exported text."""

import base64
import copy
import io
import json
import pickle
import zlib

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

import quantkit
from quantkit import QuantizationParams, params

pytestmark = pytest.mark.fallback
# Version 1's zlib.compress(pickle.dumps(p, protocol=2)), p as in its test.
VERSION_1 = (
    "eNrdkc1u00AUhceOk8DQlvBP+SvLZGOloQ1lRRaoCyygNZvZoJEzHuoBx+M7Hlc0UqSyaEV5Bh4AHgGJVfJUrMJMHC"
    "ohwQtgybpzr4+uz3fm2GVQRpl+L7SfRyoaFXjf9mIcaSGzvWoEqPMRnAm4bVJHCBUsSjnUmJaKJT4ttUgLTBUfliKN"
    "qeZZIRU97GHw2ktNYUp0wDFNZRTTt0qO6PBIc7O5ziiTMWcF5pk9YGiQloPQ9Nidfsbp7Mf0y+7s+8N30697674Zvp"
    "h9q9k6AdQmLWMmV1JLJlN6yFVhLINjJWTVfEqF1imnPItFlIE7/USwmeqjnNNCjHkBtYmxWCElUmmoBy6pmU5kGhqB"
    "Rzy7RGYH0Ay8srS/bZOmVVc4gCo8vGuw9OslIzhkzWiePNrZ7vc3u/1ed6u/BdVilpdQC9yXGrx9u+4NoL+Jnch30f"
    "nz1LwDaJKGdWOuJduEC6dwMQR8ApdCWAlQ4AbOKawGji1rZ8zEkXJmL7DAr1TMFY+fCaYxXO6E0NJwJYSriyzGXEma"
    "S8t7LfHaST1pkJX/Kv3u4+1e94/0nX+nX4lN+s55+IMBXE9M3DdCuHkCt0K4HaBO5yyxSa5ruBPC3QUC0JHI4N7zn/"
    "P5/Pcg+gD3g+aiiy03PFg6NoQ7GDbKof8LDkkIiw=="
)


def made(scale=0.5, zero_point=3.0, q_min=-7, q_max=7, dtype=None):
    return QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def bits(*codes):
    return torch.tensor(codes, dtype=torch.int32).view(torch.float32)


def test_equal_by_contents():
    x = torch.randn(4, 6)
    for channels in (False, True):
        a, b = (quantkit.get_asymmetric_qparams(x, channels) for _ in range(2))
        assert (a == b) is True and (a != b) is False and hash(a) == hash(b)
        assert (a == copy.deepcopy(a)) is True
        assert (a == quantkit.get_asymmetric_qparams(x * 2, channels)) is False
    assert a in [b] and len({hash(a), hash(b)}) == 1
    one, column = torch.tensor(1.0), torch.ones(3, 1)
    different = [
        made(one), made(one.double()), made(column), made(column.t()), made(one.bfloat16()),
        made(one, one), made(-one), made(one, 3.0, -8), made(one, 3.0, -7, 8), made(one * 0),
        made(-one * 0), made(one, dtype=torch.int8), made(bits(0x7FC00000)), made(bits(0x7FC00001)),
        made(one.to("meta")), made(None), made("s"), made(torch.ones(3, 1, dtype=torch.complex64)),
    ]  # fmt: skip
    for i, a in enumerate(different):
        for j, b in enumerate(different):
            assert (a == b) is (i == j) and (a != b) is (i != j)
    # Strides do not count, and a number is its 0-dim float64 tensor.
    assert made(torch.ones(3, 2)) == made(torch.ones(2, 3).t()) == made(torch.ones(3, 4)[:, ::2])
    assert made(torch.ones(1, 1).as_strided((1, 1), (1, 2))) == made(torch.ones(1, 1))
    assert made(torch.complex(one, -one).conj().imag) == made(one)
    assert made(bits(0x7FC00001)) == made(bits(0x7FC00001))
    assert made(1) == made(1.0) == made(one.double()) == made(np.float32(1)) != made(one)
    assert made(one, q_min=np.int64(-7)) == made(one)


def test_beside_anything_an_answer():
    p = made(torch.ones(3, 1))
    for other in (
        None,
        3,
        "s",
        torch.ones(3, 1),
        torch.ones(()),
        (p.scale, p.zero_point),
        object(),
    ):
        assert (p == other) is False and (p != other) is True

    class Derived(QuantizationParams):
        pass

    assert (p == Derived(p.scale, p.zero_point, p.q_min, p.q_max)) is False
    odd = [
        torch.ones(3, 1).to_sparse(),
        torch.ones(3, 1).to_mkldnn(),
        torch.nn.LazyLinear(2).weight,
        torch.ones(3, 1).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(3, 1), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ]
    odd += [torch.ones(3, 1, device="meta"), FakeTensorMode().from_tensor(p.scale), np.ones(3)]
    for scale in odd:
        assert (made(scale) == made(scale)) is True  # by identity
        assert (made(scale) == p) is False and isinstance(made(scale) == made(odd[0]), bool)
        if isinstance(scale, torch.Tensor) and not torch.nn.parameter.is_lazy(scale):
            assert isinstance(made(scale) == made(scale.clone()), bool)
    assert (made(q_min=np.ones(2)) == made(q_min=np.ones(2))) is False
    with FakeTensorMode():
        assert (p == made(torch.ones(3, 1), p.zero_point)) is False
    torch.vmap(lambda s: s if made(s) == made(s) != made(s * 1) else 1 / 0)(torch.ones(3))


def test_to_a_device():
    p = quantkit.get_symmetric_qparams(torch.randn(4, 6), True, dtype=torch.int16)
    for device in ("meta", torch.device("meta")):
        there = p.to(device)
        assert type(there) is QuantizationParams and p.scale.device.type == "cpu"
        assert there.scale.device.type == there.zero_point.device.type == "meta"
        assert (there.q_min, there.q_max, there.dtype) == (p.q_min, p.q_max, p.dtype)
    assert p.to("cpu") == p
    assert made().to("meta") == made()  # numbers have no device
    with pytest.raises(TypeError):
        p.to(torch.float16)
    moved = torch.compile(lambda p: p.to("cpu").scale * 2, fullgraph=True, backend="eager")
    assert torch.equal(moved(p), p.scale * 2)


def test_pickles_of_version_1():
    column = torch.tensor([[0.5], [2.0]])
    p = pickle.loads(zlib.decompress(base64.b64decode(VERSION_1)))
    assert p == made(column, torch.tensor(3.0), dtype=torch.int8) and p.dtype == torch.int8
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(p, protocol)) == p
    file = io.BytesIO()
    torch.save({"p": p}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["p"] == p


def test_text_of_exported_programs_names_dtypes_only():
    leaves, context = _pytree.tree_flatten(made(dtype=torch.uint8))
    assert len(leaves) == 2
    text = _pytree.treespec_dumps(context)
    assert _pytree.tree_unflatten(leaves, _pytree.treespec_loads(text)) == made(dtype=torch.uint8)
    _, context = _pytree.tree_flatten(made(q_min=np.int64(-7), q_max=np.int16(7)))
    assert "[-7, 7, null]" in json.loads(_pytree.treespec_dumps(context))[1]["context"]
    for name in (
        "load",
        "ops",
        "nn",
        "strided",
        "__name__",
        "",
        "no dtype",
        3,
        True,
        [1],
        {"a": 1},
    ):
        with pytest.raises(
            ValueError, match=r"QuantizationParams: expected the name of a torch.dtype"
        ):
            params._context_of_text(json.dumps([-7, 7, name]))
