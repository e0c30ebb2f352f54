"""What torch.onnx.export writes by quantkit.onnx, in ONNX Runtime: quantkit's bits."""

import contextlib
import ctypes
import io
import math
import re
import warnings

import numpy as np
import pytest
import torch
from lib.rivals import PAGE

import quantkit
from quantkit import QuantizationParams
from quantkit.formats import OF_NAME

onnx = pytest.importorskip("onnx", reason="make rivals-test")
onnxruntime = pytest.importorskip("onnxruntime", reason="make rivals-test")
pytest.importorskip("onnxscript", reason="make rivals-test")

F8, F32 = torch.float8_e4m3fn, torch.float32
LEVELS = onnxruntime.GraphOptimizationLevel
NUMPY = {3: torch.int8, 2: torch.uint8, 5: torch.int16, 4: torch.uint16, 1: F32, 11: torch.float64,
    17: F8, 19: torch.float8_e5m2, 10: torch.float16, 16: torch.bfloat16}  # fmt: skip


class Call(torch.nn.Module):
    """A function of a tensor as a module; parameters are its buffers, or constants."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        def flat(results):
            for r in results if isinstance(results, (tuple, list)) else [results]:
                if isinstance(r, QuantizationParams):
                    yield from (r.scale, r.zero_point)
                else:
                    yield r

        return tuple(flat(self.function(*args)))


def written(function, *args, qdq=False, dynamic=None, optimize=True, opset=None):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Call(function).eval(), args, dynamo=True, verbose=False, optimize=optimize,
            dynamic_shapes=dynamic, opset_version=opset,
            custom_translation_table=quantkit.onnx.translation_table(qdq=qdq),
        )  # fmt: skip
    file = io.BytesIO()
    onnx.save(program.model_proto, file)
    onnx.checker.check_model(program.model_proto)
    return file.getvalue()


def kinds(model):
    return {node.op_type for node in onnx.load_from_string(model).graph.node}


def run(model, *args, level=LEVELS.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    graph = onnx.load_from_string(model).graph
    kind = [o.type.tensor_type.elem_type for o in graph.output]
    feeds = {}
    for i, x in zip(session.get_inputs(), args, strict=True):
        if x.dtype in (torch.bfloat16, F8, torch.float8_e5m2):
            as_int = torch.int16 if x.dtype == torch.bfloat16 else torch.uint8
            number = next(n for n, d in NUMPY.items() if d == x.dtype)
            feeds[i.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                x.contiguous().view(as_int).numpy(), number
            )
        else:
            feeds[i.name] = onnxruntime.OrtValue.ortvalue_from_numpy(x.contiguous().numpy())
    results = session.run_with_ort_values([o.name for o in session.get_outputs()], feeds)
    return [of_memory(v, NUMPY[k]) for v, k in zip(results, kind, strict=True)]


def of_memory(value, dtype):
    size = int(np.prod(value.shape())) * dtype.itemsize
    data = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    t = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if size
        else torch.empty(0, dtype=torch.uint8)
    )
    return t.view(dtype).view(value.shape())


def same(ours, theirs):
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    wide = ours.dtype.is_floating_point and ours.dtype.itemsize > 1
    if wide:  # of NaNs no contract says the sign or the payload
        assert torch.equal(ours.isnan(), theirs.isnan())
        ours, theirs = (torch.where(t.isnan(), torch.zeros_like(t), t) for t in (ours, theirs))
    bits = [t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (ours, theirs)]
    differ = int((bits[0] != bits[1]).sum())
    assert differ == 0, f"{differ} bytes differ: {ours} {theirs}"


def compare(
    function, *args, others=(), levels=(LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL), **options
):
    model = written(function, *args, **options)
    for inputs in (args, *others):
        with torch.no_grad():
            ours = Call(function)(*inputs)
        for level in levels:
            results = run(model, *inputs, level=level)
            assert len(ours) == len(results)
            for a, b in zip(ours, results, strict=True):
                same(a, b)
    return model


def numbers(*shape, seed=0, special=True):
    """Ties of scale 0.5, signed zeros, subnormals, large and small ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1)
    ties = torch.arange(-40, 40) * 0.25
    flat[1 : 1 + len(ties)] = ties
    some = [0.0, -0.0, 1e-40, -1e-40, 1e-8, 63.75, -64.25, 300.0, 448.0, 464.0, 464.1, -1e5]
    if special:
        some += [math.nan, -math.nan, math.inf, -math.inf]
    flat[100 : 100 + len(some)] = torch.tensor(some)
    return x


