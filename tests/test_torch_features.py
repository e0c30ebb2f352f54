"""Torch's other features: tracing, functionalization, memory formats, modes, odd kinds of tensors."""

import copy
import dataclasses
import io
import sys
import warnings

import numpy as np
import pytest
import torch
from lib.cases import assert_same, ops, values
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import quantkit
from quantkit import QuantizationParams, reference

pytestmark = [pytest.mark.fallback, pytest.mark.filterwarnings("ignore")]
X = values((4, 6), torch.float32, 1)
P = reference.get_asymmetric_qparams(X, True)
Q, X_HAT, _ = reference.quantize_dequant(X, True, sym=False)
GIVEN = (P.scale, P.zero_point, -128, 127)


def results(x, p=P):
    q, x_hat, chosen = quantkit.quantize_dequant(x, True, sym=False)
    y = quantkit.fake_quantize(x, p)
    return q, x_hat, chosen.scale, quantkit.quantize_tensor(x, p), y


EXPECTED = results(X)


def into(x):
    """Writes into one part of memory of its own."""
    whole = torch.zeros(2, 4, 6)
    torch.ops.quantkit.fake_quantize.out(x, *GIVEN, out=whole[1])
    return whole * 1


def holds(x=X, expected=EXPECTED):
    assert_same(results(x), expected)


# ---- tracing --------------------------------------------------------------------------------------


def test_make_fx():
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda x, p: results(x, p), tracing_mode=mode)(X, P)
        assert "quantkit" in graph.code and "torch.ops.aten.div" not in graph.code
        assert_same(tuple(graph(X, P)), EXPECTED)
        if mode == "symbolic":
            more = values((9, 6), torch.float32, 2)
            p = reference.get_asymmetric_qparams(more, True)
            assert_same(tuple(graph(more, p)), results(more, p))
    graph = make_fx(into)(X)
    assert "fake_quantize.out" in graph.code
    assert_same(graph(X), into(X))


def test_functionalize():
    def mutates(x):
        y = x.clone()
        made = results(y)
        y.mul_(2)
        return made

    assert_same(torch.func.functionalize(mutates)(X), EXPECTED)
    # torch.func knows no operator that writes to an argument; the compiler and the exporter do.
    with pytest.raises(RuntimeError, match="Found a custom"):
        torch.func.functionalize(into)(X)
    assert_same(torch.compile(into, fullgraph=True, backend="aot_eager")(X), into(X))


class Into(torch.nn.Module):
    def forward(self, x):
        return *results(x), into(x)


def test_run_decompositions():
    program = torch.export.export(Into(), (X,)).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes}
    assert "quantkit.quantize_dequantize.default" in targets
    assert_same(program.module()(X), (*EXPECTED, into(X)))


def test_compiled_functions_that_change_their_arguments():
    def function(x, p):
        p.scale.mul_(2)
        x.mul_(3)
        made = results(x, p)
        chosen = quantkit.get_symmetric_qparams(x, True)
        chosen.q_max, chosen.scale = 100, chosen.scale * 2
        x.add_(1)
        moved = dataclasses.replace(chosen, q_min=-3).to(x.device)
        return *made, quantkit.quantize_tensor(x, chosen), quantkit.quantize_tensor(x, moved)

    kept = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        x, p = X.clone(), copy.deepcopy(P)
        kept.append((*call(x, p), x, p.scale))
    assert_same(*kept)


