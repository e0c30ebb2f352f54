"""Whole checkpoints: quantized file by file, in layouts that other programs load."""

from .layouts import SCHEMES, WeightScheme
from .output import DiskFull
from .plan import Options, Plan, options
from .run import Checkpoint, Event, dequantize, dry_run, quantize, report, verify
from .source import CheckpointError

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