X = numbers(12, 64)
FINITE = numbers(12, 64, special=False)
INTEGERS = ["int8", "uint8", "int16", "uint16", "int4", "uint4", "int2", "uint2"]
FLOATS = ["float8_e4m3fn", "float8_e5m2"]


def parameters(f, shape=(), round_first=False, compute_dtype=F32, **options):
    generator = torch.Generator().manual_seed(1)
    scale = torch.full(shape, 0.5) * 2.0 ** torch.randint(-3, 3, shape, generator=generator)
    scale = torch.where(torch.rand(shape, generator=generator) < 0.5, scale * 1.1, scale)
    zero = torch.randint(f.low, f.high + 1, shape, generator=generator).float()
    zero = zero if f.has_zero_point else 0.0
    return QuantizationParams(
        scale, zero, f.low, f.high, dtype=f.dtype, round_first=round_first,
        compute_dtype=compute_dtype, **options,
    )  # fmt: skip


def both(x, *all_parameters):
    for p in all_parameters:
        q = quantkit.quantize_tensor(x, p)
        yield from (q, quantkit.dequantize_tensor(q, p), quantkit.fake_quantize(x, p))


@pytest.mark.parametrize("format", INTEGERS + FLOATS)
def test_given_parameters(format):
    f = OF_NAME[format]
    orders = (False, True) if f.has_zero_point else (False,)
    shapes = ((), (12, 1), (1, 64), (3, 8))
    given = [parameters(f, shape, first) for shape in shapes for first in orders]
    compare(lambda x: tuple(both(x, *given)), X)


@pytest.mark.parametrize("format", ["int8", "uint8", "int16"])
def test_steps_of_version_1(format):
    f = OF_NAME[format]
    given = [parameters(f, shape, compute_dtype=None) for shape in ((), (12, 1), (3, 8))]
    given.append(QuantizationParams(0.3, max(f.low, -7), max(f.low, -20), 33, dtype=f.dtype))
    compare(lambda x: tuple(both(x, *given)), X)
    compare(lambda x: quantkit.quantize_tensor(x, given[-1]), torch.arange(-40, 40))


def all_choices(x, **options):
    """What each function chooses, and makes of it."""
    yield from quantkit.quantize_dequant(x, **options)
    options.pop("output_dtype", None)
    yield from quantkit.dynamic_quantize(x, **options)
    sym = options.pop("sym", True)
    choose = quantkit.get_symmetric_qparams if sym else quantkit.get_asymmetric_qparams
    yield choose(x, **options)


OTHERS = [(FINITE,), (FINITE.abs(),), (FINITE * 0,)]


@pytest.mark.parametrize("options", [
    {}, {"sym": False}, {"sym": False, "include_zero": True}, {"per_channel": True},
    {"block_size": [1, 16], "sym": False}, {"block_size": [4, 16]}, {"q_min": -8, "q_max": 7},
    {"dtype": "uint8", "block_size": [1, -1], "sym": False, "include_zero": True},
], ids=str)  # fmt: skip
def test_chosen_parameters_of_version_1(options):
    compare(lambda x: tuple(all_choices(x, **options)), X, others=OTHERS)


