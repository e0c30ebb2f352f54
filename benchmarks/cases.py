"""What is measured: an operation on a shape, a dtype, a granularity and a scheme, and quantkit's way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

import quantkit
from quantkit import QuantizationParams, reference

Results = tuple[torch.Tensor, ...]
Call = Callable[[], object]

OPS = (
    "choose_qparams",
    "quantize",
    "dequantize",
    "dynamic_quantize",
    "quantize_dequantize",
    "fake_quantize",
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPES = ((4096, 4096), (512, 1024), (64, 1024))
CUDA_SHAPES = ((131072, 4096), (16384, 4096))  # beyond any L2
GRANULARITIES = {  # block_size for a matrix
    "tensor": None,
    "channel": [1, -1],
    "channel_last": [-1, 1],
    "group32": [1, 32],
    "group128": [1, 128],
    "block128": [128, 128],
}
SCHEMES = {
    "symmetric": {"sym": True, "dtype": torch.int8},
    "asymmetric": {"sym": False, "dtype": torch.int8},
    "uint8": {"sym": False, "dtype": torch.uint8, "include_zero": True},  # ONNX's dynamic scheme
}
CHOOSERS = ("choose_qparams", "dynamic_quantize", "quantize_dequantize")


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    granularity: str = "tensor"
    scheme: str = "symmetric"
    block_size: tuple[int, ...] | None = None  # for what GRANULARITIES does not name

    def blocks(self) -> list[int] | None:
        return list(self.block_size) if self.block_size else GRANULARITIES[self.granularity]


@dataclass
class Job:
    """A case with its data: x, parameters chosen from it, its codes, and outputs for `out=`.

    A job with a gradient can also do the operator _fake_quantize_backward.
    """

    case: Case
    x: torch.Tensor
    qparams: QuantizationParams
    q: torch.Tensor
    outs: Results
    expected: Results
    scheme: dict = field(default_factory=dict)
    grad: torch.Tensor | None = None

    @classmethod
    def of(cls, case: Case, device: str = "cpu") -> Job:
        torch.manual_seed(0)
        x = torch.randn(case.shape, device=device).to(DTYPES[case.dtype])
        scheme = SCHEMES[case.scheme]
        q, qparams = quantkit.dynamic_quantize(x, block_size=case.blocks(), **scheme)
        job = cls(case, x, qparams, q, (), (), scheme)
        job.expected = job.fresh()
        job.outs = tuple(torch.empty_like(t) for t in job.expected)
        return job

    def allocating(self) -> Call:
        """quantkit's public function (the operator, where there is none), with fresh outputs."""
        x, q, p = self.x, self.q, self.qparams
        chosen = {"block_size": self.case.blocks(), **self.scheme}
        arguments, choose_qparams = self.arguments(), torch.ops.quantkit.choose_qparams.default
        return {
            "choose_qparams": lambda: choose_qparams(*arguments),
            "quantize": lambda: quantkit.quantize_tensor(x, p),
            "dequantize": lambda: quantkit.dequantize_tensor(q, p),
            "dynamic_quantize": lambda: quantkit.dynamic_quantize(x, **chosen),
            "quantize_dequantize": lambda: quantkit.quantize_dequant(x, **chosen),
            "fake_quantize": lambda: quantkit.fake_quantize(x, p),
        }[self.case.op]

    def fresh(self) -> Results:
        """The results of one such call: tensors, in the operator's order."""
        results = self.allocating()()
        if isinstance(results, torch.Tensor):
            return (results,)
        *tensors, last = results
        if isinstance(last, QuantizationParams):
            return (*tensors, last.scale, last.zero_point)
        return (*tensors, last)

    def arguments(self) -> tuple:
        """The operator's."""
        p = self.qparams
        given, limits = (p.scale, p.zero_point), (p.q_min, p.q_max)
        if self.case.op == "dequantize":
            return (self.q, *given)
        if self.case.op == "fake_quantize":
            return (self.x, *given, *limits)
        if self.case.op == "_fake_quantize_backward":
            return (self.grad, self.x, *given, *limits)
        if self.case.op == "quantize":
            return (self.x, *given, *limits, p.dtype)
        dtype = () if self.case.op == "choose_qparams" else (p.dtype,)
        include_zero = self.scheme.get("include_zero", False)
        blocks = self.case.blocks()
        return (self.x, blocks, *limits, 1e-8, self.scheme["sym"], *dtype, include_zero)

    def out(self, ops=torch.ops.quantkit) -> Call:
        """The operator's ``out`` overload, with outputs that stay; ops: the namespace of a build."""
        operator = getattr(ops, self.case.op).out
        arguments, outs = self.arguments(), self.named_outs()
        return lambda: operator(*arguments, **outs)

    def named_outs(self) -> dict[str, torch.Tensor]:
        names = {
            "choose_qparams": ("scale", "zero_point"),
            "dynamic_quantize": ("q", "scale", "zero_point"),
            "quantize_dequantize": ("q", "x_hat", "scale", "zero_point"),
        }.get(self.case.op, ("out",))
        return dict(zip(names, self.outs, strict=True))

    def reference(self) -> Results:
        operator = getattr(reference, f"{self.case.op}_op")
        results = operator(*self.arguments())
        return results if isinstance(results, tuple) else (results,)

    @property
    def bytes(self) -> int:
        """What must move: the input read once, every output written once, given parameters read."""
        read = self.q if self.case.op == "dequantize" else self.x
        moved = (read, *self.expected) + (() if self.grad is None else (self.grad,))
        if self.case.op not in CHOOSERS:
            moved += (self.qparams.scale, self.qparams.zero_point)
        return sum(t.numel() * t.element_size() for t in moved)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Where values are the same, zeros with their signs; NaN is NaN."""
    return ((ours == theirs) & (ours.signbit() == theirs.signbit())) | (
        ours.isnan() & theirs.isnan()
    )


def differing(results: Results, expected: Results) -> str:
    """How the results differ from ours: "same bits", or how many values do, whatever their dtype."""
    notes = []
    for name, ours, theirs in zip(_names(expected), expected, results, strict=True):
        different = ours.numel() - int(
            same_bits(ours, theirs.reshape(ours.shape).to(ours.dtype)).sum()
        )
        if different:
            notes.append(f"{different:,} of {ours.numel():,} {name} differ")
    return "; ".join(notes) or "same bits"


def _names(expected: Results) -> tuple[str, ...]:
    kinds = ["values" if t.is_floating_point() else "codes" for t in expected]
    if len(expected) > 1:
        kinds[-2:] = ["scales", "zero points"]
    return tuple(kinds)


def default_cases(shapes=SHAPES, dtypes=tuple(DTYPES)) -> Iterator[Case]:
    """What the tables need; asking for more names it on the command line."""
    for shape in shapes:
        if "float32" in dtypes:
            for op in OPS:
                yield Case(op, shape)
                yield Case(op, shape, granularity="channel")
            yield Case("quantize_dequantize", shape, scheme="asymmetric")
            yield Case("dynamic_quantize", shape, scheme="uint8")
        for dtype in dtypes:
            if dtype != "float32":
                yield Case("quantize", shape, dtype)
                yield Case("quantize_dequantize", shape, dtype)


def cuda_cases(shapes=CUDA_SHAPES, dtypes=("bfloat16", "float32")) -> Iterator[Case]:
    """The main operators on a GPU, and each way of the kernels to choose parameters."""
    for shape in shapes:
        for dtype in dtypes:
            for op in ("quantize", "dequantize"):
                yield Case(op, shape, dtype)
                yield Case(op, shape, dtype, granularity="channel")
            for granularity in ("channel", "tensor", "channel_last", "group128", "block128"):
                yield Case("dynamic_quantize", shape, dtype, granularity=granularity)
            yield Case("quantize_dequantize", shape, dtype, granularity="channel")
            yield Case("fake_quantize", shape, dtype)


def same_numel(numel: int = 1 << 24) -> Iterator[Case]:
    """quantize_dequantize by granularity, all of nearly the same size."""
    op, side = "quantize_dequantize", math.isqrt(numel)
    matrix = (side, side)
    for name in GRANULARITIES:
        yield Case(op, matrix, granularity=name)
    yield Case(
        op, (64, side // 4, side // 16), granularity="channel_middle", block_size=(-1, 1, -1)
    )
    for channels in (1, 16, 256, 10**4, 10**5, 10**6):
        shape = (channels, numel // channels)
        yield Case(op, shape, granularity=f"channels_{channels}", block_size=(1, -1))
    yield Case(
        op, (side // 4, side // 9 * 4, 3, 3), granularity="conv_out", block_size=(1, -1, -1, -1)
    )
