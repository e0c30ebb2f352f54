"""Compiled, exported, packaged and traced calls: the eager bits, one graph, no guard on data."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lib.backends import daily
from lib.bad import arguments_of, outs_of
from lib.cases import FLOATS, assert_same, given, microscaled, values
from torch._dynamo.utils import counters

import quantkit
from quantkit import operators, reference
from quantkit.operators import OPERATORS, overloads

ROOT = Path(__file__).resolve().parent.parent
ops = torch.ops.quantkit
pytestmark = pytest.mark.fallback


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def everything(x, joins=True):
    q, x_hat, p = quantkit.quantize_dequant(x, True, sym=False)
    q2, p2 = quantkit.dynamic_quantize(x, block_size=[1, 2], dtype=torch.uint8)
    p3 = quantkit.get_symmetric_qparams(x, True, -1)
    p4 = quantkit.get_asymmetric_qparams(x, include_zero=True)
    y = quantkit.dequantize_tensor(quantkit.quantize_tensor(x, p3), p4)
    results = q, x_hat, p.scale, p.zero_point, q2, p2.scale, p2.zero_point, y
    results += (*quantkit.aminmax(x, block_size=[-1, 3]), quantkit.fake_quantize(x, p))
    wide = quantkit.get_symmetric_qparams(x, True, compute_dtype=torch.float32)
    limbs = quantkit.measure_limbs(x, wide, over=[1, -1])
    joined = quantkit.join_measures(*limbs) if joins else ()
    return *results, *quantkit.measure(x, wide), *joined


class Everything(torch.nn.Module):
    def forward(self, x):
        return everything(x)


class Stochastic(torch.nn.Module):
    def forward(self, x, seed):
        q, p = quantkit.dynamic_quantize(x, block_size=[1, -1], dtype="int4", seed=seed)
        return q, quantkit.fake_quantize(x, p, seed=seed + 1)


class Microscaled(torch.nn.Module):
    def forward(self, x):
        return microscaled(x)


# Not (2, 2): one column of blocks is another case for torch, which takes sizes of 1 for fixed.
SHAPES = [
    (4, 6),
    (9, 8),
    (33, 130),
    (2, 12),
    (5, 64),
    (64, 4),
    (7, 14),
    (128, 10),
    (3, 300),
    (81, 20),
]


@pytest.mark.parametrize("dtype", daily(FLOATS, torch.bfloat16), ids=str)
def test_one_graph_serves_ten_shapes(dtype):
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True, dynamic=True)
    counters.clear()
    for shape in SHAPES:
        x = values(shape, dtype, shape[0])
        assert_same(compiled(x), everything(x))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.full
def test_shapes_that_change_compile_twice_at_most():
    """Without dynamic=True torch first takes a shape for fixed, then for free."""
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    counters.clear()
    for shape in SHAPES:
        x = values(shape, torch.float32)
        assert_same(compiled(x), everything(x))
    assert counters["stats"]["unique_graphs"] == 2


def test_sizes_of_x_as_blocks_compile_for_each_shape_and_minus_one_once():
    def per_row(x, whole):
        return quantkit.dynamic_quantize(x, block_size=[1, whole or x.shape[1]])[0]

    compiled = torch.compile(per_row, fullgraph=True, dynamic=True, backend="eager")
    sizes = range(20, 20 + torch._dynamo.config.recompile_limit)
    for n in sizes:
        compiled(torch.randn(4, n), 0)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiled(torch.randn(4, 99), 0)
    torch._dynamo.reset()
    counters.clear()
    for n in (*sizes, 99):
        compiled(torch.randn(4, n), -1)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("mode", daily(["default", "reduce-overhead"], "default"))
@pytest.mark.parametrize("dtype", daily([torch.float32, torch.bfloat16], torch.float32), ids=str)
def test_inductor_gives_the_eager_bits(dtype, mode):
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, mode=mode)
    for shape in SHAPES[:3]:
        x = values(shape, dtype, shape[0])
        with torch.no_grad():
            assert_same(compiled(x), everything(x))


@pytest.mark.parametrize("dtype", daily([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
def test_compiled_gradient_gives_the_eager_bits(dtype):
    def loss(x, scale, zero_point):
        p = quantkit.QuantizationParams(scale, zero_point, -20, 20)
        return (quantkit.fake_quantize(x * 2, p) * x).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for shape in ((4, 6), (7, 12)):
        scale, zero_point = given(shape, [1, -1], dtype)
        grads = []
        for function in (loss, compiled):
            x = values(shape, dtype, 3).requires_grad_()
            function(x, scale, zero_point).backward()
            grads.append(x.grad)
        assert_same(grads[1], grads[0])


def test_out_overload_in_a_graph():
    x, (scale, zero_point) = values((4, 6), torch.float32), given((4, 6), None, torch.float32)

    def into(x, out):
        ops.quantize.out(x, scale, zero_point, -128, 127, torch.int8, out=out)
        return out + 0

    out = torch.zeros(4, 6, dtype=torch.int8)
    result = torch.compile(into, fullgraph=True)(x, out)
    expected = reference.quantize_op(x, scale, zero_point, -128, 127, torch.int8)
    assert_same(result, expected)
    assert_same(out, expected)


# ---- export ---------------------------------------------------------------------------------------

RUN_EXPORTED = """
import torch, quantkit
assert quantkit.backend().extension == EXTENSION
module = torch.export.load(FILE).module()
torch.save(module(torch.load(FILE + ".x")), FILE + ".y")
"""


@pytest.mark.filterwarnings("ignore")
def test_exported_program_runs_in_a_new_process(tmp_path, torch_process):
    free = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Everything(), (values((4, 6), torch.float32),), dynamic_shapes=(free,)
    )
    names = {str(node.target) for node in program.graph.nodes if "quantkit" in str(node.target)}
    assert "quantkit.fake_quantize.default" in names  # public names: a graph may be read by others
    assert not any("._" in name for name in names)
    x = values((9, 30), torch.float32, 4)
    expected = everything(x)
    assert_same(program.module()(x), expected)

    file = str(tmp_path / "program.pt2")
    torch.export.save(program, file)
    torch.save(x, f"{file}.x")
    has = quantkit.backend().extension
    done = torch_process.run(
        f"FILE, EXTENSION = {file!r}, {has}\n{RUN_EXPORTED}",
        ROOT,
        **({} if has else {"QUANTKIT_REFERENCE": "1"}),
    )
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(f"{file}.y"), expected)


# torch 2.10 looks for the module codecache and does not import it.
RUN_PACKAGE = """
import sys, torch, torch._inductor.codecache, quantkit
model = torch._inductor.aoti_load_package(sys.argv[1])
x = torch.load(sys.argv[1] + ".x")
torch.save(model(*x), sys.argv[1] + ".y")
"""


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model", [Everything(), Microscaled(), Stochastic()], ids=lambda m: type(m).__name__
)
def test_aot_inductor_package(tmp_path, model):
    free = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim.DYNAMIC}
    example, x = ((values(size, torch.bfloat16, 4),) for size in ((40, 60), (9, 30)))
    if isinstance(model, Stochastic):
        example, x = (*example, torch.tensor([0, 0])), (*x, torch.tensor([-5, 2**40]))
    shapes = (free, None)[: len(x)]
    program = torch.export.export(model, example, dynamic_shapes=shapes)
    file = str(tmp_path / "model.pt2")
    if operators._AOT_CHANGES_DTYPES and not isinstance(model, Stochastic):  # it passes no dtype
        with pytest.raises(Exception, match=r"AOTInductor before torch 2\.12 changes the dtype"):
            torch._inductor.aoti_compile_and_package(program, package_path=file)
        return
    torch._inductor.aoti_compile_and_package(program, package_path=file)
    expected = model(*x)
    torch.save(x, f"{file}.x")
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN_PACKAGE, file], check=True)
    made = torch.load(f"{file}.y")
    for ours, theirs in zip(made, expected, strict=True):
        assert_same(ours, theirs)


def test_an_aot_inductor_that_changes_dtypes_meets_a_refusal_in_every_operator_with_one(
    monkeypatch,
):
    from torch._inductor.virtualized import V

    refused = []
    for name in OPERATORS:
        arguments, outs = arguments_of(name), outs_of(name)
        far = {k: a.to("meta") if isinstance(a, torch.Tensor) else a for k, a in arguments.items()}
        functional, out = overloads(name)
        calls = [(functional, {}), (out, {k: t.to("meta") for k, t in outs.items()})]
        for operator, outs in calls:
            with V.set_aot_compilation(True):
                monkeypatch.setattr(operators, "_AOT_CHANGES_DTYPES", False)
                operator(**far, **outs)
                monkeypatch.setattr(operators, "_AOT_CHANGES_DTYPES", True)
                if not any(isinstance(a, torch.dtype) for a in far.values()):
                    operator(**far, **outs)
                    continue
                with pytest.raises(RuntimeError, match=r"AOTInductor before torch 2\.12"):
                    operator(**far, **outs)
                refused.append(operator)
    # Those of version 1 that take a dtype, and the .format ones with an output_dtype.
    assert len(refused) == 2 * (3 + 2)


# ---- fake tensors, transforms, modes --------------------------------------------------------------


def test_symbolic_sizes_stay_free():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    env, x = ShapeEnv(), torch.randn(12, 34)
    free = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FakeTensorMode(shape_env=env) as mode:
            for result in everything(mode.from_tensor(x, symbolic_context=free)):
                for size in result.shape:
                    assert isinstance(size, torch.SymInt) or size == 1
    assert not env.replacements  # no symbol became a number or another symbol
    # What block_size asks of x: that 2 divides its columns.
    guards = {str(guard.expr) for guard in env.guards}
    assert all("Mod(" in g or ">" in g or "Ne(" in g for g in guards), guards


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vmap_is_the_loop_over_samples(dtype):
    x = values((3, 4, 6), dtype, 1)
    joins = torch.__version__ >= (2, 13)  # older ones have no batching rule of Tensor.view(dtype)
    expected = [everything(each, joins) for each in x]
    for i, result in enumerate(torch.vmap(lambda x: everything(x, joins))(x)):
        assert_same(result.contiguous(), torch.stack([e[i] for e in expected]))
    scales = torch.rand(3) + 0.1

    def each(x, scale):
        return quantkit.quantize_tensor(x, quantkit.QuantizationParams(scale, scale * 0, -8, 7))

    for dims in ((0, 0), (2, 0), (None, 0)):
        sample = x if dims[0] is not None else x[0]
        sample = sample.movedim(0, dims[0]) if dims[0] else sample
        loop = [each(x[i] if dims[0] is not None else x[0], scales[i]) for i in range(3)]
        assert_same(torch.vmap(each, in_dims=dims)(sample, scales).contiguous(), torch.stack(loop))


def test_deterministic_mode_changes_nothing():
    x = values((40, 60), torch.float32, special=True)
    expected = everything(x)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(everything(x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_out_inside_a_graph_of_autograd_is_refused(backend):
    """Written there it would keep a history that is no longer its own."""
    c, p = torch.randn(4), (torch.tensor(0.1), torch.tensor(0.0), -8, 7)

    def function(x):
        y = x * 3
        ops.fake_quantize.out(c, *p, out=y)
        return y.sum()

    with pytest.raises(RuntimeError, match="out: expected a tensor outside of autograd's graphs"):
        torch.compile(function, fullgraph=True, backend=backend)(torch.ones(4, requires_grad=True))


def test_sizes_that_depend_on_data():
    """Of those that a mask leaves no compiler knows whether they are 0 or 1."""
    p = quantkit.QuantizationParams(torch.rand(1, 6) + 0.1, torch.zeros(1, 6), -8, 7)

    def function(x, mask):
        some = x[mask]
        q, q_params = quantkit.dynamic_quantize(some, True)
        return q, q_params.scale, quantkit.quantize_tensor(some, p), quantkit.fake_quantize(some, p)

    x, mask = values((9, 6), torch.float32), torch.arange(9) % 3 != 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x, mask), function(x, mask))
        assert_same(compiled(x, ~mask), function(x, ~mask))


@pytest.mark.filterwarnings("ignore")
def test_traced_graphs_keep_the_gradient():
    p = quantkit.QuantizationParams(torch.tensor(0.1), torch.tensor(0.0), -8, 7)
    traced = torch.jit.trace(lambda x: quantkit.fake_quantize(x, p), (torch.randn(5),))
    x = torch.linspace(-1, 1, 5, requires_grad=True)
    traced(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


class WithParameters(torch.nn.Module):
    """QuantizationParams come in and go out."""

    def forward(self, x, p):
        _, chosen = quantkit.dynamic_quantize(x, True, dtype=torch.uint8)
        return quantkit.quantize_tensor(x, p), chosen


@pytest.mark.filterwarnings("ignore")
def test_parameters_cross_the_border_of_exported_programs(tmp_path):
    x = values((4, 6), torch.float32)
    p = quantkit.QuantizationParams(*given((4, 6), [1, -1], torch.float32), -8, 7)
    q, chosen = WithParameters()(x, p)
    program = torch.export.export(WithParameters(), (x, p))
    torch.export.save(program, tmp_path / "program.pt2")
    for made in (program.module(), torch.export.load(tmp_path / "program.pt2").module()):
        q2, chosen2 = made(x, p)
        assert_same((q2, chosen2.scale, chosen2.zero_point), (q, chosen.scale, chosen.zero_point))
        assert isinstance(chosen2, quantkit.QuantizationParams)
        assert (chosen2.q_min, chosen2.q_max, chosen2.dtype) == (0, 255, torch.uint8)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_parameters_under_vmap():
    x = values((3, 4, 6), torch.float32)
    _, chosen = torch.vmap(lambda each: quantkit.dynamic_quantize(each, True))(x)
    assert chosen.scale.shape == (3, 4, 1) and chosen.q_max == 127
    codes = torch.vmap(quantkit.quantize_tensor)(x, chosen)
    expected = [
        reference.quantize_tensor(each, reference.get_symmetric_qparams(each, True)) for each in x
    ]
    assert_same(codes.contiguous(), torch.stack(expected))
