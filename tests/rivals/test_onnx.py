"""ONNX: Runtime's operators, and the node vectors of the onnx package."""

import ctypes
import warnings

import numpy as np
import pytest
import torch
from lib.rivals import COLUMNS, NOTES, ROWS, chosen, given, needs, same

import quantkit
from quantkit import QuantizationParams
from quantkit.formats import FORMATS, OF_NAME

needs("onnx")
onnxruntime = needs("onnxruntime")
import onnx  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

PEER = "onnxruntime"
# ONNX's element types by the names of quantkit's formats. A format that quantkit lacks is left out.
TYPES = {
    "int8": TensorProto.INT8, "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16, "uint16": TensorProto.UINT16,
    "int4": TensorProto.INT4, "uint4": TensorProto.UINT4,
    "int2": TensorProto.INT2, "uint2": TensorProto.UINT2,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN, "float8_e5m2": TensorProto.FLOAT8E5M2,
    "float4_e2m1fn": TensorProto.FLOAT4E2M1,
}  # fmt: skip
NAMES = {kind: name for name, kind in TYPES.items()}
INTEGERS = ["int8", "uint8", "int16", "uint16", "int4", "uint4"]  # of Runtime's operator


def loaded(nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )


def run_quantize(x, scale, zero_point, format, float_type=TensorProto.FLOAT):
    """Runtime's codes as bytes or 16 bits, per channel along dimension 0; packed types as ONNX packs."""
    kind = TYPES[format]
    f = OF_NAME[format]
    raw = zero_point.to(torch.int64)
    if f.per_byte > 1:
        codes = (raw & 15).to(torch.uint8).view(-1, 2)
        data = (codes[:, 0] | codes[:, 1] << 4).numpy().tobytes()
    else:
        as_int = {16: torch.int16}.get(f.bits, torch.uint8)
        data = raw.to(as_int).numpy().tobytes()
    zeros = helper.make_tensor("z", kind, [len(raw)], data, raw=True)
    shape = list(x.shape)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0)
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0)
    value = helper.make_tensor_value_info
    made = loaded(
        [node, back],
        [value("x", float_type, shape), value("s", float_type, [len(raw)])],
        [value("q", kind, shape), value("y", float_type, shape)],
        [zeros],
    )
    feeds = {"x": x.numpy(), "s": scale.flatten().to(x.dtype).numpy()}
    q, y = made.run_with_ort_values(
        ["q", "y"], {k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in feeds.items()}
    )
    return ort_bytes(q, f, x.shape), torch.from_numpy(y.numpy())


def ort_bytes(value, f, shape):
    """The codes of an OrtValue of any type, one in each element."""
    size = int(np.prod(shape)) * f.bits // 8
    data = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    codes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if f.per_byte > 1:
        return f.unpack(codes.view(1, -1)).view(shape)
    return codes.view(torch.int16).view(shape) if f.bits == 16 else codes.view(shape)


def plain(codes, f):
    """quantkit's codes, one in each element."""
    if f.per_byte > 1:
        return f.unpack(codes)
    return codes.view(torch.int16 if f.bits == 16 else torch.uint8)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("format", INTEGERS)
def test_quantize_linear(format, x_dtype):
    f = OF_NAME[format]
    g = given(x_dtype, f.low, f.high)
    p = QuantizationParams(
        g.scale.to(x_dtype), g.zero_point, f.low, f.high, dtype=f.dtype,
        compute_dtype=torch.float32, round_first=True,
    )  # fmt: skip
    half = x_dtype == torch.float16
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    theirs, back = run_quantize(g.x, g.scale, g.zero_point.flatten(), format, kind)
    ours = quantkit.quantize_tensor(g.x, p)
    what = f"{str(x_dtype)[6:]} → {format}"
    same(PEER, "ONNX QuantizeLinear, integers", what, theirs, plain(ours, f))
    if not half:
        ours = quantkit.dequantize_tensor(ours, p)
        same(PEER, "ONNX DequantizeLinear", format, back, ours)


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
def test_quantize_linear_float8(format):
    f = OF_NAME[format]
    g = given(torch.float32, -f.high, f.high, zero_points=False, nan=True)
    p = QuantizationParams(g.scale, 0.0, -f.high, f.high, dtype=f.dtype)
    theirs, back = run_quantize(g.x, g.scale, torch.zeros(ROWS), format)
    ours = quantkit.quantize_tensor(g.x, p)
    # A NaN keeps its sign there.
    theirs = torch.where(g.x.isnan(), theirs & 127, theirs)
    row = "ONNX QuantizeLinear, float8, saturate=1"
    same(PEER, row, f"float32 → {format}", theirs, plain(ours, f))
    ours = quantkit.dequantize_tensor(theirs.view(f.dtype), p)
    same(PEER, "ONNX DequantizeLinear", format, back, ours)


