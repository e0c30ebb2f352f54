"""Arguments that are numbers of numpy, and numbers as parameters, whatever the default device."""

import numpy as np
import pytest
import torch
from lib.cases import assert_same

import quantkit
from quantkit import QuantizationParams, reference

pytestmark = pytest.mark.fallback
MODULES = (quantkit, reference)
X = torch.randn(4, 6)


def results(module, x, flag, integer, number, blocks):
    """Every argument that is a number, each once at least; tensors and the types of limits."""
    limits = {"q_min": integer(-100), "q_max": integer(90)}
    p = module.get_symmetric_qparams(x, flag(True), integer(-1), eps=number(0.5), **limits)
    yield p.scale
    p2 = module.get_asymmetric_qparams(x, eps=number(0.25), include_zero=flag(True), **limits)
    q, x_hat, p3 = module.quantize_dequant(x, sym=flag(False), block_size=blocks, **limits)
    yield from (p2.scale, p2.zero_point, q, x_hat, p3.scale)
    q, p4 = module.dynamic_quantize(x, flag(True), integer(0), sym=flag(True), eps=number(2))
    yield from (q, p4.scale)
    for chosen in (p, p2, p3, p4):
        assert type(chosen.q_min) is type(chosen.q_max) is int
    given = QuantizationParams(number(0.5), integer(3), integer(0), integer(100))
    yield module.quantize_tensor(x, given)
    yield module.dequantize_tensor(q, given)
    yield module.fake_quantize(x, given)


def test_numbers_of_numpy():
    kinds = [(np.bool_, i, f) for i in (np.int64, np.int8) for f in (np.float16, np.float32)]
    kinds += [(np.bool_, np.int32, np.float64), (np.bool_, np.longlong, np.longdouble)]
    for module in MODULES:
        right = tuple(results(module, X, bool, int, float, [2, -1]))
        for flag, integer, number in kinds:
            for blocks in ([integer(2), -1], (np.uint8(2), integer(-1))):
                assert_same(tuple(results(module, X, flag, integer, number, blocks)), right)
        assert_same(module.get_symmetric_qparams(X, eps=np.int64(3)).scale, torch.tensor(3.0))
        assert_same(module.get_symmetric_qparams(X / 9, eps=np.True_).scale, torch.tensor(1.0))
        assert module.get_symmetric_qparams(X, np.int8(1)).scale.shape == (4, 1)


def test_what_numpy_has_beside_numbers_is_refused():
    wrong = {
        "per_channel": (np.float32(1), np.str_("a"), np.array([True, False]), np.complex64(1)),
        "eps": (np.complex64(1), np.str_("1"), np.bytes_(b"1"), np.array([0.5]), np.datetime64(1, "s")),
        "sym": (np.float64(1), np.array([True, True]), np.void(b"1")),
        "q_min": (np.float32(-5), np.array([1, 2]), np.str_("1")),
        "channel_dim": (np.float64(0), np.array([0, 1]), np.timedelta64(1, "s")),
        "block_size": (np.array([2, 2]), [np.float32(2), 2], np.int64(2), [np.timedelta64(2), 2]),
    }  # fmt: skip
    for module in MODULES:
        for name, values in wrong.items():
            for value in values:
                channels = {"per_channel": True} if name == "channel_dim" else {}
                with pytest.raises(TypeError, match=f"{name}.*: expected "):
                    module.dynamic_quantize(X, **(channels | {name: value}))
        with pytest.raises(IndexError, match=r"channel_dim: expected a value in .* got 2$"):
            module.dynamic_quantize(X, True, np.int64(2))
        with pytest.raises(
            TypeError, match=r"scale: expected a torch.Tensor or a number, got complex64"
        ):
            module.quantize_tensor(X, QuantizationParams(np.complex64(1), 0, 0, 1))


def test_compiled_with_numbers():
    """Sizes, numbers and conditions that are symbols in a graph, and numpy's that it closes over."""
    torch._dynamo.reset()
    one, flag, small = np.int64(1), np.bool_(True), np.float32(0.5)

    def function(x, eps, low):
        rows, columns = x.shape
        q, p = quantkit.dynamic_quantize(x, block_size=[1, -1], eps=eps, sym=rows > 1, q_min=low)
        q2, p2 = quantkit.dynamic_quantize(x, rows < columns, rows - rows - 1, eps=eps)
        return q, p.scale, q2, p2.scale

    def closes_over_numpy(x):
        q, p = quantkit.dynamic_quantize(x, flag, one, eps=small, block_size=None)
        return q, p.scale, quantkit.quantize_tensor(x, QuantizationParams(small, one, -5, 5))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, eps, low in ((4, 0.5, -5), (3, 0.25, -7)):
        assert_same(compiled(X[:rows], eps, low), function(X[:rows], eps, low))
    compiled = torch.compile(closes_over_numpy, backend="aot_eager")
    assert_same(compiled(X), closes_over_numpy(X))


def test_numbers_are_on_the_cpu_whatever_the_default_device():
    p = QuantizationParams(0.5, 3, -128, 127)
    for module in MODULES:
        calls = (
            lambda m=module: m.quantize_tensor(X, p),
            lambda m=module: m.dequantize_tensor(X.to(torch.int8), p),
            lambda m=module: m.fake_quantize(X, p),
            lambda m=module: m.quantize_dequant(X)[1],
        )
        for call in calls:
            right = call()
            with torch.device("meta"):
                assert_same(call(), right)
            torch.set_default_device("meta")
            try:
                assert_same(call(), right)
            finally:
                torch.set_default_device(None)
