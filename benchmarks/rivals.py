"""The competitors: one table of who they are, what they need, and how each does a case."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import quant_tool
from .cases import DTYPES, Call, Job, Results

PER_TENSOR, PER_CHANNEL = "tensor", "channel"


class Absent(Exception):
    """The rival cannot do the case; the text says why."""


@dataclass
class Contestant:
    """A call to time, and what it computes in quantkit's order (None: nothing comparable)."""

    call: Call
    results: Callable[[], Results] | None
    own_threads: bool = False  # beside torch's


@dataclass(frozen=True)
class Rival:
    package: str | None
    make: Callable[[Job], Contestant]

    def version(self) -> str | None:
        """The installed version, None where the package is missing."""
        try:
            return importlib.metadata.version(self.package or "torch")
        except importlib.metadata.PackageNotFoundError:
            return None


def _needs(job: Job, *, granularities=(PER_TENSOR, PER_CHANNEL), dtypes=("float32",), schemes=None):
    case = job.case
    if case.granularity not in granularities:
        raise Absent(f"no granularity {case.granularity}")
    if case.dtype not in dtypes:
        raise Absent(f"no {case.dtype}")
    if schemes is not None and case.scheme not in schemes:
        raise Absent(f"no scheme {case.scheme}")


# ---- quant_tool, eager and compiled -----------------------------------------------------------------


def _plain(job: Job) -> tuple[Callable, tuple]:
    _needs(job, dtypes=("float32", "float16", "bfloat16"), schemes=("symmetric", "asymmetric"))
    x, p = job.x, job.qparams
    channel, sym = job.case.granularity == PER_CHANNEL, job.scheme["sym"]
    choose = quant_tool.get_symmetric_qparams if sym else quant_tool.get_asymmetric_qparams

    def choose_qparams(x):
        p = choose(x, channel)
        return p.scale, p.zero_point

    def dynamic_quantize(x):
        p = choose(x, channel)
        return quant_tool.quantize_tensor(x, p), p.scale, p.zero_point

    def quantize_dequantize(x):
        q, x_hat, p = quant_tool.quantize_dequant(x, channel, sym=sym)
        return q, x_hat, p.scale, p.zero_point

    def fake_quantize(x, p):
        return (quant_tool.dequantize_tensor(quant_tool.quantize_tensor(x, p), p).to(x.dtype),)

    functions = {
        "choose_qparams": (choose_qparams, (x,)),
        "quantize": (lambda x, p: (quant_tool.quantize_tensor(x, p),), (x, p)),
        "dequantize": (lambda q, p: (quant_tool.dequantize_tensor(q, p),), (job.q, p)),
        "dynamic_quantize": (dynamic_quantize, (x,)),
        "quantize_dequantize": (quantize_dequantize, (x,)),
        "fake_quantize": (fake_quantize, (x, p)),
    }
    return functions[job.case.op]


def eager(job: Job) -> Contestant:
    function, arguments = _plain(job)
    return _calling(function, arguments)


def compiled(job: Job) -> Contestant:
    function, arguments = _plain(job)
    torch._dynamo.reset()
    return _calling(torch.compile(function, dynamic=False), arguments)


def _calling(function: Callable, arguments: tuple) -> Contestant:
    return Contestant(lambda: function(*arguments), lambda: function(*arguments))


# ---- torch: quantize_per_*, .dequantize(), fake_quantize_* ----------------------------------------