def test_dynamic_quantize_linear():
    x = chosen(torch.float32, 127.5)
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    value = helper.make_tensor_value_info
    made = loaded(
        [node],
        [value("x", TensorProto.FLOAT, ["n"])],
        [value("q", TensorProto.UINT8, ["n"]), value("s", TensorProto.FLOAT, []),
         value("z", TensorProto.UINT8, [])],
    )  # fmt: skip
    results = [made.run(None, {"x": row.numpy()}) for row in x]
    q, s, z = (torch.from_numpy(np.stack(r)) for r in zip(*results, strict=True))
    ours, p = quantkit.dynamic_quantize(
        x, dtype=torch.uint8, sym=False, block_size=[1, -1], include_zero=True, round_first=True
    )
    row = "ONNX DynamicQuantizeLinear"
    same(PEER, row, "scale", s, p.scale.flatten())
    same(PEER, row, "zero point", z.float(), p.zero_point.flatten())
    same(PEER, row, "codes", q, ours)
    assert q.shape == (ROWS, COLUMNS)


def test_code_of_nan():
    """Runtime's depends on its instruction set: the limits, or 0."""
    x = torch.full((2, 64), torch.nan)
    for format in ("uint8", "int8"):
        f = OF_NAME[format]
        q, _ = run_quantize(x, torch.ones(2), torch.zeros(2), format)
        assert set(q.view(f.dtype).unique().tolist()) <= {f.low, 0, f.high}
        assert not quantkit.quantize_tensor(x, QuantizationParams(1.0, 0.0, f.low, f.high)).any()


# ---- the node vectors of the onnx package -------------------------------------------------------------


def node_cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases("")
    operators = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
    for case in cases:
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in operators:
            yield case


def element_type(case):
    """Of the codes: the input of DequantizeLinear, the output of the others."""
    graph = case.model.graph
    values = graph.input if graph.node[0].op_type == "DequantizeLinear" else graph.output
    return values[0].type.tensor_type.elem_type


CASES = list(node_cases())
OURS = [c for c in CASES if NAMES.get(element_type(c)) in OF_NAME]


def numbers(value):
    """As float32, which holds every value here exactly. Some vectors are protobufs."""
    if isinstance(value, TensorProto):
        value = onnx.numpy_helper.to_array(value)
    return torch.from_numpy(np.asarray(value).astype(np.float32))


def spread(t, x, axis):
    """A parameter in the shape that quantkit takes: 0-dim, or x's rank."""
    if t.numel() == 1:
        return t.reshape(())
    if t.dim() == x.dim():
        return t
    return t.view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


@pytest.mark.parametrize("case", OURS, ids=lambda c: c.name)
def test_node_vectors(case):
    node = case.model.graph.node[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    f = OF_NAME[NAMES[element_type(case)]]
    ((inputs, outputs),) = case.data_sets
    row = f"ONNX node vectors, {node.op_type}"
    if node.op_type == "DynamicQuantizeLinear":
        x = torch.from_numpy(np.asarray(inputs[0]))
        q, p = quantkit.dynamic_quantize(
            x, dtype=torch.uint8, sym=False, include_zero=True, round_first=True
        )
        theirs = [torch.from_numpy(np.asarray(o)) for o in outputs]
        same("onnx", row, case.name, theirs[0], q)
        same("onnx", row, case.name, theirs[1], p.scale)
        same("onnx", row, case.name, theirs[2].float(), p.zero_point)
        return
    first, scale, *zero_point = inputs
    x, scale = numbers(first), numbers(scale)
    zeros = numbers(zero_point[0]) if zero_point else torch.zeros(())
    place = x, attributes.get("axis", 1)
    p = QuantizationParams(
        spread(scale, *place), spread(zeros, *place), f.low, f.high, dtype=f.dtype,
        compute_dtype=torch.float32, round_first=f.has_zero_point,
    )  # fmt: skip
    if node.op_type == "QuantizeLinear":
        size = x.numel()
        if f.per_byte > 1 and x.shape[-1] % f.per_byte:  # whole tensors are packed there, rows here
            x = torch.nn.functional.pad(x, (0, -x.shape[-1] % f.per_byte))
        ours = quantkit.quantize_tensor(x, p)
        ours = f.decode(f.unpack(ours))[..., : numbers(outputs[0]).shape[-1]].contiguous()
        ours += 0.0  # as the zero point is there, which a float format has too: -0.0 is 0.0
        same("onnx", row, case.name, numbers(outputs[0]), ours)
        assert ours.numel() == size
    else:
        codes = f.encode(x, f.low, f.high)
        if f.per_byte > 1:
            codes = torch.nn.functional.pad(codes, (0, -x.shape[-1] % f.per_byte))
        ours = quantkit.dequantize_tensor(f.pack(codes), p)[..., : x.shape[-1]].contiguous()
        same("onnx", row, case.name, numbers(outputs[0]), ours)


def test_formats_that_are_left_out():
    names = {TensorProto.DataType.Name(element_type(c)) for c in CASES if c not in OURS}
    NOTES.append(f"ONNX node vectors, not a quantkit format: {', '.join(sorted(names)) or 'none'}")
    assert len(OURS) >= 20
    assert all(f.name in TYPES for f in FORMATS), "a format that ONNX may have a type for"
