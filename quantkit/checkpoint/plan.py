"""What becomes of each tensor, and in which file: from headers alone, alike in every process."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._version import __version__
from .config_json import METADATA, Weight, metadata, quantization_config, weights_in
from .files import CheckpointError, Region, shown
from .layouts import Part, WeightScheme
from .output import Layout, layout_of
from .rules import Options, matches
from .source import Source

TILE = 4 << 20  # bytes of a weight in one step
MAX_TILE = 32 << 20  # the same, where rows that belong together are larger
# First match wins: the reason why a tensor stays as it is.
KEPT = {
    "an embedding": ("*embed*", "*_emb.*", "*.emb.*", "*wte*", "*wpe*", "shared.weight"),
    "a norm": ("*norm*", "*ln_*", "*.ln?.*"),
    "a router": ("*router*", "*.gate.weight", "*.gate.wg.weight", "*shared_expert_gate*"),
    "a head": ("*lm_head*", "output.weight"),
    "a bias": ("*bias*",),
}  # fmt: skip


class Item(NamedTuple):
    """A tensor of the model: where it comes from and what a file will hold for it.

    Attributes:
        inputs: what is read: the tensor, or the parts of a quantized weight in the order of its scheme.
        weight: how it is, or was, quantized; None: it is copied.
        parts: what is written.
        reason: why it is copied.
        step: rows that are read at once; 0 where it is copied.
    """

    name: str
    inputs: tuple[Region, ...]
    weight: Weight | None
    parts: tuple[Part, ...]
    reason: str = ""
    step: int = 0

    @property
    def back(self) -> bool:
        """Whether a quantized weight becomes floats."""
        return self.weight is not None and len(self.inputs) > 1

    @property
    def tile_bytes(self) -> int:
        """Of the floats of a tile."""
        return 0 if self.weight is None else self.step * _row_bytes(self.weight)

    @property
    def bytes_after(self) -> int:
        return sum(math.prod(p.shape) * p.dtype.itemsize for p in self.parts)


class OutputFile(NamedTuple):
    name: str
    items: tuple[Item, ...]
    layout: Layout


@dataclass(frozen=True)
class Plan:
    """The files of a checkpoint to write.

    Attributes:
        config: what config.json gets as quantization_config; None for nothing.
        stamp: what the files follow from, as JSON's types.
        notes: a sentence for each pattern that decides nothing.
    """

    files: tuple[OutputFile, ...]
    config: dict[str, Any] | None
    stamp: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def items(self) -> Iterator[Item]:
        return (item for file in self.files for item in file.items)

    @property
    def index(self) -> dict[str, Any] | None:
        """model.safetensors.index.json, where there are several files."""
        if len(self.files) == 1:
            return None
        places = {part.name: f.name for f in self.files for i in f.items for part in i.parts}
        total = sum(item.bytes_after for item in self.items)
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _row_bytes(weight: Weight) -> int:
    return weight.shape[1] * weight.dtype.itemsize


def step_rows(weight: Weight) -> int:
    """Rows of a tile; 0 where rows that belong together are too large."""
    row = _row_bytes(weight)
    unit = weight.scheme.rows
    return 0 if unit * row > MAX_TILE else max(unit, TILE // row // unit * unit)


def plan_to_quantize(source: Source, options: Options) -> Plan:
    """What :func:`quantize` does with a source.

    Raises:
        CheckpointError for a pattern that matches no tensor, or schemes that no file can have together.
    """
    if isinstance(source.config.get("quantization_config"), dict):
        raise CheckpointError(
            f"{shown(source.path)}: is quantized already: its config.json has quantization_config"
        )
    if any(METADATA in said for said in source.metadata):
        raise CheckpointError(f"{shown(source.path)}: is quantized already: its metadata says how")
    notes = _check_patterns(source, options)
    items: list[Item] = []
    for name, region in source.tensors.items():
        scheme, reason = _choice(name, region, options, name in source.shared)
        if scheme is None:
            items.append(_copied(name, region, reason))
            continue
        weight = Weight(scheme, region.shape, region.dtype)
        parts = scheme.parts(name, *weight[1:])
        items.append(Item(name, (region,), weight, parts, step=step_rows(weight)))
    layers = {
        i.name: i.weight and i.weight.scheme
        for i in items
        if i.weight or (len(i.parts[0].shape) == 2 and i.name.endswith(".weight"))
    }
    try:
        config = quantization_config(layers)
    except ValueError as error:
        raise CheckpointError(f"scheme: {error}") from None
    files = _divided(items, options.shard_size)
    return Plan(files, config, _stamp("quantize", source, files, options.as_dict()), notes)


def plan_to_dequantize(source: Source) -> Plan:
    """What :func:`dequantize` does with a checkpoint that quantkit wrote."""
    weights = weights_of(source)
    if not weights:
        raise CheckpointError(f"{shown(source.path)}: has no weights that quantkit quantized")
    items: list[Item] = []
    taken: set[str] = set()
    for name, (weight, inputs) in weights.items():
        part = Part(name, weight.shape, weight.dtype, 1)
        items.append(Item(name, tuple(inputs.values()), weight, (part,), step=step_rows(weight)))
        taken |= set(inputs)
    items += [_copied(n, r, "no codes") for n, r in source.tensors.items() if n not in taken]
    files = _divided(items, None)
    return Plan(files, None, _stamp("dequantize", source, files, {}))


def weights_of(source: Source) -> dict[str, tuple[Weight, dict[str, Region]]]:
    """The quantized weights of a checkpoint: how, and where their parts lie, by name.

    Raises:
        CheckpointError where a part is missing, or has another shape or dtype than the file says.
    """
    found: dict[str, tuple[Weight, dict[str, Region]]] = {}
    for file, said in zip(source.files, source.metadata, strict=True):
        try:
            weights = weights_in(said)
        except ValueError as error:
            raise CheckpointError(f"{shown(file.name)}: {shown(error)}") from None
        for name, weight in weights.items():
            what = f"{shown(file.name)}: {shown(name)}"
            if name in found or not step_rows(weight):
                raise CheckpointError(f"{what}: is no weight that quantkit wrote")
            inputs = {}
            for part in weight.scheme.parts(name, weight.shape, weight.dtype):
                region = source.tensors.get(part.name)
                if region is None or (region.shape, region.dtype) != (part.shape, part.dtype):
                    got = "none" if region is None else f"{list(region.shape)} {region.dtype}"
                    raise CheckpointError(
                        f"{what}: expected {shown(part.name)} of shape {list(part.shape)} "
                        f"{part.dtype}, got {got}"
                    )
                inputs[part.name] = region
            found[name] = weight, inputs
    return found


def _copied(name: str, region: Region, reason: str) -> Item:
    return Item(name, (region,), None, (Part(name, region.shape, region.dtype, 0),), reason)


def _check_patterns(source: Source, options: Options) -> tuple[str, ...]:
    """A sentence for each pattern that decides nothing, as others come first."""
    notes: list[str] = []
    undecided = set(source.tensors)
    for rule in options.rules:
        for pattern in rule.match:
            found = [n for n in source.tensors if matches(pattern, n)]
            if not found:
                raise CheckpointError(f"pattern {shown(repr(pattern))}: matches no tensor")
            if undecided.isdisjoint(found):
                notes.append(
                    f"pattern {shown(repr(pattern))}: decides nothing: "
                    "patterns before it match all its tensors"
                )
            undecided.difference_update(found)
            if rule.scheme is None:
                continue
            reasons = [_why_not(source.tensors[n], rule.scheme) for n in found]
            if None not in reasons:
                raise CheckpointError(
                    f"pattern {shown(repr(pattern))}: no tensor of it can be quantized to "
                    f"{shown(rule.scheme.name)}: {shown(found[0])}: {reasons[0]}"
                )
    return tuple(notes)


def _why_not(region: Region, scheme: WeightScheme) -> str | None:
    reason = scheme.why_not(region.shape, region.dtype)
    if reason is None and not step_rows(Weight(scheme, region.shape, region.dtype)):
        return f"{scheme.rows} of its rows are over {MAX_TILE >> 20} MiB"
    return reason


def _choice(
    name: str, region: Region, options: Options, shared: bool
) -> tuple[WeightScheme | None, str]:
    """The scheme of a tensor, or None and the reason why it has none."""
    for rule in options.rules:
        if any(matches(pattern, name) for pattern in rule.match):
            if rule.scheme is None:
                return None, "excluded"
            reason = _why_not(region, rule.scheme)
            return (rule.scheme, "") if reason is None else (None, reason)
    reason = _why_not(region, options.scheme)
    if reason is not None:
        return None, reason
    for reason, patterns in KEPT.items():
        if any(fnmatch.fnmatchcase(name.lower(), p) for p in patterns):
            return None, reason
    if shared:
        return None, "tied: it shares memory with another tensor"
    if not name.endswith(".weight"):
        return None, "its name does not end with .weight"
    return options.scheme, ""


def _divided(items: Sequence[Item], limit: int | None) -> tuple[OutputFile, ...]:
    """Files of items: one for each of the source, or of at most so many bytes of tensors.

    Items are in the order of their places in the source, so that reads are sequential.
    """
    groups: list[list[Item]] = []
    size = 0
    for item in sorted(items, key=lambda i: (i.inputs[0].file, i.inputs[0].offset, i.name)):
        new = not groups or (
            groups[-1][0].inputs[0].file != item.inputs[0].file
            if limit is None
            else size + item.bytes_after > limit
        )
        if new:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.bytes_after
    names = Counter(part.name for item in items for part in item.parts)
    for name, count in names.items():
        if count > 1:
            raise CheckpointError(f"{shown(name)}: two tensors would have this name")
    files = []
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}" if len(groups) > 1 else "model"
        quantized = {i.name: i.weight for i in group if i.weight is not None and not i.back}
        parts = [part for item in group for part in item.parts]
        layout = layout_of(parts, metadata(quantized))
        files.append(OutputFile(f"{name}.safetensors", tuple(group), layout))
    return tuple(files)


def _stamp(
    what: str, source: Source, files: Sequence[OutputFile], options: dict[str, Any]
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.layout.size]).encode() + file.layout.header)
    return {
        "what": what,
        "quantkit": __version__,
        "source": [[f.name, f.size, f.mtime_ns] for f in source.files],
        "options": options,
        "plan": digest.hexdigest(),
    }
