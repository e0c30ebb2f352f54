"""No elements: where no block exists nothing is chosen; a block without elements has no parameters."""

import itertools

import pytest
import torch
from lib.cases import (
    FLOATS,
    argument_names,
    arguments,
    assert_same,
    assert_same_kind,
    check_results,
    flat,
    invoke,
    on_meta,
    ops,
    takes_format,
)
from torch._dynamo.utils import counters

import quantkit
from quantkit import reference
from quantkit.operators import OPERATORS, overloads

pytestmark = pytest.mark.fallback
CHOOSERS = [n for n in OPERATORS if n == "aminmax" or "eps" in argument_names(n)[0]]
# x's shape, block_size, and scale's shape: None where a block without elements exists.
CASES = [
    ((0, 8), [1, -1], (0, 1)),
    ((0, 8), [1, 4], (0, 2)),
    ((0, 8), [3, 8], (0, 1)),
    ((8, 0), [-1, 1], (1, 0)),
    ((0, 0), [1, -1], (0, 1)),
    ((0, 0), [-1, 2], (1, 0)),
    ((0,), [1], (0,)),
    ((2, 0, 3), [1, 5, -1], (2, 0, 1)),
    ((2, 0, 3), [1, 1, 1], (2, 0, 3)),
    ((0,), None, None),
    ((0, 8), None, None),
    ((0,), [-1], None),
    ((0, 8), [-1, 1], None),
    ((8, 0), [1, -1], None),
    ((0, 0), [-1, -1], None),
    ((2, 0, 3), [2, -1, 3], None),
]
WITHOUT = (
    "x: expected at least one element to choose parameters from, got an empty tensor of shape "
)


def test_choosers_without_blocks(backend):
    """Every operator, its `out` overload and its fake kernel say what the reference says."""
    dtypes = (*FLOATS, torch.int8)
    for (shape, blocks, expected), name in itertools.product(CASES, CHOOSERS):
        for dtype in dtypes if shape == (0, 8) else dtypes[:1]:
            turn = 4 if dtype.itemsize < 3 or takes_format(name) else 5
            args = arguments(name, torch.zeros(shape, dtype=dtype), blocks, turn)
            function, fake, meta = OPERATORS[name].reference, overloads(name)[0], on_meta(args)
            if expected is None:
                for call, given in ((getattr(ops, name), args), (function, args), (fake, meta)):
                    with pytest.raises((RuntimeError, ValueError)) as refused:
                        invoke(call, given)
                    assert str(refused.value) == f"{WITHOUT}{shape}"
                continue
            right = invoke(function, args)
            check_results(name, args, right, "contiguous")
            made = flat(invoke(fake, meta))
            for result, kind, t in zip(OPERATORS[name].results, flat(right), made, strict=True):
                assert kind.shape == (shape if result in ("q", "x_hat") else expected)
                assert_same_kind(t, torch.empty_like(kind, device="meta"))


def test_functions_are_no_operation():
    """An idle expert, or a rank without tokens."""
    x = torch.zeros(0, 8, requires_grad=True)
    for module in (quantkit, reference):
        for sym, dtype in ((True, torch.int8), (False, torch.int16)):
            q, x_hat, p = module.quantize_dequant(x, True, dtype=dtype, sym=sym)
            assert q.shape == x_hat.shape == (0, 8) and q.dtype == p.dtype == dtype
            assert p.scale.shape == p.zero_point.shape == (0, 1)
            assert not q.requires_grad and not x_hat.requires_grad and not p.scale.requires_grad
            assert module.dynamic_quantize(x, block_size=[1, 2], sym=sym)[1].scale.shape == (0, 4)
            assert module.dequantize_tensor(module.quantize_tensor(x, p), p).shape == (0, 8)
            module.fake_quantize(x, p).sum().backward()
            assert x.grad.shape == (0, 8)
        for choose in (module.get_symmetric_qparams, module.get_asymmetric_qparams):
            assert choose(x, True).scale.shape == module.aminmax(x, True)[0].shape == (0, 1)
            with pytest.raises(ValueError, match="at least one element"):
                choose(x, True, 1)


def chosen(x):
    q, x_hat, p = quantkit.quantize_dequant(x, True)
    grouped, p_grouped = quantkit.dynamic_quantize(x, block_size=[1, 2], sym=False)
    again = quantkit.fake_quantize(x, p)
    return q, x_hat, p.scale, p.zero_point, grouped, p_grouped.scale, again


@pytest.mark.filterwarnings("ignore")
def test_one_graph_serves_no_rows_too():
    """Rows that a mask leaves, unbacked ones, and an exported program's."""
    x = torch.randn(6, 8)
    masks = [torch.arange(6) < n for n in (4, 0, 1, 6)]
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        of_mask = torch.compile(lambda x, m: chosen(x[m]), fullgraph=True, backend="aot_eager")
        for mask in masks:
            assert_same(of_mask(x, mask), chosen(x[mask]))
    assert counters["stats"]["unique_graphs"] == 1

    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
    for rows in (4, 0, 1, 6):
        some = x[:rows].clone()
        torch._dynamo.decorators.mark_unbacked(some, 0)
        assert_same(compiled(some), chosen(some))

    class Chosen(torch.nn.Module):
        def forward(self, x):
            return chosen(x)

    free = {"x": {0: torch.export.Dim("rows", min=0, max=64), 1: torch.export.Dim.STATIC}}
    program = torch.export.export(Chosen(), (x,), dynamic_shapes=free).module()
    for rows in (0, 5):
        assert_same(program(x[:rows]), chosen(x[:rows]))


def test_compiled_with_dynamic_rows():
    torch._dynamo.reset()
    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 6, 0, 1, 0, 5):
        x = torch.randn(rows, 8)
        assert_same(compiled(x), chosen(x))
    with pytest.raises(Exception, match="at least one element"):
        torch.compile(quantkit.quantize_dequant, fullgraph=True, backend="aot_eager")(x[:0])