def test_conditions_and_loops_of_graphs():
    def function(x):
        return torch.cond(
            x.sum() > 0, lambda x: quantkit.fake_quantize(x, P), lambda x: results(x)[1] + 0, (x,)
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x in (X, -X):
        assert_same(compiled(x), function(x))


# ---- layouts and values ---------------------------------------------------------------------------


def test_channels_last_3d(backend):
    x = values((2, 3, 4, 2, 6), torch.float32).contiguous(memory_format=torch.channels_last_3d)
    for blocks in (None, [1, -1, -1, -1, -1], [-1, 1, -1, -1, -1], [1, 3, 2, 2, 3]):
        args = (x, blocks, -128, 127, 1e-8, False, torch.int8)
        made, right = ops.quantize_dequantize(*args), reference.quantize_dequantize_op(*args)
        assert_same(made, right)
        assert all(t.is_contiguous(memory_format=torch.channels_last_3d) for t in made[:2])
        fake = (x, *right[2:], -100, 100)
        assert_same(ops.fake_quantize(*fake), reference.fake_quantize_op(*fake))


def test_more_dimensions_than_torchs_operators_have():
    for rank in (64, 70):
        x = X.flatten()[:3].view((1,) * (rank - 1) + (3,))
        for blocks in ([-1] * rank, [1] * rank):
            made, right = (
                m.dynamic_quantize(x, block_size=blocks) for m in (quantkit, reference)
            )  # fmt: skip
            assert_same(made[0], right[0])
            assert made[1] == right[1]


# ---- modes ----------------------------------------------------------------------------------------


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class PassesFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("module", [quantkit, reference])
def test_modes_change_nothing(module):
    def made():
        q, x_hat, p = module.quantize_dequant(X, True, sym=False)
        number = module.quantize_tensor(X, QuantizationParams(0.1, 3, -8, 7))
        codes = module.quantize_dequant(torch.arange(6, device="cpu"))[2].scale
        y = module.fake_quantize(X, P)
        return q, x_hat, p.scale, number, codes, y

    right = made()
    modes = (
        torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16),
        torch.device("meta"), torch.autograd.detect_anomaly(), torch.profiler.profile(),
        torch.autograd.graph.save_on_cpu(), Passes(), PassesFunctions(),
    )  # fmt: skip
    for mode in modes:
        with mode:
            found = made()
        assert_same(tuple(t.clone() for t in found), right)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert_same(made(), right)
        finally:
            torch.set_default_dtype(torch.float32)


def test_gradients_through_checkpoints_and_hooks():
    def loss(w):
        return (quantkit.fake_quantize(w * 2, P) * w).sum()

    def gradient(call):
        w = X.clone().requires_grad_()
        call(w).backward()
        return w.grad

    right = gradient(loss)
    for reentrant in (True, False):
        assert_same(gradient(lambda w, r=reentrant: checkpoint(loss, w, use_reentrant=r)), right)
    hooks = torch.autograd.graph.saved_tensors_hooks
    for mode in (
        torch.autograd.graph.save_on_cpu(),
        hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy),
    ):

        def packed(w, mode=mode):
            with mode:
                return loss(w)

        assert_same(gradient(packed), right)


# ---- kinds of tensors -----------------------------------------------------------------------------


class Plain(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = [a.inner if isinstance(a, Wrapper) else a for a in args]
        return function(*args, **(kwargs or {}))


def test_kinds_of_tensors():
    read_only = X.numpy().copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = torch.from_numpy(read_only)
    with torch.inference_mode():
        inference = X.clone()
    holds(frozen)
    assert np.array_equal(read_only, X.numpy())
    for kind in (inference, Wrapper(X), torch.nn.Parameter(X.clone())):
        found = tuple(t.detach() for t in results(kind))
        assert all(type(t) is torch.Tensor for t in found)
        assert_same(found, EXPECTED)
    plain = results(X.as_subclass(Plain))
    assert all(type(t) is Plain for t in plain[-2:])  # as of torch's own operators
    assert_same(tuple(t.as_subclass(torch.Tensor) for t in plain), EXPECTED)


def test_files_that_are_mapped(tmp_path):
    torch.save({"x": X, "p": P}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", mmap=True, weights_only=True)
    holds(loaded["x"])
    assert loaded["p"] == P
    file = io.BytesIO()
    torch.save(P, file)
    file.seek(0)
    assert torch.load(file, map_location="meta", weights_only=True).scale.device.type == "meta"


def test_parameters_of_a_derived_class_keep_its_fields():
    @dataclasses.dataclass(eq=False)
    class Named(QuantizationParams):
        name: str = dataclasses.field(default="", kw_only=True)

    p = Named(P.scale, P.zero_point, -128, 127, name="weight")
    moved = p.to("meta")
    assert type(moved) is Named and moved.name == "weight" and moved.scale.device.type == "meta"
    assert_same(quantkit.quantize_tensor(X, p), quantkit.quantize_tensor(X, P))


def test_the_onnx_table_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxscript.*pip install onnxscript"):
        quantkit.onnx.translation_table()
