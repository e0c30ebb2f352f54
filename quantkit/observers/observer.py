"""What an observer keeps, and how it is joined: extremes and counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .. import _checks, _torch
from ..formats import FLOAT_DTYPES
from ..params import QuantizationParams
from .counts import BINS, counts_of
from .extremes import extremes_of, packed, unpacked
from .ranges import CHOICE, METHODS, chosen, clipped

if TYPE_CHECKING:
    from typing_extensions import Self

GRANULARITIES = ("tensor", "channel", "token", "group")
MAX_RANK = 64  # of states that are loaded, as shapes are made of it
NOTHING_SEEN = (
    "no number was seen: did the model run inside observe()? Leave out layers that do not run by "
    "exclude=. Of DTensors some ranks see none before all_reduce()"
)


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
        self._allocate(torch.device("cpu"))

    def __repr__(self) -> str:
        finite, nan, above, below = self.seen.tolist()
        text = f"Observer({self.granularity}, {finite} numbers"
        if nan or above or below:
            text += f", {nan} NaN, {above + below} infinite"
        return f"{text})"

    @property
    def min(self) -> torch.Tensor:
        """The least finite number for each scale, float32: inf where there was none."""
        return self._shaped(unpacked(self.extremes)[0])

    @property
    def max(self) -> torch.Tensor:
        """The greatest finite number for each scale, float32: -inf where there was none."""
        return self._shaped(unpacked(self.extremes)[1])

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
            from .._shards import counted_once

            x, first = counted_once(x, dim, group)
        self._begin(size, rank, x.device)
        if x.numel() == 0:
            return
        if x.dtype == torch.float64:  # rounding keeps the order, so extremes become extremes
            x = x.to(torch.float32)
        extremes, seen = extremes_of(x, self._block_size(x.dim()))
        counts = counts_of(x, dim, group) if self.has_counts else None
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
            self._begin(other.size, other.rank, other.extremes.device)
            device = self.extremes.device
            self.extremes = torch.maximum(self.extremes, other.extremes.to(device))
            self.counts = self.counts + other.counts.to(device)
            self.seen = self.seen + other.seen.to(device)
        return self

    @torch.inference_mode(False)
    def all_reduce(self, group: Any = None) -> Observer:
        """Join what all ranks have seen, on each of them, and return self. Call it once, at the end.

        Of DTensors, too: each rank has counted a part of each.
        """
        import torch.distributed as dist

        device = device_of(group)
        sizes = torch.tensor([self.size, -self.size if self.size else -(2**62), self.rank])
        sizes = sizes.to(device)
        dist.all_reduce(sizes, dist.ReduceOp.MAX, group)
        greatest, least, rank = sizes.tolist()
        if greatest == 0:
            return self
        if greatest != -least:
            raise ValueError(f"all_reduce: ranks saw {-least} and {greatest} {self.granularity}s")
        self._begin(greatest, rank, torch.device("cpu"))
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
        if rank is not None and _checks.integer("rank", rank) < 0:
            raise _checks.wrong(ValueError, "rank", "a number of dimensions", _checks.shown(rank))
        options: dict[str, Any] = {
            "dtype": dtype, "sym": sym, "include_zero": include_zero, "q_min": q_min, "q_max": q_max,
            "eps": eps, "scale_rule": scale_rule,
        }  # fmt: skip
        pair = self.range(method, percentile=percentile, allow_nonfinite=allow_nonfinite, **options)
        p = chosen(torch.stack(pair), [-1, 1], round_first=round_first, **options)
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
        if unknown := options.keys() - CHOICE:
            raise TypeError(f"range: expected options {', '.join(CHOICE)}, got {some(unknown)}")
        options = CHOICE | options
        for flag in ("sym", "include_zero"):
            _checks.flag(flag, options[flag])
        _checks.flag("allow_nonfinite", allow_nonfinite)
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
            raise ValueError(lost if nan or above or below else NOTHING_SEEN)
        low, high = unpacked(self.extremes)
        seen = low <= high
        low, high = torch.where(seen, low, 0.0), torch.where(seen, high, 0.0)
        if method == "minmax":
            return low, high
        if not self.has_counts:
            raise ValueError(f"method {method!r} needs counts=True")
        return clipped(low, high, self.counts, method, percentile, options)

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
        seen = taken("seen", torch.int64, (4,))
        size, rank = form[4:]
        if (
            not 0 <= form[0] < len(GRANULARITIES)
            or min(form[3:]) < 0
            or (size > 1 and GRANULARITIES[form[0]] == "tensor")
            or (size == 0 and bool(seen.any()))
            or rank > MAX_RANK
        ):
            raise ValueError(f"form: expected that of an Observer, got {form}")
        options |= {"group_size": form[1] or None, "channel_dim": form[2]}
        options |= {"counts": bool(form[3])} if cls is Observer else {}
        made = cls(GRANULARITIES[form[0]], **options)
        made.size, made.rank, made.seen = size, rank, seen
        scales = made._scales()
        made.extremes = taken("extremes", torch.int32, (2, scales))
        if made.has_counts:
            made.counts = taken("counts", torch.int64, (scales, BINS))
        return made

    # ---- within ----

    def _form(self) -> tuple[Any, ...]:
        return self.granularity, self.group_size, self.channel_dim, self.has_counts

    def _begin(self, size: int, rank: int, device: torch.device) -> None:
        """Take memory, if this is the first size."""
        if not self.size:
            self.size = size
            self._allocate(device)
        self.rank = max(self.rank, rank)

    def _allocate(self, device: torch.device) -> None:
        none = torch.full((self._scales(),), math.inf, device=device)
        self.extremes = packed(none, -none)
        rows = self._scales() if self.has_counts else 0
        self.counts = torch.zeros((rows, BINS), dtype=torch.int64, device=device)
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


def device_of(group: Any) -> torch.device:
    """Where the backend of a group takes tensors."""
    import torch.distributed as dist

    on_gpus = "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")


def some(names: Any, most: int = 3) -> str:
    """The first of these names, for an error."""
    names = sorted(names)
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(map(repr, names[:most])) + more
