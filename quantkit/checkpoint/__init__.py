"""Whole checkpoints: quantized file by file, in layouts that other programs load."""

from .files import CheckpointError
from .layouts import SCHEMES, WeightScheme
from .output import DiskFull
from .plan import Plan
from .reader import Checkpoint
from .rules import Options, options
from .run import Event, dequantize, dry_run, quantize, report, verify

__all__ = [
    "SCHEMES",
    "Checkpoint",
    "CheckpointError",
    "DiskFull",
    "Event",
    "Options",
    "Plan",
    "WeightScheme",
    "dequantize",
    "dry_run",
    "options",
    "quantize",
    "report",
    "verify",
]
