"""The operators over DTensors: the bits of the whole tensor, whatever the mesh and the placements.

Loaded when a DTensor comes to a function. Each operator gets a rule, which works on the local shard. x
is never gathered: where a shard's border cuts blocks, ranks exchange the extremes of these blocks, or
their sums. docs/distributed.md says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from . import _torch, steps, sums
from ._shards import Beside, Shards, index_of, local_part, whole_blocks
from .formats import OF_NAME
from .operators import GRADIENTS, OPERATORS, functional, overloads

_Tensor = torch.Tensor
_Arguments = dict[str, Any]


def _names(name: str) -> list[str]:
    return [a.name for a in functional(name)._schema.arguments]


def _call(name: str, values: _Arguments) -> Any:
    """The rule of an operator, with those of the values that it takes."""
    return _RULES[name.partition(".")[0]](name, {k: values[k] for k in _names(name) if k in values})


def _shaped(name: str, given: _Arguments, x: _Tensor) -> tuple[_Tensor, ...]:
    """An operator's results without values, for another x."""
    values = {**given, next(iter(given)): x}
    by_name = [a.name for a in functional(name)._schema.arguments if a.kwarg_only]
    placed = [v for k, v in values.items() if k not in by_name]
    made = OPERATORS[name].shaped(*placed, **{k: values[k] for k in by_name if k in values})
    return made if isinstance(made, tuple) else (made,)


def _codes_of_a_byte(given: _Arguments) -> int:
    return OF_NAME[given["format"]].per_byte if "format" in given else 1


def _with_parameters(name: str, given: _Arguments) -> Any:
    """Operators of x, or q, beside parameters: each result lies as x does."""
    operator, x_name, base = functional(name), next(iter(given)), name.partition(".")[0]
    per_byte = _codes_of_a_byte(given)
    at = Shards(given[x_name], per_byte if base == "dequantize" else 1)
    unit = per_byte if base == "quantize" else 1  # of the result
    at.whole_bytes(unit)
    beside = Beside(at, given, per_byte)
    without = (x_name, "scale", "block_size", "global_scale")
    rest = {k: v for k, v in given.items() if k not in without}
    results: Any = None
    for piece, parameters in beside.pieces():
        if given.get("seed") is not None:
            rest["index"] = index_of(at, given.get("index"), piece)
        made = _tuple(operator(at.part(at.local, piece, at.unit), **{**rest, **parameters}))
        if piece == at.spans:
            results = made
            break
        results = results or _shaped(name, given, at.local)
        for whole, part in zip(results, made, strict=True):
            at.part(_joinable(whole), piece, unit).copy_(_joinable(part))
    alike = [at.alike(t, unit) for t in results or _shaped(name, given, at.local)]
    return tuple(alike) if len(alike) > 1 else alike[0]


def _joinable(t: _Tensor) -> _Tensor:
    """float8 as its bytes: inductor selects no float8."""
    return t.view(torch.uint8) if t.is_floating_point() and t.element_size() == 1 else t


def _tuple(results: Any) -> tuple[_Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _keys(t: _Tensor) -> _Tensor:
    """Integers in the order of t, NaN above all: a maximum that no backend can spoil."""
    if not t.is_floating_point():
        return t.to(torch.int64) ^ (_LOWEST if t.dtype == torch.uint64 else 0)
    t = torch.where(t.isnan(), torch.nan, t)  # one NaN, positive
    t = t.view(torch.int64) if t.dtype == torch.float64 else t.to(torch.float32).view(torch.int32)
    return torch.where(t < 0, t ^ torch.iinfo(t.dtype).max, t)


def _values(keys: _Tensor, dtype: torch.dtype) -> _Tensor:
    """What has these keys."""
    if not dtype.is_floating_point:
        return (keys ^ (_LOWEST if dtype == torch.uint64 else 0)).to(dtype)
    bits = torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys)
    return bits.view(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)


_LOWEST = -(2**63)


def _extremes(at: Shards, blocks: list[int], magnitude: bool) -> list[_Tensor]:
    """[minima, maxima] of the blocks whose parameters this rank gets; with magnitude [max |x|]."""
    held, dtype = at.held(blocks), at.local.dtype
    wide = dtype == torch.float64 or not dtype.is_floating_point
    lowest = torch.iinfo(torch.int64 if wide else torch.int32)
    sizes = [1 if magnitude else 2, *(last - first for first, last in held)]
    keys = at.local.new_full(sizes, lowest.min, dtype=torch.int64 if wide else torch.int32)
    for piece in at.pieces(blocks):
        low, high = functional("aminmax")(at.part(at.local, piece), blocks)
        here = (slice(None), *at.place(piece, blocks, held))
        if magnitude:
            keys[here] = _keys(torch.maximum(low.abs(), high.abs())).unsqueeze(0)
        else:
            keys[here] = torch.stack([~_keys(low), _keys(high)])
    keys = at.merged(keys, "max", blocks)
    high = _values(keys[-1], dtype)
    if magnitude:
        return [high]
    low = _values(~keys[0], dtype)
    return [torch.where(high.isnan(), high, low) if dtype.is_floating_point else low, high]


