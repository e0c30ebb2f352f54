"""Calibration: what the inputs of layers look like, over any loop, in a state that has no order.

The state of a layer is its extremes, and counts of its numbers by the upper 16 bits of float32. Maxima of
integers and sums of integers have no order. So batches, restarts and ranks give the same bits in any
order. docs/calibration.md has the formulas.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import re
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from . import _checks, _torch, ops
from .formats import FLOAT_DTYPES
from .params import QuantizationParams

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["METHODS", "MovingAverage", "Observer", "Stats", "observe"]

METHODS = ("minmax", "percentile", "mse")
GRANULARITIES = ("tensor", "channel", "token", "group")
_BINS = 1 << 16
_HALF = _BINS // 2
_INFINITE = 0x7F80  # the bins of magnitudes from here on have no finite number
_NORMAL = 0x80  # those below have no normal one
_CHUNK = 1 << 22  # elements that are counted at a time
_CHOICE: dict[str, Any] = {  # what ranges depend on
    "dtype": torch.int8, "sym": True, "include_zero": True, "q_min": None, "q_max": None, "eps": None,
    "scale_rule": None,
}  # fmt: skip
_CLIPS = 100  # ranges that the search of the mean squared error tries, each 1/128 smaller


def _keys(numbers: torch.Tensor) -> torch.Tensor:
    """int32 that sort as float32 do, -0.0 below 0.0; of keys the bits of the numbers."""
    bits = numbers.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _numbers(keys: torch.Tensor) -> torch.Tensor:
    return _keys(keys).view(torch.float32)


def _packed(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Two rows of integers whose maximum joins extremes."""
    return torch.stack([~_keys(low), _keys(high)])


def _upper_edge(negative: torch.Tensor, positive: torch.Tensor, k: int) -> float:
    """The greatest number of the bin that has the k-th smallest number, from 1 on."""
    in_order = torch.cat([negative.flip(0), positive]).cumsum(0)
    i = int(torch.searchsorted(in_order, k))
    if i >= _HALF:
        return _float((i - _HALF) << 16 | 0xFFFF)
    return -_float((_HALF - 1 - i) << 16)


def _float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


