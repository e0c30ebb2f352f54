"""ONNX: how torch.onnx.export writes quantkit's operators, by ONNX's operators of the same steps.

torch.onnx.export(model, args, custom_translation_table=quantkit.onnx.translation_table())

docs/onnx.md says which calls it takes. This needs onnxscript, as torch.onnx itself does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from ..operators import functional
from .operators import Operators

__all__ = ["translation_table"]

# Those with an overload ".format".
_NAMES = (
    "choose_qparams", "quantize", "dequantize", "dynamic_quantize", "quantize_dequantize",
    "fake_quantize", "_fake_quantize",
)  # fmt: skip


def translation_table(*, qdq: bool = False) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``custom_translation_table`` of torch.onnx.export takes.

    Args:
        qdq: write QuantizeLinear and DequantizeLinear where their bits are quantkit's, for numbers that
            are not NaN or infinite and zero points that are integers. These are int8 and uint8 with all
            their codes, and one scale or one for each index of one dimension. To quantize it also takes
            ``round_first=True``, no zero point, or a symmetric scale that the call itself chooses.

    Raises:
        ModuleNotFoundError where onnxscript is missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise ModuleNotFoundError(
            "quantkit.onnx needs onnxscript, as torch.onnx.export does: pip install onnxscript",
            name="onnxscript",
        )
    table = {functional(name): function for name, function in _functions(bool(qdq)).items()}
    return table | {torch.ops.aten.view.dtype: _called(Operators.view, qdq)}  # of a layer's bytes


def _functions(qdq: bool) -> dict[str, Callable[..., Any]]:
    made: dict[str, Callable[..., Any]] = {}
    for name in _NAMES:
        for overload in ("", ".format"):
            method = getattr(Operators, name.removeprefix("_") + overload.replace(".", "_"))
            made[name + overload] = _called(method, qdq)
    made["aminmax"] = _called(Operators.aminmax, qdq)
    made["linear_w8a8"] = _called(Operators.linear_w8a8, qdq)
    return made


def _called(method: Callable[..., Any], qdq: bool) -> Callable[..., Any]:
    def function(*args: Any, **options: Any) -> Any:
        return method(Operators(qdq), *args, **options)

    return function
