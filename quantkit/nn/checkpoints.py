"""Checkpoints of ``quantkit quantize`` in models."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn

from .. import _torch
from ..checkpoint import Checkpoint
from ..params import QuantizationParams
from .layers import LAYERS, QuantizedLayer, QuantLinear, check_activations
from .models import check_unwrapped, set_fast_paths


def load_checkpoint_(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    activations: str | None = None,
    strict: bool = True,
) -> dict[str, nn.Module]:
    """Load a checkpoint of :func:`quantkit.checkpoint.quantize` into a model, of every layout.

    Layers become what the checkpoint says: codes go into quantized layers of its schemes, and floats into
    float layers. Layers that have it otherwise are replaced. So a model that :func:`quantize_model_` has
    prepared will do, and so will the float model. Both may be on the device "meta": what is loaded is
    on the CPU then. One tensor at a time is read.

    Args:
        model: with the names of the checkpoint, and plain tensors: load first, then shard.
        path: a folder or file, as for :class:`quantkit.checkpoint.Checkpoint`.
        activations: "int8" for the Linear layers whose weights can have it. Layers that
            :func:`quantize_model_` has prepared keep theirs, where their weights can.
        strict: whether tensors that are missing, and those that the model does not have, are an error.

    A layer tied to a weight that becomes codes, and not named in the checkpoint, gets the decoded weight.

    Returns:
        The quantized layers by name.

    Raises:
        RuntimeError that names missing and unexpected tensors. ValueError or TypeError for a layer that
        cannot hold its tensor. CheckpointError for files that are wrong. Nothing is loaded then, unless
        the numbers of a tensor cannot be read.
    """
    check_unwrapped(model)
    check_activations(activations)
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, p in held.items():
        if _torch.is_dtensor(p):
            raise ValueError(
                f"{name}: expected a plain tensor, got a DTensor; load first, then shard"
            )
    with Checkpoint(path) as there:
        # Which tensors the model has, under every name.
        buffers = {n for n in model.state_dict(keep_vars=True) if n not in held}
        layers = dict(model.named_modules(remove_duplicate=False))
        expected = {n for n in held.keys() | buffers if not _is_inner(n, layers)}
        names = set(there)
        absent = [n for n in held if n not in names]
        if strict:
            # A tied weight is written once.
            known = {_owner(n, held, layers) for n in expected & names if n in held}
            missing = sorted(
                n for n in expected - names if n not in held or _owner(n, held, layers) not in known
            )
            unexpected = sorted(names - expected)
            if missing or unexpected:
                raise RuntimeError(
                    f"load_checkpoint_: missing {_some(missing)}; unexpected {_some(unexpected)}"
                )
        # Codes come first, so floats win where both are for one tied weight.
        wanted = [name for name in there if name in expected]
        for name in wanted:
            _check(name, layers[name.rpartition(".")[0]], there)
        done: dict[str, nn.Module] = {}
        moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for name in wanted:
            parent, _, leaf = name.rpartition(".")
            value = there[name]
            layer = layers[parent]
            if isinstance(value, tuple):
                weight = there.weights[name]
                new = _quantized(parent, layer, value, activations, weight.scheme)
                _put(layers, layer, new)
                done[parent] = new
                for other in absent:
                    at, _, leaf = other.rpartition(".")
                    coded = any(isinstance(a, QuantizedLayer) for a in (layer, layers[at]))
                    if held[other] is held.get(name) and not coded:
                        _copy(layers[at], leaf, new.dequantized(), moved)
                        break  # the other tied ones share it
                continue
            if leaf == "weight" and isinstance(layer, QuantizedLayer):
                float_layer = layer._skeleton(layer.weight.device)
                _put(layers, layer, float_layer)
                layer = float_layer
            _copy(layer, leaf, value, moved)
        # Parameters that share memory share what was loaded.
        for module in model.modules():
            for leaf, p in module.named_parameters(recurse=False):
                if id(p) in moved:
                    setattr(module, leaf, moved[id(p)][1])
        set_fast_paths(model)
        return done


def _check(name: str, layer: Any, there: Checkpoint) -> None:
    """Raise what keeps a layer from holding a tensor, before any is read."""
    parent, _, leaf = name.rpartition(".")
    quantized = isinstance(layer, QuantizedLayer)
    if name in there.weights and not quantized:
        if not parent:
            got = type(layer).__name__
            raise ValueError(f"model: expected a module with layers inside, got {got}")
        if type(layer) not in LAYERS:
            raise ValueError(
                f"{parent}: expected Linear, Embedding or Conv2d for a quantized weight, got "
                f"{type(layer).__name__}"
            )
        try:
            LAYERS[type(layer)]._check(layer)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{parent} ({type(layer).__name__}): {error}") from None
    held = layer.shape if quantized and leaf == "weight" else getattr(layer, leaf).shape
    if (shape := tuple(there.shape(name))) != tuple(held):
        kind = f"{parent} ({type(layer).__name__}): {leaf}"
        raise ValueError(f"{kind}: expected shape {tuple(held)}, got {shape} in the checkpoint")


def _is_inner(name: str, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor is one of a quantized weight, beside its codes."""
    parent, _, leaf = name.rpartition(".")
    return isinstance(layers.get(parent), QuantizedLayer) and leaf.startswith("weight_")


def _owner(name: str, held: Mapping[str, nn.Parameter], layers: Mapping[str, nn.Module]) -> int:
    """The id of what a tensor fills: a Parameter, or of codes the layer, which alone has their scales."""
    parent, _, leaf = name.rpartition(".")
    coded = leaf == "weight" and isinstance(layers[parent], QuantizedLayer)
    return id(layers[parent] if coded else held[name])


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5) or "none"


def _put(layers: dict[str, nn.Module], old: nn.Module, new: nn.Module) -> None:
    """A layer in all places of another."""
    for name, module in list(layers.items()):
        if module is old:
            parent, _, leaf = name.rpartition(".")
            setattr(layers[parent], leaf, new)
            layers[name] = new


def _quantized(
    name: str, layer: nn.Module, value: tuple[torch.Tensor, QuantizationParams],
    activations: str | None, scheme: Any,
) -> QuantizedLayer:  # fmt: skip
    """The layer of a weight of the checkpoint."""
    if isinstance(layer, QuantizedLayer):
        device, skeleton = layer.weight.device, layer._skeleton()
        activations = activations or layer.activations
    else:
        weight: Any = layer.weight
        device, skeleton = weight.device, layer
    q, p = value
    if device.type != "meta":
        q, p = q.to(device), p.to(device)
    new = LAYERS[type(skeleton)]
    inputs = activations if new is QuantLinear else None
    by_row = scheme.scale in ("weight", "float32") and scheme.block in (None, (1, -1))
    if inputs is not None and not (scheme.dtype == "int8" and scheme.symmetric and by_row):
        inputs = None
    try:
        return new(skeleton, q, p, inputs, scheme=scheme.name, symmetric=scheme.symmetric)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} ({type(layer).__name__}): {error}") from None


def _copy(
    layer: nn.Module, leaf: str, value: torch.Tensor,
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]],
) -> None:  # fmt: skip
    old: Any = getattr(layer, leaf)
    if id(old) in moved:  # tied to what was loaded
        old = moved[id(old)][1]
        setattr(layer, leaf, old)
    if not old.is_meta:
        with torch.no_grad():
            old.copy_(value)
    elif isinstance(old, nn.Parameter):
        new = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
        moved[id(old)] = old, new  # both: the id of what is gone may be another's
        setattr(layer, leaf, new)
    else:
        setattr(layer, leaf, value.to(old.dtype))