def _of_whole_blocks(
    name: str, given: _Arguments, at: Shards, blocks: list[int], **local: Any
) -> tuple[_Tensor, ...]:
    """An operator that chooses, of the local shard, whose borders cut no block."""
    sizes = None if given["block_size"] is None else blocks
    return _tuple(functional(name)(**{**given, "x": at.local, "block_size": sizes, **local}))


def _choosing(name: str, given: _Arguments) -> tuple[DTensor, ...]:
    """Operators that choose parameters of x: of the extremes of whole blocks."""
    at, chosen = Shards(given["x"]), given.get("global_scale")
    blocks = whole_blocks(at.shape, given["block_size"])
    shape = steps.parameter_shape(at.shape, given["block_size"])
    local: _Arguments = {}
    if chosen is not None:
        local["global_scale"] = at.numbers(chosen, shape, blocks)
    made: Any
    if 0 in at.shape:
        made = [t.zero_() for t in _shaped(name, given, at.local.new_empty(at.shape))]
    elif not at.cut(blocks):
        made = _of_whole_blocks(name, given, at, blocks, **local)
    else:
        magnitude = at.local.is_floating_point() and given.get("symmetric", False)
        made = _extremes(at, blocks, magnitude)
        if name != "aminmax":
            if chosen is not None and chosen.dim() > 0:
                local["global_scale"] = local["global_scale"].unsqueeze(-1)
            local["x"] = torch.stack(made, -1)
            local["block_size"] = [*[1] * len(at.shape), len(made)]
            made = [t.squeeze(-1) if t.dim() else t for t in functional(name)(**{**given, **local})]
        if not shape:
            made = [t.reshape(()) for t in made]
    return tuple(at.of_blocks(t, blocks, shape if t.dim() else ()) for t in made)


def _dynamic(name: str, given: _Arguments) -> tuple[DTensor, ...]:
    """Operators that choose and quantize: in one call where no border cuts blocks."""
    at, chosen, per_byte = Shards(given["x"]), given.get("global_scale"), _codes_of_a_byte(given)
    at.whole_bytes(per_byte)
    base, dot, overload = name.partition(".")
    blocks = whole_blocks(at.shape, given["block_size"])
    if 0 in at.shape or at.cut(blocks):
        values = {**given, "x": at.x}
        scale, zero_point = _call(f"choose_qparams{dot}{overload}", values)
        has_zero_point = "format" not in given or OF_NAME[given["format"]].has_zero_point
        values.update(scale=scale, zero_point=zero_point if has_zero_point else None)
        values["q"] = _call(f"quantize{dot}{overload}", values)
        if base == "dynamic_quantize":
            return values["q"], scale, zero_point
        return values["q"], _call(f"dequantize{dot}{overload}", values), scale, zero_point
    shape = steps.parameter_shape(at.shape, given["block_size"])
    local: _Arguments = {}
    if chosen is not None:
        local["global_scale"] = at.numbers(chosen, shape, blocks)
    if given.get("seed") is not None:
        local["index"] = index_of(at, given.get("index"), at.spans)
    q, *x_hat, scale, zero_point = _of_whole_blocks(name, given, at, blocks, **local)
    parameters = (at.of_blocks(t, blocks, shape if t.dim() else ()) for t in (scale, zero_point))
    return at.alike(q, per_byte), *map(at.alike, x_hat), *parameters


def _measuring(name: str, given: _Arguments) -> tuple[DTensor, ...]:
    """measure and measure_limbs: digits of parts are added, and carried once."""
    at, over = Shards(given["x"]), given.get("over")
    blocks, shape = whole_blocks(at.shape, over), steps.parameter_shape(at.shape, over)
    if 0 in at.shape:
        made = [t.zero_() for t in _shaped(name, given, at.local.new_empty(at.shape))]
        return tuple(at.of_blocks(t, blocks, t.shape) for t in made)
    held = at.held(blocks)
    sizes = [last - first for first, last in held]
    both = at.local.new_zeros((*sizes, 2 * sums.DIGITS + 2), dtype=torch.int64)
    greatest = at.local.new_zeros(sizes, dtype=torch.int32)  # float32's bits: none is negative
    rest = {k: v for k, v in given.items() if k not in ("x", "scale", "block_size", "global_scale")}
    rest["over"] = blocks
    for piece, parameters in Beside(at, given, 1, blocks).pieces():
        part = at.part(at.local, piece)
        limbs, error, counts = functional("measure_limbs")(part, **{**rest, **parameters})
        here = at.place(piece, blocks, held)
        both[here] += torch.cat([limbs.flatten(-2), counts], -1)
        greatest[here] = torch.maximum(greatest[here], error.view(torch.int32))
    both, greatest = at.merged(both, "sum", blocks), at.merged(greatest, "max", blocks)
    if not shape:
        both, greatest = both.reshape(-1), greatest.reshape(())
    limbs = sums.carried(both[..., :-2].unflatten(-1, (2, sums.DIGITS)))
    made = [limbs, greatest.view(torch.float32), both[..., -2:].contiguous()]
    if name == "measure":
        made[:1] = (t.contiguous() for t in sums.rounded(limbs).unbind(-1))
    return tuple(at.of_blocks(t, blocks, (*shape, *t.shape[greatest.dim() :])) for t in made)


