"""`observe`: hooks on the layers of a model, while it runs."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import _checks
from .observer import Observer, some
from .stats import Stats


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _layers(
    model: torch.nn.Module, types: Any, include: str | Sequence[str], exclude: str | Sequence[str]
) -> dict[str, torch.nn.Module]:
    _checks.module("model", model)
    kinds = types if isinstance(types, tuple) else (types,)
    if wrong := [kind for kind in kinds or (types,) if not isinstance(kind, type)]:
        expected = "a class of layers or a tuple of classes"
        raise _checks.wrong(TypeError, "types", expected, _checks.shown(wrong[0]))
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
    if not isinstance(into, Stats | None):
        raise _checks.wrong(TypeError, "into", "Stats or None", _checks.shown(into))
    layers = _layers(model, types, include, exclude)
    observers = {
        name: Observer(granularity, group_size=group_size, channel_dim=channel_dim, counts=counts)
        for name in layers
    }
    stats = Stats(observers) if into is None else into
    if set(stats) != set(observers):
        raise ValueError(f"into: layers differ: {some(set(stats) ^ set(observers))}")
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
