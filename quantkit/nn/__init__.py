"""Layers whose weights are codes, and models whose layers become such layers and back."""

from .checkpoints import load_checkpoint_
from .layers import QuantConv2d, QuantEmbedding, QuantizedLayer, QuantLinear
from .models import dequantize_model_, quantize_model_

__all__ = [
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizedLayer",
    "dequantize_model_",
    "load_checkpoint_",
    "quantize_model_",
]
