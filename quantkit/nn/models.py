"""Models whose layers become quantized layers in place, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import _checks
from ..checkpoint.plan import KEPT, matches
from .layers import LAYERS, QuantizedLayer, QuantLinear, check_activations, check_finite

Scheme = str | Mapping[str, Any]
Rules = Sequence[tuple[str, Scheme | None]]


def quantize_model_(
    model: nn.Module,
    scheme: Scheme | Rules = "int8_channel",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    activations: str | None = None,
) -> dict[str, nn.Module]:
    """Replace Linear, Embedding and Conv2d layers of a model by quantized ones, in place.

    By default it leaves out what ``quantkit quantize`` leaves out: layers with the names of embeddings,
    norms, routers and heads, and weights that are tied to others.

    Weights may be DTensors: each rank quantizes its shard, and none is gathered. Hooks of tensor parallel
    stay. FSDP2 and DDP come afterwards.

    Args:
        model: a module with such layers inside.
        scheme: of all layers: a name of :data:`quantkit.SCHEMES`, or keywords of
            :func:`dynamic_quantize`. Or rules: pairs of a pattern and a scheme, None for a layer that
            stays. The first that matches wins, and layers without a rule stay.
        include: patterns of layers that get the scheme, though they are embeddings or the like.
        exclude: patterns of layers that stay as they are. They win.
        activations: "int8" for Linear layers that quantize their inputs, too, as :func:`linear_w8a8`.
            Embedding and Conv2d layers stay weight-only.

    A pattern is a glob, or after "re:" a regular expression that matches from the beginning. It is tried
    on the layer's name, and on that of its weight.

    Returns:
        The new layers by name.

    Raises:
        TypeError or ValueError that names the layer that cannot have its scheme, or the pattern that
        matches nothing, or the wrapper (FSDP2, FSDP, DDP) that keeps the old parameters. The model is as
        it was then.

    docs/layers.md has more, docs/distributed.md of shards.
    """
    include, exclude = _checks.patterns("include", include), _checks.patterns("exclude", exclude)
    check_activations(activations)
    if isinstance(scheme, str | Mapping):
        rules = [*((p, None) for p in exclude), *((p, scheme) for p in include)]
        base: Scheme | None = scheme
    else:
        rules, base = [*((p, None) for p in exclude), *_rules(scheme)], None
        if include:
            raise ValueError(f"include: expected no patterns beside rules, got {include}")
    places = list(_places(model, LAYERS))
    for pattern, _ in rules:
        if not any(matches(pattern, name + ".weight") for name, *_ in places):
            raise ValueError(f"pattern {pattern!r}: matches no layer that can be quantized")
    tied = _tied(model)
    chosen: dict[nn.Module, tuple[str, Scheme]] = {}
    for name, _, _, layer in places:
        found = _choice(name + ".weight", rules, base, id(layer.weight) in tied)
        if found is not None:
            chosen.setdefault(layer, (name, found))
    for layer, (name, found) in chosen.items():
        _try(layer, name, found, activations)
    new = {layer: _made(layer, name, s, activations) for layer, (name, s) in chosen.items()}
    return _replaced(model, places, new)


def dequantize_model_(model: nn.Module) -> dict[str, nn.Module]:
    """Replace the quantized layers of a model by float ones, in place: the inverse of
    :func:`quantize_model_`, but for the error of quantizing.

    Args:
        model: a module with such layers inside.

    Returns:
        The new layers by name. Their weights have the dtype of those that were quantized.
    """
    places = list(_places(model, (QuantizedLayer,)))
    return _replaced(model, places, {layer: layer.float_layer() for *_, layer in places})


# name, the module that has it, its name there, the layer
Place = tuple[str, nn.Module, str, Any]


def _places(model: nn.Module, classes: Any) -> Iterator[Place]:
    """Where layers are: a layer that stands in several places has a line for each."""
    exact = isinstance(classes, dict)

    def fits(m: nn.Module) -> bool:
        return type(m) in classes if exact else isinstance(m, classes)

    check_unwrapped(model)
    if fits(model):
        call = "QuantLinear.from_float and the like make" if exact else "float_layer() makes"
        raise ValueError(
            f"model: expected a module with layers inside, got {type(model).__name__}; {call} "
            "the layer by itself"
        )
    for name, layer in model.named_modules(remove_duplicate=False):
        if fits(layer):
            parent, _, leaf = name.rpartition(".")
            yield name, model.get_submodule(parent), leaf, layer


def check_unwrapped(model: nn.Module) -> None:
    """Raise for wrappers that keep the parameters they have found: layers cannot be replaced then."""
    _checks.module("model", model)
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
                raise ValueError(
                    f"model: expected no {kind.__name__}, which keeps the layers' parameters, got one"
                    f"{' in ' if name else ''}{name}; replace layers first, then wrap or shard"
                )


_WRAPPERS = ("FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel")


def _replaced(
    model: nn.Module, places: list[Place], new: Mapping[nn.Module, nn.Module]
) -> dict[str, nn.Module]:
    done = {}
    for name, parent, leaf, layer in places:
        if layer in new:
            setattr(parent, leaf, new[layer])
            done[name] = new[layer]
    set_fast_paths(model)
    return done


#: Torch's ways around forward() of layers, which take codes for weights, or give layers nested tensors.
_FAST_PATHS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


def set_fast_paths(model: nn.Module) -> None:
    """Switch them off around quantized layers, and on again where there are none left."""
    for module in model.modules():
        for kind, switch in _FAST_PATHS.items():
            if isinstance(module, kind):
                kept = f"_quantkit_{switch}"
                if not any(isinstance(m, QuantizedLayer) for m in module.modules()):
                    if kept in vars(module):
                        setattr(module, switch, vars(module).pop(kept))
                elif value := getattr(module, switch):
                    setattr(module, kept, value)
                    setattr(module, switch, type(value)(0))


def _rules(rules: Any) -> Iterator[tuple[str, Scheme | None]]:
    if not isinstance(rules, Sequence):
        raise TypeError(
            f"scheme: expected a name, keywords or pairs of a pattern and a scheme, got {rules!r:.80}"
        )
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
            raise TypeError(f"scheme: expected pairs of a pattern and a scheme, got {rule!r:.80}")
        _checks.patterns("scheme", (rule[0],))
        yield rule[0], rule[1]


def _tied(model: nn.Module) -> set[int]:
    """ids of the parameters that several modules have."""
    counts = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {key for key, count in counts.items() if count > 1}


def _choice(
    name: str, rules: Sequence[tuple[str, Scheme | None]], base: Scheme | None, tied: bool
) -> Scheme | None:
    for pattern, scheme in rules:
        if matches(pattern, name):
            return scheme
    kept = any(matches(p, name.lower()) for patterns in KEPT.values() for p in patterns)
    return None if kept or tied else base


def _made(layer: Any, name: str, scheme: Scheme, activations: str | None) -> QuantizedLayer:
    new = LAYERS[type(layer)]
    inputs = activations if new is QuantLinear else None
    try:
        return new.from_float(layer, scheme, inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{name} ({type(layer).__name__}): {error}") from None


def _try(layer: Any, name: str, scheme: Scheme, activations: str | None) -> None:
    """Raise what is wrong with a layer, before any is replaced: by shapes alone, and all numbers."""
    try:
        LAYERS[type(layer)]._check(layer)
        check_finite(layer.weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{name} ({type(layer).__name__}): {error}") from None
    settings = {n: getattr(layer, n) for n in LAYERS[type(layer)]._settings}
    empty: Any = type(layer)(**settings, device="meta")
    weight = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device="meta")
    empty.weight = nn.Parameter(weight, requires_grad=False)
    _made(empty, name, scheme, activations)
