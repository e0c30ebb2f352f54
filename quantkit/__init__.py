"""quantkit: fused quantize and dequantize kernels that return, bit for bit, what a readable pure-torch
reference (``quantkit.reference``) returns."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from . import nn as nn
    from .nn import dequantize_model_, quantize_model_

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
    "quantize",
    "quantize_dequant",
    "quantize_model_",
    "quantize_tensor",
    "reference",
    "shard_index",
]

# Names of quantkit.nn, which is imported when one of them is asked for.
_OF_NN = ("dequantize_model_", "quantize_model_")

if not TYPE_CHECKING:  # so that type checkers flag a name that is not there

    def __getattr__(name):
        if name in _OF_NN or name == "nn":
            import importlib

            module = importlib.import_module(".nn", __name__)
            return module if name == "nn" else getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_OF_NN, "nn"})


del TYPE_CHECKING
