"""QuantizationParams as an object: equality, hash, moves, pickles of version 1, exported text."""

import base64
import copy
import dataclasses
import io
import itertools
import json
import pickle
import re
import zlib

import numpy as np
import pytest
import torch
from lib.cases import assert_same
from lib.functions import E8M0, F4, F8, F32, MODULES, P, X, of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

import quantkit
from quantkit import QuantizationParams, formats, params
from quantkit.formats import CODED_SCALES, FORMATS

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


# ---- parameters of version 2 -----------------------------------------------------------------------


def every_kind():
    """QuantizationParams of which no two are equal."""
    two = torch.ones(3, 2)
    yield from (P, of(dtype=torch.int8), of(compute_dtype=F32), of(round_first=True))
    yield from (
        of(dtype=torch.int4),
        of(dtype=F8),
        of(dtype=torch.uint16),
        of(dtype=torch.int8, compute_dtype=F32),
    )
    yield from (of(scale=torch.ones(()).to(d), dtype=F4) for d in (E8M0, F8, F32))
    yield of(scale=torch.full((), 2.0).to(E8M0), dtype=F4)
    yield of(scale=two.to(F8), dtype=F4, block_size=(1, 16), global_scale=torch.ones(()))
    for fields in (
        {"global_scale": torch.ones(())},
        {"global_scale": 2.0},
        {"block_size": (1, 4), "compute_dtype": F32},
    ):
        yield of(scale=two, zero_point=two, **fields)
    yield of(scale=two, zero_point=two, block_size=(1, -1), compute_dtype=F32)


def is_version_1(p):
    return (
        p.compute_dtype is None
        and p.global_scale is None
        and not p.round_first
        and (p.dtype in (None, *(f.dtype for f in formats.VERSION_1)))
    )


def test_equal_where_all_fields_are():
    for (i, a), (j, b) in itertools.product(enumerate(every_kind()), enumerate(every_kind())):
        assert (a == b) is (i == j) and (a != b) is (i != j)
        assert i != j or hash(a) == hash(b)
    assert of(block_size=(1, -1)) == P  # left out by pytrees
    assert of(block_size=(1, -1), compute_dtype=F32) != of(compute_dtype=F32)
    assert of(block_size=[1, -1], compute_dtype=F32) == of(block_size=(1, -1), compute_dtype=F32)
    assert of(global_scale=2) == of(global_scale=torch.tensor(2.0, dtype=torch.float64))
    assert of(global_scale=2) != of(global_scale=torch.tensor(2.0))
    assert repr(of(block_size=(1, 2))).endswith(", block_size=(1, 2))")
    assert repr(P).count("=") == 4  # version 1's
    text = repr(of(scale=torch.ones(()).to(E8M0), dtype=F4, global_scale=2.0))
    assert "scale=tensor(1., dtype=torch.float8_e8m0fnu), " in text
    assert text.endswith(", dtype=torch.float4_e2m1fn_x2, global_scale=2.0)")
    few, many = torch.full((2, 4), 0.5), torch.ones(3, 3)
    assert "scale=tensor([[0.5000, 0.5000, 0.5000, 0.5000], [0.5000, " in repr(of(scale=few))
    text = "QuantizationParams(scale=tensor(..., size=(3, 3), dtype=torch.float32), zero_point="
    assert repr(of(scale=many)).startswith(text) and "\n" not in repr(of(scale=few))
    assert "scale=tensor(..., device='meta', size=(3, 3))" in repr(of(scale=many.to("meta")))
    assert "global_scale=tensor(..., size=(9,), dtype=torch.int64)" in repr(
        of(global_scale=torch.arange(9))
    )
    assert repr(of(dtype=torch.int4, compute_dtype=F32, round_first=True)).endswith(
        ", dtype=torch.int4, compute_dtype=torch.float32, round_first=True)"
    )


def test_pickles_pytrees_and_text():
    for p in every_kind():
        again = [copy.deepcopy(p)]
        if p.scale.dtype not in CODED_SCALES:  # of torch's own tensors pickle loads no float8
            protocols = range(2, pickle.HIGHEST_PROTOCOL + 1)
            again += [pickle.loads(pickle.dumps(p, protocol)) for protocol in protocols]
        assert all(a == p and a.block_size == p.block_size for a in again)
        file = io.BytesIO()
        torch.save(p, file)
        file.seek(0)
        assert torch.load(file, weights_only=True) == p
        leaves, context = _pytree.tree_flatten(p)
        assert len(leaves) == (2 if p.global_scale is None else 3)
        assert len(context.context) == (3 if is_version_1(p) else 6)
        again = _pytree.tree_unflatten(
            leaves, _pytree.treespec_loads(_pytree.treespec_dumps(context))
        )
        assert again == p
        assert again.block_size == (None if is_version_1(p) else p.block_size)
        keys, _ = _pytree.tree_flatten_with_path(p)
        names = [path[0].name for path, _ in keys]
        assert names == ["scale", "zero_point", "global_scale"][: len(names)]


@pytest.mark.parametrize(
    "context",
    [[-7, 7, "load", None, None, False], [-7, 7, None, [1.5], None, False], [-7, 7, None, 3, None, False],
     [-7, 7, None, None, "load", False], [-7, 7, None, None, None, "yes"], [-7, 7], [-7, 7, None, None],
     [-7, 7, "int8", None, None, False, 1]],
    ids=str,
)  # fmt: skip
def test_text_that_says_no_parameters(context):
    with pytest.raises((TypeError, ValueError)):
        params._context_of_text(json.dumps(context))


def test_to_a_device_takes_all_tensors():
    p = of(global_scale=torch.ones(()), block_size=(1, 2), compute_dtype=F32, round_first=True)
    p.scale = p.scale.to(F8)
    there = p.to("meta")
    assert all(t.device.type == "meta" for t in (there.scale, there.zero_point, there.global_scale))
    kept = ("block_size", "compute_dtype", "round_first", "dtype", "q_min")
    assert all(getattr(there, k) == getattr(p, k) for k in kept)


@MODULES
@pytest.mark.parametrize("dtype", [None, *(f.dtype for f in FORMATS)], ids=str)
def test_no_zero_point_is_0_in_float32_steps(m, dtype):
    f = next(f for f in FORMATS if dtype in (None, f.dtype))
    limits = {"dtype": dtype, "q_min": 0, "q_max": min(f.high, 7)}
    limits |= {} if f.has_zero_point else {"q_min": -f.high, "q_max": f.high}
    zero = of(compute_dtype=F32, **limits)
    none = dataclasses.replace(zero, zero_point=None)
    q = m.quantize_tensor(X, zero)
    assert_same(m.quantize_tensor(X, none), q)
    assert_same(m.dequantize_tensor(q, none), m.dequantize_tensor(q, zero))
    assert_same(m.fake_quantize(X, none), m.fake_quantize(X, zero))
    if dtype is None or dtype in [f.dtype for f in formats.VERSION_1]:
        none = dataclasses.replace(none, compute_dtype=None)
        for call in (m.quantize_tensor, m.dequantize_tensor, m.fake_quantize):
            text = "zero_point: expected a torch.Tensor or a number; None needs "
            text += "compute_dtype=torch.float32, got NoneType"
            with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
                call(X, none)
