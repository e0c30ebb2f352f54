"""quantkit: fused quantize and dequantize kernels that return, bit for bit, what a readable pure-torch
reference (``quantkit.reference``) returns."""

import typing

from . import reference
from ._load import backend
from ._version import __version__ as __version__
from .explain import explain
from .ops import (
    aminmax,
    dequantize,
    dequantize_tensor,
    dynamic_quantize,
    fake_quantize,
    get_asymmetric_qparams,
    get_symmetric_qparams,
    linear_w8a8,
    measure,
    measure_limbs,
    quantize,
    quantize_dequant,
    quantize_tensor,
)
from .params import QuantizationParams
from .philox import shard_index
from .schemes import SCHEMES
from .sums import Measured, join_measures

__all__ = [
    "SCHEMES",
    "Measured",
    "QuantizationParams",
    "aminmax",
    "backend",
    "dequantize",
    "dequantize_model_",
    "dequantize_tensor",
    "dynamic_quantize",
    "explain",
    "fake_quantize",
    "get_asymmetric_qparams",
    "get_symmetric_qparams",
    "join_measures",
    "linear_w8a8",
    "measure",
    "measure_limbs",
    "observe",
    "quantize",
    "quantize_dequant",
    "quantize_model_",
    "quantize_tensor",
    "reference",
    "shard_index",
]

# What is imported when it is asked for: names, and the modules that have them; modules themselves.
_LATER = {
    "checkpoint": None, "dequantize_model_": "nn", "nn": None, "observe": "observers", "observers": None,
    "onnx": None, "quantize_model_": "nn",
}  # fmt: skip

if typing.TYPE_CHECKING:
    from . import checkpoint as checkpoint
    from . import nn as nn
    from . import observers as observers
    from . import onnx as onnx
    from .nn import dequantize_model_ as dequantize_model_
    from .nn import quantize_model_ as quantize_model_
    from .observers import observe as observe
else:

    def __getattr__(name):
        import importlib

        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f".{_LATER[name] or name}", __name__)
        globals()[name] = value = getattr(module, name) if _LATER[name] else module
        return value

    def __dir__():
        return sorted({*globals(), *_LATER})