def _masked(name: str, given: _Arguments) -> DTensor:
    """The gradient of x: what comes, where the mask is."""
    grad, mask = given["grad"], given["mask"]
    at = Shards(mask)
    grad = local_part(grad, at.placements, at.mesh)
    return at.alike(functional(name)(grad, at.local))


def _backward(name: str, given: _Arguments) -> DTensor:
    mask = _call("_fake_quantize_masked", given)[1]
    return _call("_masked_gradient", {"grad": given["grad"], "mask": mask})


def _learning(name: str, given: _Arguments) -> Any:
    """fake_quantize with a gradient: that of x alone."""
    if any(getattr(given[p], "requires_grad", False) for p in ("scale", "zero_point")):
        raise RuntimeError(_NOT_LEARNED)
    return _with_parameters(name, given)


def _outside(name: str, given: _Arguments) -> Any:
    """What a rank has that is not in the mesh: empty results, as torch's operators have there."""
    x, made = next(iter(given.values())), []
    whole = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    for t in _shaped(name, given, whole):
        alike = t.dim() == x.dim() and t.shape[:-1] == x.shape[:-1]
        local = torch.empty((), dtype=t.dtype, device=x.device_mesh.device_type).expand(t.shape)
        placements = x.placements if alike else [Replicate()] * x.device_mesh.ndim
        made.append(
            DTensor.from_local(
                local, x.device_mesh, placements, run_check=False, shape=t.shape, stride=t.stride()
            )
        )
    return tuple(made) if len(made) > 1 else made[0]


def _refused(name: str, given: _Arguments) -> Any:
    if name in GRADIENTS:
        raise RuntimeError(_NOT_LEARNED)
    raise RuntimeError(f"{name}: expected plain tensors, got a DTensor; pass to_local()")


_NOT_LEARNED = "scale, zero_point: no gradient over a DTensor's shards; pass detached ones"


_RULES: dict[str, Callable[[str, _Arguments], Any]] = {
    **dict.fromkeys(("choose_qparams", "aminmax"), _choosing),
    **dict.fromkeys(("dynamic_quantize", "quantize_dequantize"), _dynamic),
    **dict.fromkeys(("measure", "measure_limbs"), _measuring),
    **dict.fromkeys(("quantize", "dequantize", "fake_quantize"), _with_parameters),
    "_fake_quantize": _with_parameters,
    "_fake_quantize_masked": _learning,
    "_masked_gradient": _masked,
    "_fake_quantize_backward": _backward,
}


def _kernel(name: str) -> Callable[..., Any]:
    """What torch calls where an operator gets a DTensor."""
    rule, names = _RULES.get(name.partition(".")[0], _refused), _names(name)

    def kernel(cls, func, types, args=(), kwargs=None):
        _torch.keep_ranks_apart()  # compilers call this too, before they look for a graph
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        if not isinstance(given[names[0]], DTensor):
            others = [k for k, v in given.items() if isinstance(v, DTensor)]
            raise RuntimeError(f"{names[0]}: expected a DTensor, as {', '.join(others)} is one")
        try:
            OPERATORS[name].check(**given) if name in OPERATORS else None
        except (TypeError, ValueError) as error:  # the functions raise the exact type
            raise RuntimeError(str(error)) from None
        if given[names[0]].device_mesh.get_coordinate() is None and rule is not _refused:
            return _outside(name, given)
        if isinstance(given.get("seed"), DTensor):
            mesh = given[names[0]].device_mesh
            given["seed"] = local_part(given["seed"], [Replicate()] * mesh.ndim, mesh)
        with torch.no_grad():
            return rule(name, given)

    return kernel


def _no_out(cls, func, types, args=(), kwargs=None):
    raise RuntimeError(f"{func}: expected plain tensors, got a DTensor; call it without out=")


if not hasattr(torch.library, "register_torch_dispatch"):
    version = ".".join(map(str, _torch.RELEASE))
    raise RuntimeError(f"torch {version} has no rules for DTensors; pass to_local()")
_torch.keep_ranks_apart()
_library = torch.library.Library("quantkit", "FRAGMENT")
for _name in (*OPERATORS, *GRADIENTS):
    torch.library.register_torch_dispatch(functional(_name), DTensor, _kernel(_name), lib=_library)
for _name in OPERATORS:
    torch.library.register_torch_dispatch(overloads(_name)[1], DTensor, _no_out, lib=_library)
