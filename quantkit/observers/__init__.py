"""Calibration: what the inputs of layers look like, over any loop, in a state that has no order.

The state of a layer is its extremes, and counts of its numbers by the upper 16 bits of float32. Maxima of
integers and sums of integers have no order. So batches, restarts and ranks give the same bits in any
order. docs/calibration.md has the formulas.
"""

from .average import MovingAverage
from .models import observe
from .observer import Observer
from .ranges import METHODS
from .stats import Stats

__all__ = ["METHODS", "MovingAverage", "Observer", "Stats", "observe"]
