"""What was seen of a model: an observer for each layer."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .. import _checks
from ..params import QuantizationParams
from .observer import NOTHING_SEEN, Observer, device_of, some


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
        if not isinstance(other, Stats):
            raise _checks.wrong(TypeError, "other", "Stats", _checks.shown(other))
        if set(self) != set(other):
            raise ValueError(f"merge: layers differ: {some(set(self) ^ set(other))}")
        for name, observer in self.items():
            observer.merge(other[name])
        return self

    def all_reduce(self, group: Any = None) -> Stats:
        """Join what all ranks have seen, on each of them, and return self. Call it once, at the end."""
        import torch.distributed as dist

        form = str([(name, o._form()) for name, o in sorted(self.items())]).encode()
        check = torch.tensor([zlib.crc32(form), -zlib.crc32(form)], device=device_of(group))
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
            raise ValueError(f"{some(unseen, 50)}: {NOTHING_SEEN}")
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
