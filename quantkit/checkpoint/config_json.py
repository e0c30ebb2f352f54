"""What a quantized checkpoint says about itself: in config.json for its consumers, and in each file.

Every file has the metadata "quantkit": the scheme, the shape and the dtype of each weight in it, as JSON.
So a file says what it is without config.json, in every layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .layouts import WEIGHT_DTYPES, WeightScheme

METADATA = "quantkit"
_DTYPES = {str(d).removeprefix("torch."): d for d in WEIGHT_DTYPES}


class Weight(NamedTuple):
    """A weight as it was before it was quantized, and how that was done."""

    scheme: WeightScheme
    shape: tuple[int, ...]
    dtype: torch.dtype


def metadata(weights: Mapping[str, Weight]) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file that holds these weights."""
    if not weights:
        return {"format": "pt"}
    schemes: list[WeightScheme] = []
    rows = {}
    for name, w in sorted(weights.items()):
        if w.scheme not in schemes:
            schemes.append(w.scheme)
        rows[name] = [schemes.index(w.scheme), list(w.shape), str(w.dtype).removeprefix("torch.")]
    said = {"version": 1, "schemes": [s.as_dict() for s in schemes], "weights": rows}
    return {"format": "pt", METADATA: json.dumps(said, separators=(",", ":"))}


def weights_in(metadata: Mapping[str, str]) -> dict[str, Weight]:
    """The weights that a file's ``__metadata__`` names: none where quantkit did not write it.

    Raises:
        ValueError where the entry is there and is not what :func:`metadata` writes.
    """
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        said = json.loads(text)
        if said["version"] != 1:
            raise ValueError(f"version {said['version']}")
        schemes = dict(enumerate(WeightScheme(**s) for s in said["schemes"]))
        weights = {
            name: Weight(schemes[index], tuple(shape), _DTYPES[dtype])
            for name, (index, shape, dtype) in said["weights"].items()
        }
        for name, w in weights.items():
            if set(map(type, w.shape)) != {int}:
                raise ValueError(f"{name}: shape {w.shape}")
            if why := w.scheme.why_not(w.shape, w.dtype):
                raise ValueError(f"{name}: {why}")
        return weights
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"metadata {METADATA!r}: not what quantkit writes: {error!r:.200}"
        ) from None


def quantization_config(weights: Mapping[str, WeightScheme | None]) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json; None where no weight is quantized.

    Args:
        weights: the scheme of each weight by its name, None for those that stay as they are. All of the
            checkpoint that a layer may have: consumers expect scales of each layer that is not named.

    Raises:
        ValueError for layouts of which no consumer takes both in one checkpoint, and for embeddings
        where the layout has none.
    """
    of = {layer(name): s for name, s in weights.items()}
    schemes = {s for s in of.values() if s is not None}
    if not schemes:
        return None
    # A head that is tied to an embedding has no weight in the files.
    left = sorted({n for n, s in of.items() if s is None} | ({"lm_head"} - of.keys()))
    families = {
        s.layout if s.layout in ("deepseek", "quantkit") else "compressed-tensors" for s in schemes
    }
    if len(families) > 1:
        raise ValueError(
            f"layout: expected one kind for a checkpoint, got {' and '.join(sorted(families))}"
        )
    if families == {"quantkit"}:
        # The files say the rest. Of an unknown "quant_method" transformers only warns, and then takes
        # codes for weights. Without one it refuses.
        return {"layout": "quantkit"}
    embeddings = {n for n, s in of.items() if s is not None and _is_embedding(n)}
    if families == {"deepseek"}:
        if embeddings:
            raise ValueError(f"{min(embeddings)}: the layout deepseek has no quantized embeddings")
        return _deepseek(schemes, left)
    # Their inputs are indices, which no one may quantize.
    weights_alone = {
        n: replace(s, activations=False) for n, s in of.items() if s and n in embeddings
    }
    return _compressed_tensors({**of, **weights_alone}, left)


def layer(name: str) -> str:
    """The layer of a weight: its name less ".weight"."""
    return name.removesuffix(".weight")


def _deepseek(schemes: set[WeightScheme], left: list[str]) -> dict[str, Any]:
    blocks = {s.block for s in schemes}
    if len(blocks) > 1:
        raise ValueError(f"block: expected one for a checkpoint, got {sorted(map(str, blocks))}")
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(blocks.pop() or ()),
        "modules_to_not_convert": left,
    }


def _compressed_tensors(of: Mapping[str, WeightScheme | None], left: list[str]) -> dict[str, Any]:
    groups: dict[str, tuple[WeightScheme, list[str]]] = {}
    for name, s in sorted(of.items()):
        if s is not None:
            key = json.dumps({**s.as_dict(), "name": ""})  # the name says nothing to a consumer
            groups.setdefault(key, (s, []))[1].append(name)
    # transformers' dequantize=True takes the first group for all: the one of most layers.
    ordered = sorted(groups.values(), key=lambda g: -len(g[1]))
    formats = {s.layout for s, _ in ordered}
    linear = len(ordered) == 1 and not any(map(_is_embedding, ordered[0][1]))
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": left,
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if linear else names,
                "format": s.layout,
                "weights": _arguments(s),
                "input_activations": _activations(s) if s.activations else None,
                "output_activations": None,
            }
            for i, (s, names) in enumerate(ordered)
        },
    }


def _is_embedding(name: str) -> bool:
    """By its name: an embedding's inputs are indices, and its class is not Linear."""
    words = ("embed", "_emb.", ".emb.", "wte.", "wpe.")
    return name == "shared" or any(word in f"{name.lower()}." for word in words)


def _arguments(s: WeightScheme) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs of the weights."""
    f = s.format
    arguments: dict[str, Any] = {
        "num_bits": f.bits,
        "type": "int" if f.has_zero_point else "float",
        "symmetric": s.symmetric,
        "dynamic": False,
        "group_size": None,
    }
    if s.block is None:
        return {**arguments, "strategy": "tensor"}
    if s.block == (1, -1):
        return {**arguments, "strategy": "channel"}
    if s.block[0] != 1:
        return {**arguments, "strategy": "block", "block_structure": list(s.block)}
    strategy = "tensor_group" if s.scale == "e4m3" else "group"
    coded = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}.get(s.scale)
    arguments |= {"strategy": strategy, "group_size": s.block[1]}
    return arguments if coded is None else {**arguments, "scale_dtype": coded}


def _activations(s: WeightScheme) -> dict[str, Any]:
    """Of the inputs: always symmetric and dynamic, so no calibration is needed."""
    arguments = {**_arguments(s), "symmetric": True, "dynamic": True}
    if s.scale == "e8m0":
        return arguments
    arguments.pop("block_structure", None)
    if s.block is not None and s.block[0] != 1:
        return {**arguments, "strategy": "group", "group_size": s.block[1]}
    return {**arguments, "num_bits": 8, "strategy": "token", "group_size": None}