class Observer:
    """What one layer's inputs, or any tensors, looked like.

    Args:
        granularity: what shares a scale: "tensor"; "channel", each index of ``channel_dim``; "token",
            each index of the dimension before the last; "group", ``group_size`` neighbours of the last
            dimension.
        group_size: for "group".
        channel_dim: for "channel": -1 for linear layers, 1 for convolutions.
        counts: whether numbers are counted, which "percentile" and "mse" need: 512 KiB for each scale.
            None counts for "tensor" alone.
    """

    extremes: torch.Tensor  # int32 (2, scales): of the minimum and the maximum, joined by maxima
    counts: torch.Tensor  # int64 (scales, 65536), or (0, 65536)
    seen: torch.Tensor  # int64 (4,): finite numbers, NaNs, positive and negative infinities

    def __init__(
        self, granularity: str = "tensor", *, group_size: int | None = None, channel_dim: int = -1,
        counts: bool | None = None,
    ) -> None:  # fmt: skip
        if granularity not in GRANULARITIES:
            expected = f"one of {', '.join(GRANULARITIES)}"
            raise _checks.wrong(ValueError, "granularity", expected, _checks.shown(granularity))
        if (group_size is None) is (granularity == "group") or (
            group_size is not None and _checks.integer("group_size", group_size) < 1
        ):
            expected = 'a positive number with granularity="group", and none without'
            raise _checks.wrong(ValueError, "group_size", expected, _checks.shown(group_size))
        self.granularity, self.group_size = granularity, group_size
        self.channel_dim = _checks.integer("channel_dim", channel_dim)
        counted = granularity == "tensor" if counts is None else _checks.flag("counts", counts)
        self.has_counts = bool(counted)
        self.size, self.rank = 0, 0  # of the dimension that has several scales; of the tensors
        self._allocate(0, torch.device("cpu"))

    def __repr__(self) -> str:
        finite, nan, above, below = self.seen.tolist()
        text = f"Observer({self.granularity}, {finite} numbers"
        if nan or above or below:
            text += f", {nan} NaN, {above + below} infinite"
        return f"{text})"

    @property
    def min(self) -> torch.Tensor:
        """The least finite number for each scale, float32: inf where there was none."""
        return self._shaped(_numbers(~self.extremes[0]))

    @property
    def max(self) -> torch.Tensor:
        """The greatest finite number for each scale, float32: -inf where there was none."""
        return self._shaped(_numbers(self.extremes[1]))

    @torch.inference_mode(False)  # else no later batch could add to the state out of that mode
    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Take x into account. Without elements it changes nothing.

        Of a DTensor each rank takes its shard, and one rank what several have: see :meth:`all_reduce`.
        """
        if not isinstance(x, torch.Tensor) or x.dtype not in FLOAT_DTYPES:
            found = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise _checks.wrong(TypeError, "x", "a tensor of floats", found)
        if x.numel() == 0:
            return
        x = x.detach()
        rank, dim = x.dim(), self._dim(x.dim())
        size, first, group = 1 if dim is None else x.shape[dim], 0, self.group_size or 1
        self._check_size(size)
        if _torch.is_dtensor(x):
            from ._shards import counted_once

            x, first = counted_once(x, dim, group)
        if not self.size:
            self.size = size
            self._allocate(self._scales(), x.device)
        self.rank = max(self.rank, rank)
        if x.numel() == 0:
            return
        if x.dtype == torch.float64:
            x = x.to(
                torch.float32
            )  # rounding keeps the order, so extremes are those of the numbers
        extremes, seen = self._extremes(x, dim)
        counts = self._counted(x, dim) if self.has_counts else None
        device = self.extremes.device
        here = slice(first // group, first // group + extremes.shape[1])
        self.extremes[:, here] = torch.maximum(self.extremes[:, here], extremes.to(device))
        self.seen = self.seen + seen.to(device)
        if counts is not None:
            self.counts[here] += counts.to(device)

    @torch.inference_mode(False)
    def merge(self, other: Observer) -> Observer:
        """Join what another one has seen, and return self."""
        if type(other) is not type(self) or self._form() != other._form():
            raise ValueError(f"merge: {self!r} and {other!r} observe differently")
        if other.size:
            self._check_size(other.size)
            if not self.size:
                self.size = other.size
                self._allocate(self._scales(), other.extremes.device)
            device = self.extremes.device
            self.extremes = torch.maximum(self.extremes, other.extremes.to(device))
            self.counts = self.counts + other.counts.to(device)
            self.seen = self.seen + other.seen.to(device)
            self.rank = max(self.rank, other.rank)
        return self

    @torch.inference_mode(False)
    def all_reduce(self, group: Any = None) -> Observer:
        """Join what all ranks have seen, on each of them, and return self. Call it once, at the end.

        Of DTensors, too: each rank has counted a part of each.
        """
        import torch.distributed as dist

        device = _device_of(group)
        sizes = torch.tensor([self.size, -self.size if self.size else -(2**62), self.rank])
        sizes = sizes.to(device)
        dist.all_reduce(sizes, dist.ReduceOp.MAX, group)
        greatest, least, rank = sizes.tolist()
        if greatest == 0:
            return self
        if greatest != -least:
            raise ValueError(f"all_reduce: ranks saw {-least} and {greatest} {self.granularity}s")
        self.rank = rank
        if not self.size:
            self.size = greatest
            self._allocate(self._scales(), torch.device("cpu"))
        for name, op in (("extremes", "MAX"), ("counts", "SUM"), ("seen", "SUM")):
            state = getattr(self, name)
            joined = state.to(device, copy=True)
            if joined.numel():
                dist.all_reduce(joined, getattr(dist.ReduceOp, op), group)
            setattr(self, name, joined.to(state.device))
        return self

    def qparams(
        self, method: str = "minmax", *, dtype: torch.dtype | str = torch.int8, sym: bool = True,
        include_zero: bool = True, percentile: float = 99.99, q_min: int | None = None,
        q_max: int | None = None, eps: float | None = None, scale_rule: str | None = None,
        round_first: bool = False, allow_nonfinite: bool = False, rank: int | None = None,
    ) -> QuantizationParams:  # fmt: skip
        """Choose static parameters, by float32 steps.

        Args:
            method: "minmax" has the bits of parameters chosen from all inputs side by side. "percentile"
                clips the rest; "mse" clips where the mean squared error is least, of 100 ranges.
            dtype, sym, q_min, q_max, eps, scale_rule, round_first: as for :func:`dynamic_quantize`.
            include_zero: whether asymmetric ranges hold 0.
            percentile: of the numbers to keep inside; asymmetric ranges leave out half of the rest on
                each side.
            allow_nonfinite: leave out NaNs and infinities that were seen, which are an error otherwise.
            rank: of the tensors to quantize, where it is not the greatest that was seen.
        """
        low, high = self.range(
            method, dtype=dtype, sym=sym, include_zero=include_zero, percentile=percentile, q_min=q_min,
            q_max=q_max, eps=eps, scale_rule=scale_rule, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip
        p = _chosen(
            torch.stack([low, high]), [-1, 1], dtype=dtype, sym=sym, include_zero=include_zero,
            q_min=q_min, q_max=q_max, eps=eps, scale_rule=scale_rule, round_first=round_first,
        )  # fmt: skip
        rank = self.rank if rank is None else rank
        p.scale = self._shaped(p.scale, rank)
        p.zero_point = p.zero_point if p.zero_point.dim() == 0 else self._shaped(p.zero_point, rank)
        p.block_size = self._block_size(rank)
        return p

    def range(
        self, method: str = "minmax", *, percentile: float = 99.99, allow_nonfinite: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The limits that the parameters come from, float32, one for each scale.

        options: those of :meth:`qparams` on which "mse" depends, and ``sym``.
        """
        if unknown := options.keys() - _CHOICE:
            raise TypeError(f"range: expected options {', '.join(_CHOICE)}, got {_some(unknown)}")
        options = _CHOICE | options
        if method not in METHODS:
            expected = f"one of {', '.join(METHODS)}"
            raise _checks.wrong(ValueError, "method", expected, _checks.shown(method))
        finite, nan, above, below = self.seen.tolist()
        if (nan or above or below) and not allow_nonfinite:
            raise ValueError(
                f"inputs had {nan} NaN and {above + below} infinite numbers: find out why, or pass "
                "allow_nonfinite=True to leave them out"
            )
        if not finite:
            lost = f"no finite number was seen: {nan} NaN and {above + below} infinite ones"
            raise ValueError(lost if nan or above or below else _NONE)
        low, high = _numbers(~self.extremes[0]), _numbers(self.extremes[1])
        seen = low <= high
        low, high = torch.where(seen, low, 0.0), torch.where(seen, high, 0.0)
        if method == "minmax":
            return low, high
        if not self.has_counts:
            raise ValueError(f"method {method!r} needs counts=True")
        number = _checks.real("percentile", percentile)
        if isinstance(number, bool) or not 0 < number <= 100:
            expected = "a number above 0, up to 100"
            raise _checks.wrong(ValueError, "percentile", expected, _checks.shown(percentile))
        part = Fraction(str(number)) / 100
        pairs: list[Sequence[float]] = []
        for counts, *limits in zip(self.counts.cpu(), low.tolist(), high.tolist(), strict=True):
            if not counts.any():
                pairs.append(limits)
            elif method == "percentile":
                pairs.append(_percentile(counts, limits, part, options["sym"]))
            else:
                pairs.append(_least_error(counts, limits, options))
        chosen = torch.tensor(pairs, dtype=torch.float32, device=low.device)
        return chosen[:, 0], chosen[:, 1]

    # ---- the state in files ----

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors of integers, which torch.save and safetensors take."""
        form = [GRANULARITIES.index(self.granularity), self.group_size or 0, self.channel_dim]
        form += [int(self.has_counts), self.size, self.rank]
        state = {"form": torch.tensor(form), "extremes": self.extremes, "seen": self.seen}
        if self.has_counts:
            state["counts"] = self.counts
        return {name: t.detach().cpu().clone() for name, t in state.items()}

    @classmethod
    @torch.inference_mode(False)
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], **options: Any) -> Self:
        """The observer again; options are those that the state does not hold: momentum."""

        def taken(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
            t = state.get(name)
            expected, found = f"{dtype} {shape} of an Observer", type(t).__name__
            if isinstance(t, torch.Tensor):
                found = f"{t.dtype} {tuple(t.shape)}"
                if (t.dtype, tuple(t.shape)) == (dtype, shape):
                    if name in ("seen", "counts") and bool((t < 0).any()):
                        raise _checks.wrong(ValueError, name, expected, "negative numbers")
                    return t.clone()
            raise _checks.wrong(ValueError, name, expected, found)

        form = taken("form", torch.int64, (6,)).tolist()
        if not 0 <= form[0] < len(GRANULARITIES) or min(form[3:]) < 0:
            raise ValueError(f"form: expected that of an Observer, got {form}")
        options |= {"group_size": form[1] or None, "channel_dim": form[2]}
        options |= {"counts": bool(form[3])} if cls is Observer else {}
        made = cls(GRANULARITIES[form[0]], **options)
        made.size, made.rank = form[4:]
        scales = made._scales() if made.size > 0 else 0
        made.extremes = taken("extremes", torch.int32, (2, scales))
        made.seen = taken("seen", torch.int64, (4,))
        if made.has_counts:
            made.counts = taken("counts", torch.int64, (scales, _BINS))
        return made

    # ---- within ----

    def _form(self) -> tuple[Any, ...]:
        return self.granularity, self.group_size, self.channel_dim, self.has_counts

    def _allocate(self, scales: int, device: torch.device) -> None:
        none = torch.full((scales,), math.inf, device=device)
        self.extremes = _packed(none, -none)
        rows = scales if self.has_counts else 0
        self.counts = torch.zeros((rows, _BINS), dtype=torch.int64, device=device)
        self.seen = torch.zeros(4, dtype=torch.int64, device=device)

    def _scales(self) -> int:
        return -(-self.size // (self.group_size or 1))

    def _check_size(self, size: int) -> None:
        if self.size and size != self.size:
            raise ValueError(
                f"granularity {self.granularity!r} needs the same number in every batch: expected "
                f"{self.size}, got {size}"
            )

    def _dim(self, rank: int) -> int | None:
        """The dimension that has several scales."""
        if self.granularity == "tensor":
            return None
        dims = {"channel": self.channel_dim, "token": -2, "group": -1}
        dim = dims[self.granularity]
        if not -rank <= dim < rank:
            raise ValueError(
                f"granularity {self.granularity!r} needs dimension {dim} of rank {rank}"
            )
        return dim % rank

    def _block_size(self, rank: int) -> tuple[int, ...] | None:
        dim = self._dim(rank)
        if dim is None:
            return None
        return tuple(self.group_size or 1 if d == dim else -1 for d in range(rank))

    def _shaped(self, row: torch.Tensor, rank: int | None = None) -> torch.Tensor:
        """One number for each scale, as a tensor of this rank is quantized by them."""
        rank = self.rank if rank is None else rank
        dim = self._dim(rank) if self.size else None
        if dim is None:
            return row.reshape(()) if self.size else row
        return row.reshape([-1 if d == dim else 1 for d in range(rank)])

    def _extremes(self, x: torch.Tensor, dim: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the finite numbers of x, packed, and what was seen."""
        blocks = self._block_size(x.dim())
        low, high = (t.float().flatten() for t in ops.aminmax(x, block_size=blocks))
        lost = torch.zeros(3, dtype=torch.int64, device=x.device)
        if not bool((low.isfinite() & high.isfinite()).all()):
            is_finite = x.isfinite()
            low = ops.aminmax(torch.where(is_finite, x, math.inf), block_size=blocks)[0]
            high = ops.aminmax(torch.where(is_finite, x, -math.inf), block_size=blocks)[1]
            low, high = low.float().flatten(), high.float().flatten()
            lost = torch.stack([x.isnan().sum(), (x == math.inf).sum(), (x == -math.inf).sum()])
        finite = x.numel() - lost.sum()
        return _packed(low, high), torch.cat([finite.view(1), lost])

    def _counted(self, x: torch.Tensor, dim: int | None) -> torch.Tensor:
        size, group = 1 if dim is None else x.shape[dim], self.group_size or 1
        columns = x.reshape(-1, 1) if dim is None else x.movedim(dim, -1).reshape(-1, size)
        scales = -(-size // group)
        first = torch.arange(size, device=x.device) // group * _BINS + _HALF
        counts = torch.zeros(scales * _BINS, dtype=torch.int64, device=x.device)
        for rows in columns.split(max(1, _CHUNK // size)):
            bins = (rows.float().contiguous().view(torch.int32) >> 16) + first
            counts += torch.bincount(bins.flatten(), minlength=scales * _BINS)
        halves = counts.view(scales, 2, _HALF)
        halves[..., _INFINITE:] = 0
        return halves.view(scales, _BINS)


_NONE = (
    "no number was seen: did the model run inside observe()? Leave out layers that do not run by "
    "exclude=. Of DTensors some ranks see none before all_reduce()"
)


def _chosen(pair: torch.Tensor, blocks: Sequence[int], **options: Any) -> QuantizationParams:
    sym, include_zero = options.pop("sym"), options.pop("include_zero")
    given = {"block_size": blocks, "compute_dtype": torch.float32, **options}
    if sym:
        return ops.get_symmetric_qparams(pair, **given)
    if given.pop("scale_rule") is not None:
        raise ValueError("scale_rule: expected None with sym=False")
    return ops.get_asymmetric_qparams(pair, include_zero=include_zero, **given)


def _percentile(
    counts: torch.Tensor, limits: Sequence[float], part: Fraction, sym: bool
) -> Sequence[float]:
    """The range that holds this part of the numbers, to the width of a bin, within the extremes."""
    low, high = limits
    negative, positive = counts[:_HALF], counts[_HALF:]
    n = int(counts.sum())
    if sym:
        magnitudes = negative + positive
        limit = _upper_edge(torch.zeros_like(magnitudes), magnitudes, math.ceil(n * part))
        limit = min(limit, max(abs(low), abs(high)))
        return -limit, limit
    k = math.ceil(n * (1 + part) / 2)
    at_most = _upper_edge(negative, positive, k)
    at_least = -_upper_edge(positive, negative, k)
    return max(at_least, low), min(at_most, high)


def _least_error(
    counts: torch.Tensor, limits: Sequence[float], options: Mapping[str, Any]
) -> Sequence[float]:
    """Of the extremes times 128/128, 127/128 … those that give the least sum of squared errors.

    A bin counts as its middle. Products are single steps of float64 and sums are rounded once
    (math.fsum), so that no machine differs. Of equal sums the widest range is taken.
    """
    bins = counts.nonzero().flatten()
    magnitude = torch.where(bins < _HALF, bins, bins - _HALF)
    middle = torch.where(magnitude < _NORMAL, 0, magnitude << 16 | 0x8000)
    numbers = middle.to(torch.int32).view(torch.float32)
    numbers = torch.where(bins < _HALF, -numbers, numbers).clamp(*limits)
    clips = (128 - torch.arange(_CLIPS, dtype=torch.float64)) / 128
    pairs = (clips[:, None] * torch.tensor(limits, dtype=torch.float64)).to(torch.float32)
    p = _chosen(pairs, [1, -1], round_first=False, **options)
    there = numbers.expand(_CLIPS, -1)
    errors = (ops.fake_quantize(there, p).double() - there.double()).square() * counts[
        bins
    ].double()
    sums = [math.fsum(row) for row in errors.tolist()]
    return pairs[sums.index(min(sums))].tolist()


class MovingAverage(Observer):
    """Extremes that move towards each batch's, for the ranges of quantization-aware training.

    Weights change while it trains, so old batches must fade. The order of batches then shows in the
    result, and two averages cannot be merged: for calibration take an :class:`Observer`.
    """

    def __init__(
        self, granularity: str = "tensor", *, momentum: float = 0.01, group_size: int | None = None,
        channel_dim: int = -1,
    ) -> None:  # fmt: skip
        super().__init__(granularity, group_size=group_size, channel_dim=channel_dim, counts=False)
        if not 0 < _checks.real("momentum", momentum) <= 1:
            expected = "a number above 0, up to 1"
            raise _checks.wrong(ValueError, "momentum", expected, _checks.shown(momentum))
        self.momentum = float(momentum)

    @torch.no_grad()
    def update(self, x: torch.Tensor, group: Any = None, all_ranks: bool = False) -> None:
        """Move towards the extremes of x; with all_ranks, of all ranks of the group, the same on each."""
        if _torch.is_dtensor(x) and not all_ranks:
            raise ValueError("update: a DTensor needs all_ranks=True")
        batch = Observer(
            self.granularity, group_size=self.group_size, channel_dim=self.channel_dim, counts=False
        )
        batch.update(x)
        if all_ranks:
            batch.all_reduce(group)
        if not batch.size:
            return
        self._check_size(batch.size)
        device = batch.extremes.device
        if not self.size:
            self.size = batch.size
            self._allocate(self._scales(), device)
        self.rank = max(self.rank, batch.rank)
        moved = []
        for row in (0, 1):
            old, new = (_unpacked(o.extremes.to(device), row) for o in (self, batch))
            step = torch.where(old.isfinite(), old + (new - old) * self.momentum, new)
            moved.append(torch.where(new.isfinite(), step, old))
        self.extremes = _packed(*moved)
        self.seen = self.seen.to(device) + batch.seen

    def merge(self, other: Observer) -> Observer:
        raise ValueError("merge: moving averages depend on the order of batches")

    def all_reduce(self, group: Any = None) -> Observer:
        raise ValueError("all_reduce: pass all_ranks=True to update() instead")


def _unpacked(extremes: torch.Tensor, row: int) -> torch.Tensor:
    return _numbers(~extremes[0] if row == 0 else extremes[1])


def _device_of(group: Any) -> torch.device:
    import torch.distributed as dist

    on_gpus = "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")


class Stats(Mapping[str, Observer]):
    """What :func:`observe` has seen: an :class:`Observer` for the name of each layer."""

    def __init__(self, observers: Mapping[str, Observer]) -> None:
        self._observers = dict(observers)
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:  # without the lock
        return type(self), (self._observers,)

    def __getitem__(self, name: str) -> Observer:
        return self._observers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._observers)

    def __len__(self) -> int:
        return len(self._observers)

    def __repr__(self) -> str:
        return f"Stats of {len(self)} layers"

    def update(self, name: str, x: torch.Tensor) -> None:
        """Take x into account for a layer; threads may call it."""
        with self._lock:
            try:
                self._observers[name].update(x)
            except (TypeError, ValueError) as error:
                raise type(error)(f"input of {name!r}: {error}") from None

    def merge(self, other: Stats) -> Stats:
        """Join what other Stats of the same layers have seen, and return self."""
        if set(self) != set(other):
            raise ValueError(f"merge: layers differ: {_some(set(self) ^ set(other))}")
        for name, observer in self.items():
            observer.merge(other[name])
        return self

    def all_reduce(self, group: Any = None) -> Stats:
        """Join what all ranks have seen, on each of them, and return self. Call it once, at the end."""
        import torch.distributed as dist

        form = str([(name, o._form()) for name, o in sorted(self.items())]).encode()
        check = torch.tensor([zlib.crc32(form), -zlib.crc32(form)], device=_device_of(group))
        dist.all_reduce(check, dist.ReduceOp.MAX, group)
        if int(check.sum()) != 0:
            raise ValueError("all_reduce: ranks observe different layers, or differently")
        for _, observer in sorted(self.items()):
            observer.all_reduce(group)
        return self

    def qparams(self, method: str = "minmax", **options: Any) -> dict[str, QuantizationParams]:
        """The parameters of each layer: see :meth:`Observer.qparams`.

        Layers that have not run are an error that names them.
        """
        if unseen := [name for name, observer in self.items() if not observer.seen.any()]:
            raise ValueError(f"{_some(unseen, 50)}: {_NONE}")
        chosen = {}
        for name, observer in self.items():
            try:
                chosen[name] = observer.qparams(method, **options)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
        return chosen

    def input_scales(self, method: str = "minmax", **options: Any) -> dict[str, torch.Tensor]:
        """``NAME.input_scale``, and with sym=False ``NAME.input_zero_point``, each of shape (1,).

        These are the names of compressed-tensors' checkpoints, whose layers have one static scale.
        """
        tensors = {}
        for name, p in self.qparams(method, **options).items():
            if p.scale.dim():
                raise ValueError(f'{name!r}: input_scale needs granularity="tensor"')
            prefix = f"{name}." if name else ""
            tensors[f"{prefix}input_scale"] = p.scale.cpu().reshape(1)
            if not options.get("sym", True):
                f = _checks.format_of(p.dtype)
                whole = torch.int8 if f.low < 0 else torch.uint8
                kept = p.zero_point.cpu().reshape(1).to(whole if f.bits < 8 else f.dtype)
                tensors[f"{prefix}input_zero_point"] = kept
        return tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors of integers by ``layer.what``, which torch.save and safetensors take."""
        return {f"{n}.{key}": t for n, o in self.items() for key, t in o.state_dict().items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> Stats:
        """The inverse of :meth:`state_dict`."""
        if not isinstance(state, Mapping):
            raise _checks.wrong(TypeError, "state", "that of Stats", type(state).__name__)
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for key, t in state.items():
            name, _, what = str(key).rpartition(".")
            layers.setdefault(name, {})[what] = t
        made = {}
        for name, layer in layers.items():
            try:
                made[name] = Observer.from_state_dict(layer)
            except ValueError as error:
                raise ValueError(f"state of {name!r}: {error}") from None
        return cls(made)

    def save(self, path: Any) -> None:
        """Write :meth:`state_dict` by torch.save."""
        torch.save(self.state_dict(), path)

    @classmethod
    def load(cls, path: Any) -> Stats:
        """What :meth:`save` has written."""
        return cls.from_state_dict(torch.load(path, weights_only=True, map_location="cpu"))


def _some(names: Any, most: int = 3) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(map(repr, names[:most])) + more


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _layers(
    model: torch.nn.Module, types: Any, include: str | Sequence[str], exclude: str | Sequence[str]
) -> dict[str, torch.nn.Module]:
    _checks.module("model", model)
    kinds = types if isinstance(types, tuple) else (types,)
    if not kinds or not all(isinstance(kind, type) for kind in kinds):
        raise _checks.wrong(
            TypeError, "types", "a class of layers or a tuple", _checks.shown(types)
        )
    included, excluded = (
        _checks.patterns(name, [value] if isinstance(value, str) else value)
        for name, value in (("include", include), ("exclude", exclude))
    )
    there = {}
    for name, m in model.named_modules(remove_duplicate=False):
        # nn.MultiheadAttention reads the weight of its out_proj and never calls it.
        if isinstance(m, kinds) and (type(m) is not _NEVER_CALLED or _NEVER_CALLED in kinds):
            there[".".join(part for part in name.split(".") if part != "_orig_mod")] = m
    of_types = " or ".join(kind.__name__ for kind in kinds)
    if not there:
        raise ValueError(f"model: expected layers of types {of_types}, got none: pass types=")
    for pattern in [*included, *excluded]:
        if not any(_matches(pattern, name) for name in there):
            raise ValueError(f"pattern {pattern!r}: matches no layer of types {of_types}")
    layers: dict[torch.nn.Module, str] = {}
    for name, m in there.items():
        wanted = not included or any(_matches(p, name) for p in included)
        if wanted and not any(_matches(p, name) for p in excluded):
            layers.setdefault(m, name)
    if not layers:
        raise ValueError("exclude: expected some layer that no pattern matches, got none")
    return {name: m for m, name in layers.items()}


_NEVER_CALLED = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
_lock = threading.Lock()
_blocks: list[None] = []  # of all threads
_stances: list[Any] = []  # the compiler's, while there are blocks


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Compiled functions run eagerly: a graph that was made without the hooks runs none."""
    with _lock:
        _blocks.append(None)
        if not _stances and "torch._dynamo" in sys.modules:  # importing it takes seconds
            _stances.append(torch.compiler.set_stance("force_eager"))
            _stances[0].__enter__()
    try:
        yield
    finally:
        with _lock:
            _blocks.pop()
            if _stances and not _blocks:
                _stances.pop().__exit__(None, None, None)


@contextlib.contextmanager
def observe(
    model: torch.nn.Module,
    *,
    types: type[torch.nn.Module] | tuple[type[torch.nn.Module], ...] = torch.nn.Linear,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    granularity: str = "tensor",
    group_size: int | None = None,
    channel_dim: int = -1,
    counts: bool | None = None,
    into: Stats | None = None,
) -> Iterator[Stats]:
    """Observe the inputs of layers while a ``with`` block runs the model, on any loop.

    Extremes and integer counts are all that is kept. They have no order: the same batches in another
    order, in parts that are merged, or on several ranks give the same bits. Of inputs that are DTensors
    each rank counts its shard: call ``stats.all_reduce()``.

    Args:
        model: it runs as it is, and eagerly where it was compiled; forward hooks read the first tensor
            that each layer gets. Of nested tensors they read the numbers, without padding.
        types: the classes of the layers.
        include, exclude: patterns of their names: globs, or after ``re:`` regular expressions that
            match from the beginning. Without include all layers are observed. A pattern that matches
            nothing is an error.
        granularity: "tensor", "channel" (each index of ``channel_dim``), "token" (each index of the
            dimension before the last: inputs of one length) or "group" (``group_size`` neighbours of
            the last dimension).
        group_size, channel_dim: for "group" and "channel"; convolutions have channel_dim 1.
        counts: whether numbers are counted, for "percentile" and "mse": 512 KiB for each scale. None
            counts for "tensor" alone.
        into: Stats to go on with, such as those of an earlier run.

    Returns:
        a context manager that gives ``quantkit.observers.Stats``, a mapping from names to observers.
        ``stats.qparams(method)`` chooses QuantizationParams for each layer, ``stats.input_scales()``
        the tensors of a file. ``merge``, ``all_reduce``, ``save`` and ``load`` join and keep it.

    Raises:
        ValueError or TypeError that names the pattern or the layer.

    docs/calibration.md says which method and granularity to choose.
    """
    layers = _layers(model, types, include, exclude)
    form = {
        "granularity": granularity, "group_size": group_size, "channel_dim": channel_dim,
        "counts": counts,
    }  # fmt: skip
    observers = {name: Observer(**form) for name in layers}  # type: ignore[arg-type]
    stats = Stats(observers) if into is None else into
    if set(stats) != set(observers):
        raise ValueError(f"into: layers differ: {_some(set(stats) ^ set(observers))}")
    for name, observer in observers.items():
        if stats[name]._form() != observer._form():
            raise ValueError(f"into: {name!r} was observed in another way")
    handles = []
    try:
        for name, layer in layers.items():
            hook = _hook(stats, name)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        with _without_compiler():
            yield stats
    finally:
        for handle in handles:
            handle.remove()


def _hook(stats: Stats, name: str) -> Any:
    def hook(layer: torch.nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        for x in (*args, *keywords.values()):
            if isinstance(x, torch.Tensor):
                if x.is_nested:  # nn.TransformerEncoder makes them where a mask names padding
                    x = torch.cat(x.unbind()).unsqueeze(0)
                return stats.update(name, x)
        raise TypeError(f"input of {name!r}: expected a tensor")

    return hook