def _flat(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    return job.qparams.scale.flatten(), job.qparams.zero_point.flatten()


def torch_quantized(job: Job) -> Contestant:
    _needs(job, schemes=("symmetric", "asymmetric"))
    x, p = job.x, job.qparams
    scales, zero_points = _flat(job)
    warnings.filterwarnings("ignore", message=".*quantiz.*deprecated.*")
    if job.case.op == "fake_quantize":
        zero_points = zero_points.to(torch.int32)
        if job.case.granularity == PER_TENSOR:
            function, given = torch.fake_quantize_per_tensor_affine, (scales[0], zero_points[0])
        else:
            function, given = torch.fake_quantize_per_channel_affine, (scales, zero_points, 0)
        call = lambda: function(x, *given, p.q_min, p.q_max)  # noqa: E731
        return Contestant(call, lambda: (call(),))
    if job.case.granularity == PER_TENSOR:
        scale, zero_point = float(scales), int(zero_points)
        quantize = lambda: torch.quantize_per_tensor(x, scale, zero_point, torch.qint8)  # noqa: E731
    else:
        given = (scales.double(), zero_points.long(), 0, torch.qint8)
        quantize = lambda: torch.quantize_per_channel(x, *given)  # noqa: E731
    if job.case.op == "quantize":
        return Contestant(quantize, lambda: (quantize().int_repr(),))
    if job.case.op == "dequantize":
        quantized = quantize()
        if not torch.equal(quantized.int_repr(), job.q):  # other codes: give it ours
            if job.case.granularity == PER_TENSOR:
                quantized = torch._make_per_tensor_quantized_tensor(job.q, scale, zero_point)
            else:
                quantized = torch._make_per_channel_quantized_tensor(job.q, *given[:3])
        return Contestant(quantized.dequantize, lambda: (quantized.dequantize(),))
    raise Absent("torch has no such operator")


# ---- torchao --------------------------------------------------------------------------------------


def torchao(job: Job) -> Contestant:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    primitives = importlib.import_module("torchao.quantization.quant_primitives")
    mapping = primitives.MappingType
    _needs(job, granularities=job.case.granularity, dtypes=(job.case.dtype,))
    if job.case.scheme == "uint8":
        raise Absent("its zero point is rounded otherwise")
    x, p = job.x, job.qparams
    blocks = [
        size if block == -1 else block
        for size, block in zip(x.shape, job.case.blocks() or [-1] * x.dim(), strict=True)
    ]
    kind = mapping.SYMMETRIC_NO_CLIPPING_ERR if job.scheme["sym"] else mapping.ASYMMETRIC

    def choose(x):
        return primitives.choose_qparams_affine(x, kind, blocks, p.dtype, p.q_min, p.q_max, 1e-8)

    def quantize(x, scale, zero_point):
        return primitives.quantize_affine(x, blocks, scale, zero_point, p.dtype, p.q_min, p.q_max)

    def dequantize(q, scale, zero_point):
        return primitives.dequantize_affine(
            q, blocks, scale, zero_point, p.dtype, p.q_min, p.q_max, output_dtype=torch.float32
        )

    def dynamic_quantize(x):
        scale, zero_point = choose(x)
        return quantize(x, scale, zero_point), scale, zero_point

    def quantize_dequantize(x):
        q, scale, zero_point = dynamic_quantize(x)
        return q, dequantize(q, scale, zero_point), scale, zero_point

    given = (p.scale, p.zero_point.to(torch.int32))
    functions = {
        "choose_qparams": (choose, (x,)),
        "quantize": (lambda *a: (quantize(*a),), (x, *given)),
        "dequantize": (lambda *a: (dequantize(*a),), (job.q, *given)),
        "dynamic_quantize": (dynamic_quantize, (x,)),
        "quantize_dequantize": (quantize_dequantize, (x,)),
    }
    if job.case.op not in functions:
        raise Absent("not measured: the two calls in turn")
    function, arguments = functions[job.case.op]
    return _calling(function, arguments)


def torchao_compiled(job: Job) -> Contestant:
    function = torchao(job).call
    torch._dynamo.reset()
    call = torch.compile(function, dynamic=False)
    return Contestant(call, call)


# ---- quantized_decomposed ---------------------------------------------------------------------------


def decomposed(job: Job) -> Contestant:
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    ops = torch.ops.quantized_decomposed
    _needs(job, schemes=("symmetric", "asymmetric"))
    x, p = job.x, job.qparams
    scales, zero_points = _flat(job)
    zero_points = zero_points.to(torch.int64)
    limits = (p.q_min, p.q_max, p.dtype)
    channel = job.case.granularity == PER_CHANNEL
    if job.case.op == "choose_qparams" and not channel:
        name = "choose_qparams_symmetric" if job.scheme["sym"] else "choose_qparams"
        return _calling(getattr(ops, name).tensor, (x, p.q_min, p.q_max, 1e-8, p.dtype))
    if job.case.op not in ("quantize", "dequantize"):
        raise Absent("no such operator")
    data = x if job.case.op == "quantize" else job.q
    if channel:
        operator = getattr(ops, f"{job.case.op}_per_channel").default
        arguments = (data, scales, zero_points, 0, *limits)
    else:
        operator = getattr(ops, f"{job.case.op}_per_tensor").tensor
        arguments = (data, scales[0], zero_points[0], *limits)
    return Contestant(lambda: operator(*arguments), lambda: (operator(*arguments),))


# ---- ONNX Runtime -----------------------------------------------------------------------------------

_ONNX_OPS = {
    "quantize": "QuantizeLinear",
    "dequantize": "DequantizeLinear",
    "dynamic_quantize": "DynamicQuantizeLinear",
}


def onnxruntime(job: Job) -> Contestant:
    """Outputs are bound to memory that stays."""
    import numpy as np

    if job.x.device.type != "cpu":
        raise Absent("measured on the CPU only")
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    if job.case.op not in _ONNX_OPS:
        raise Absent("no such operator")
    dynamic = job.case.op == "dynamic_quantize"
    _needs(
        job,
        granularities=(PER_TENSOR,) if dynamic else (PER_TENSOR, PER_CHANNEL),
        schemes=("uint8",) if dynamic else ("symmetric", "asymmetric"),
    )
    inputs = {"x": (job.q if job.case.op == "dequantize" else job.x).numpy()}
    outputs = {"y": job.outs[0].numpy()}
    initializers, attributes = [], {}
    if dynamic:
        outputs |= {"scale": np.empty((), np.float32), "zero": np.empty((), np.uint8)}
    else:
        scales, zero_points = _flat(job)
        zero_points = zero_points.to(torch.int8)
        if job.case.granularity == PER_TENSOR:
            scales, zero_points = scales[0], zero_points[0]
        else:
            attributes["axis"] = 0
        initializers = [
            onnx.numpy_helper.from_array(scales.numpy(), "scale"),
            onnx.numpy_helper.from_array(zero_points.numpy(), "zero"),
        ]
    helper = onnx.helper
    node = helper.make_node(
        _ONNX_OPS[job.case.op],
        ["x"] if dynamic else ["x", "scale", "zero"],
        list(outputs),
        **attributes,
    )

    def described(arrays):
        return [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in arrays.items()
        ]

    graph = helper.make_graph([node], "case", described(inputs), described(outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def results() -> Results:
        session.run_with_iobinding(binding)
        return tuple(torch.from_numpy(array.copy()) for array in outputs.values())

    return Contestant(lambda: session.run_with_iobinding(binding), results, own_threads=True)


# ---- vLLM -------------------------------------------------------------------------------------------


def vllm(job: Job) -> Contestant:
    """Its int8 quantization per token."""
    _needs(job, granularities=(PER_CHANNEL,), dtypes=tuple(DTYPES), schemes=("symmetric",))
    if job.case.op != "dynamic_quantize" or job.x.device.type != "cuda":
        raise Absent("only dynamic_quantize per token, on a GPU")
    scaled_int8_quant = importlib.import_module("vllm._custom_ops").scaled_int8_quant
    zero = torch.zeros_like(job.qparams.zero_point)

    def results() -> Results:
        q, scale, _ = scaled_int8_quant(job.x)
        return q, scale, zero

    return Contestant(lambda: scaled_int8_quant(job.x), results)


# ---- bandwidth --------------------------------------------------------------------------------------


def copy(job: Job) -> Contestant:
    out = torch.empty_like(job.x)
    return Contestant(lambda: out.copy_(job.x), None)


def clone(job: Job) -> Contestant:
    return Contestant(job.x.clone, None)


def stream(job: Job) -> Contestant:
    """Reads and writes as many bytes as the operation must, as bytes: half of them each way."""
    source = torch.zeros(job.bytes // 2, dtype=torch.uint8, device=job.x.device)
    out = torch.empty_like(source)
    return Contestant(lambda: out.copy_(source), None)


RIVALS = {
    "eager": Rival(None, eager),
    "compile": Rival(None, compiled),
    "torch": Rival(None, torch_quantized),
    "torchao": Rival("torchao", torchao),
    "torchao_compile": Rival("torchao", torchao_compiled),
    "decomposed": Rival(None, decomposed),
    "onnxruntime": Rival("onnxruntime", onnxruntime),
    "vllm": Rival("vllm", vllm),
    "copy": Rival(None, copy),
    "clone": Rival(None, clone),
    "stream": Rival(None, stream),
}


def contestant(name: str, job: Job) -> Contestant | str:
    """The rival's way to do the case, or why there is none."""
    rival = RIVALS[name]
    if rival.version() is None:
        return f"missing: {rival.package} is not installed"
    try:
        return rival.make(job)
    except Absent as reason:
        return str(reason)