@pytest.mark.parametrize("options", [
    {"dtype": "int4", "block_size": [1, 32]}, {"dtype": "uint4", "block_size": [1, 32], "sym": False},
    {"dtype": "int2", "block_size": [1, 16], "scale_rule": "half_range"},
    {"dtype": "float8_e4m3fn", "block_size": [1, -1]}, {"dtype": "float8_e5m2"},
    {"dtype": "float8_e4m3fn", "block_size": [5, 48]},
    {"dtype": "uint16", "block_size": [7, 10], "sym": False},
    {"dtype": "int8", "compute_dtype": F32, "sym": False, "round_first": True},
    {"dtype": "int8", "compute_dtype": F32, "eps": 0.5, "block_size": [1, 16]},
    {"dtype": "int8", "global_scale": 0.25, "per_channel": True},
    {"dtype": "float8_e4m3fn", "q_max": 240, "output_dtype": torch.float16},
], ids=str)  # fmt: skip
def test_chosen_parameters_of_formats(options):
    compare(lambda x: tuple(all_choices(x, **options)), X, others=OTHERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_float32_steps(dtype):
    options = {"block_size": [1, -1], "compute_dtype": F32}
    x = FINITE.to(dtype)
    compare(lambda x: quantkit.dynamic_quantize(x, **options), x)
    p = quantkit.get_symmetric_qparams(x, **options)
    compare(lambda x: quantkit.fake_quantize(x, p), X.to(dtype))
    with pytest.raises(Exception) as error:
        written(lambda x: quantkit.dynamic_quantize(x), x)
    texts = [str(e) for e in chain(error.value)]
    assert any("pass compute_dtype=torch.float32" in t for t in texts), texts


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("options", [
    {"dtype": "int8", "block_size": [1, -1]}, {"dtype": "int4", "block_size": [1, 32]},
    {"dtype": "float8_e4m3fn", "block_size": [5, 48]}, {"dtype": "int8", "sym": False},
    {"dtype": "int8", "per_channel": True, "channel_dim": 0},
], ids=str)  # fmt: skip
def test_dynamic_sizes(options):
    others = [(numbers(n, 64, seed=n),) for n in (4, 7, 30)]
    n = torch.export.Dim("n", min=2, max=1000)
    if options["block_size"][:1] == [5] if "block_size" in options else False:
        n = torch.export.Dim("n", min=6, max=1000)
        others = others[1:]
    compare(lambda x: tuple(all_choices(x, **options)), X, others=others, dynamic=(({0: n},),))


def test_refused_calls_say_why():
    for call, text in (
        (lambda x: quantkit.dynamic_quantize(x, dtype="int8", seed=3), "stochastic rounding"),
        (lambda x: quantkit.quantize(x, "mxfp8"), "scale_dtype"),
        (lambda x: quantkit.quantize(x, "nvfp4"), "scale_dtype"),
        (lambda x: quantkit.dynamic_quantize(x, dtype="float4_e2m1fn"), "the format float4"),
        (lambda x: quantkit.dynamic_quantize(x, scale_rule="ceil"), "scale_rule ceil"),
    ):
        with pytest.raises(Exception) as error:
            written(call, FINITE)
        texts = [str(e) for e in chain(error.value)]
        assert any(text in t for t in texts), texts


# ---- layers --------------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """4-bit weights that are decoded, static 8-bit inputs, and a trained fake quantizer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        w = torch.randn(32, 64) / 8
        self.q, self.p = quantkit.quantize(w, "int4_group128")
        self.register_buffer("codes", self.q)
        self.weight = torch.nn.Parameter(torch.randn(16, 32) / 6)

    def forward(self, x):
        y = torch.nn.functional.linear(x, quantkit.dequantize(self.codes, self.p)).relu()
        p = quantkit.get_symmetric_qparams(self.weight, True)
        return torch.nn.functional.linear(y, quantkit.fake_quantize(self.weight, p))


def test_a_model_of_layers():
    model = Layers().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (FINITE / 50,), dynamo=True, verbose=False,
            custom_translation_table=quantkit.onnx.translation_table(),
        )  # fmt: skip
    (y,) = run(program.model_proto.SerializeToString(), FINITE / 50)
    torch.testing.assert_close(y, model(FINITE / 50).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8_channel", "int4_group128", "fp8_token", "fp8_block128"])
def test_quantized_layers(scheme):
    torch.manual_seed(0)
    embed = quantkit.nn.QuantEmbedding.from_float(torch.nn.Embedding(20, 256), scheme)
    compare(embed, torch.randint(0, 20, (2, 3)))
    linear = quantkit.nn.QuantLinear.from_float(torch.nn.Linear(256, 8), scheme)
    compare(lambda x: x + linear.dequantized(), torch.zeros(8, 256))
    (y,) = run(written(linear, FINITE.reshape(-1, 256)), FINITE.reshape(-1, 256))
    expected = linear(FINITE.reshape(-1, 256)).detach()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "scheme, text",
    [
        ("mxfp8", "scales of torch.float8_e8m0fnu"), ("mxfp4", "scales of torch.float8_e8m0fnu"),
        ("nvfp4", "the format float4_e2m1fn"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_refused_layers_say_why(kind, scheme, text):
    if kind == "linear":
        layer, x = quantkit.nn.QuantLinear.from_float(torch.nn.Linear(128, 8), scheme), FINITE
    else:
        layer, x = torch.nn.Embedding(20, 128), torch.zeros(3, dtype=torch.int64)
        layer = quantkit.nn.QuantEmbedding.from_float(layer, scheme)
    with pytest.raises(Exception) as error:
        written(layer, x.reshape(-1, 128) if kind == "linear" else x)
    assert any(text in str(e) for e in chain(error.value))


def test_w8a8_has_the_same_bits_without_vnni_too():
    torch.manual_seed(0)
    q, p = quantkit.dynamic_quantize(torch.randn(48, 3000), per_channel=True, compute_dtype=F32)
    q[:2] = 127
    bias = torch.randn(48)
    x = torch.randn(3, 5, 3000)
    x[0, 0] = 1.0
    compare(lambda x: quantkit.linear_w8a8(x, q, p.scale, bias), x)
    compare(lambda x: quantkit.linear_w8a8(x, q, p.scale), x[0].half())


# ---- QuantizeLinear ------------------------------------------------------------------------------------

LINEAR = {"QuantizeLinear", "DequantizeLinear"}


@pytest.mark.parametrize("format", ["int8", "uint8"])
@pytest.mark.parametrize("shape", [(), (12, 1), (1, 64)])
def test_quantize_linear_where_its_bits_are_the_contracts(format, shape):
    f = OF_NAME[format]
    finite = torch.where(X.isnan(), 0.0, X)

    plain = (LEVELS.ORT_DISABLE_ALL,)
    for p, linear in (
        (parameters(f, shape, round_first=True), True),
        (
            QuantizationParams(
                parameters(f, shape).scale, None, f.low, f.high, dtype=f.dtype, compute_dtype=F32
            ),
            True,
        ),
        (parameters(f, shape), False),
        (QuantizationParams(0.5, None, f.low, 99, dtype=f.dtype, compute_dtype=F32), False),
    ):
        model = compare(lambda x, p=p: tuple(both(x, p)), finite, qdq=True, levels=plain)
        assert ("QuantizeLinear" in kinds(model)) == linear
        assert not LINEAR & kinds(written(lambda x, p=p: tuple(both(x, p)), finite))


def test_quantize_linear_makes_another_code_of_nan():
    p = QuantizationParams(0.5, None, -128, 127, compute_dtype=F32)
    x = torch.tensor([[math.nan, 1.0]])
    (codes,) = run(written(lambda x: quantkit.quantize_tensor(x, p), x, qdq=True), x)
    assert codes.tolist() == [[-128, 2]] and quantkit.quantize_tensor(x, p).tolist() == [[0, 2]]


def test_chosen_symmetric_scales_take_it():
    model = compare(lambda x: quantkit.quantize_dequant(x, True), FINITE, qdq=True)
    assert kinds(model) >= LINEAR
    model = compare(lambda x: quantkit.quantize_dequant(x, sym=False), FINITE, qdq=True)
    assert "QuantizeLinear" not in kinds(model)


def test_the_code_of_the_page_runs_and_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (PAGE.parent / "onnx.md").read_text()
    names = {}
    for block in re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, names)
        if expected := re.findall(r"^# prints (.*)$", block, re.MULTILINE):
            lines = [
                line
                for line in printed.getvalue().splitlines()
                if not line.startswith("[torch.onnx]")
            ]
            assert lines == expected
    assert "session" in names
