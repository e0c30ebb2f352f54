"""Layers whose weights are codes: plain tensors under the names of a checkpoint.

A weight is a matrix of one row for each output: that of a convolution is flattened. Its tensors are those
of the layout "quantkit" (quantkit/checkpoint/layouts.py), as :func:`quantkit.quantize` returns them:

==================== ============================================= ====================================
name                 what                                          in the layer
==================== ============================================= ====================================
weight               codes, (N, K) or (N, K / codes a byte)        a Parameter that requires no gradient
weight_scale         one scale a block, (1,) for one in all        a buffer
weight_zero_point    int32 of scale's shape, of asymmetric schemes a buffer
weight_global_scale  float32 (1,), of nvfp4                        a buffer
==================== ============================================= ====================================

float8 tensors are bytes here (uint8), and float8 in a state_dict. Bytes are not converted by ``.half()``,
and pickle and every backend of torch.distributed take them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from .. import _checks, _torch
from ..formats import CODED_SCALES, E8M0, FLOAT_DTYPES, power_of_two
from ..ops import aminmax, dequantize_tensor, linear_w8a8, quantize
from ..params import QuantizationParams, as_tensor
from ..schemes import keywords_of

_TENSORS = ("weight", "weight_scale", "weight_zero_point", "weight_global_scale")
_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, *CODED_SCALES)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
_MOVED = ("_forward_hooks", "_forward_pre_hooks")
_Self = TypeVar("_Self", bound="QuantizedLayer")


class QuantizedLayer(nn.Module):
    """What QuantLinear, QuantEmbedding and QuantConv2d share.

    Attributes:
        weight, weight_scale, weight_zero_point, weight_global_scale: see docs/layers.md.
        bias: that of the float layer, which may be trained; frozen beside ``activations="int8"``.
        scheme: how the weight was quantized, in words.
        dtype: of the float layer's weight. ``.half()`` and the like change it, and no scale.
        activations: "int8" for inputs that become int8 codes, or None.
    """

    weight: nn.Parameter
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    weight_global_scale: torch.Tensor | None
    bias: nn.Parameter | None
    #: The class of the float layer, the names of its settings, and of those that show in a repr.
    float_class: ClassVar[type[nn.Module]]
    _settings: ClassVar[tuple[str, ...]]
    _shown: ClassVar[tuple[str, ...]]
    _has_bias: ClassVar[bool] = True

    def __init__(
        self,
        module: nn.Module,
        q: torch.Tensor,
        qparams: QuantizationParams,
        activations: str | None = None,
        *,
        scheme: str = "custom",
        symmetric: bool | None = None,
    ) -> None:
        """A layer of codes that are there already.

        Args:
            module: a float layer, on any device (also "meta"): it gives all but the weight.
            q, qparams: the weight, as :func:`quantkit.quantize` returns it for one row for each output.
            activations: None or "int8".
            scheme: a name for both, which the repr shows.
            symmetric: whether all zero points are 0, so that none are kept. None: look.

        Raises:
            TypeError or ValueError that says what does not fit.
        """
        super().__init__()
        self._check(module)
        for name in self._settings:
            setattr(self, name, getattr(module, name))
        weight: Any = module.weight
        self.scheme, self.dtype, self.activations = scheme, weight.dtype, activations
        self.shape = torch.Size(weight.shape)  # of the float weight
        bias: nn.Parameter | None = getattr(module, "bias", None)
        if bias is not None and activations is not None:  # nothing in it has a gradient
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        self._set(q, qparams, symmetric)
        if activations is not None:
            self._check_activations(activations)
        _move_hooks(module, self)
        self.train(module.training)

    @classmethod
    def from_float(
        cls: type[_Self],
        module: nn.Module,
        scheme: str | Mapping[str, Any] | None = None,
        activations: str | None = None,
        **keywords: Any,
    ) -> _Self:
        """The layer of a float one, whose bias it takes over.

        Args:
            module: a float layer of the class that ``float_class`` names, and of no class made of it.
            scheme: a name of :data:`quantkit.SCHEMES`, or a mapping of keywords of
                :func:`quantkit.dynamic_quantize`, as for :func:`quantkit.quantize`. Steps are float32.
                Sizes of blocks are those of the weight as a matrix.
            keywords: those of such a mapping, instead of it: ``dtype="int4", block_size=[32]``.
            activations: "int8" quantizes the inputs of a QuantLinear, too: see its page.

        Raises:
            TypeError or ValueError that says what does not fit: another class, an unknown scheme, NaN or
            an infinity in the weight. Rows that do not fill whole bytes are one, too. So are hooks and a
            ``forward`` of the layer's own, which would be lost, but for hooks of torch's tensor parallel.
        """
        if (scheme is None) is not bool(keywords):
            given = "both" if keywords else "none"
            raise _checks.wrong(TypeError, "scheme", "a scheme or its keywords", given)
        scheme = keywords if scheme is None else scheme
        cls._check(module)
        weight: Any = module.weight
        check_finite(weight)
        q, qparams = quantize(_matrix(weight), scheme, compute_dtype=torch.float32)
        name = scheme if isinstance(scheme, str) else str(dict(scheme))
        symmetric = bool(keywords_of(scheme).get("sym", True))
        return cls(module, q, qparams, activations, scheme=name, symmetric=symmetric)

    @classmethod
    def _check(cls, module: object) -> None:
        """Raise what is wrong with a float layer."""
        expected = f"a torch.nn.{cls.float_class.__name__}"
        if type(module) is not cls.float_class:
            raise TypeError(f"module: expected {expected}, got {type(module).__name__}")
        weight: Any = getattr(module, "weight", None)
        if weight.numel() == 0:
            raise _checks.wrong(
                ValueError, "module", f"{expected} whose weight has elements", tuple(weight.shape)
            )
        if "forward" in vars(module):
            raise ValueError(
                f"module: expected {expected} without a forward of its own, which would be lost"
            )
        for hooks in _HOOKS:
            there = getattr(module, hooks, {}).values()
            if not all(hooks in _MOVED and _is_placing(hook) for hook in there):
                raise ValueError(
                    f"module: expected {expected} without hooks, which would be lost, "
                    f"got {hooks[1:]}"
                )

    def _check_activations(self, activations: str) -> None:
        raise ValueError(
            f"activations: expected None for {type(self).__name__}, got {activations!r}"
        )

    def _set(self, q: torch.Tensor, p: QuantizationParams, symmetric: bool | None) -> None:
        if not isinstance(p, QuantizationParams):
            raise _checks.wrong(TypeError, "qparams", "a QuantizationParams", type(p).__name__)
        f = _checks.smallest_format(p.q_min, p.q_max) if p.dtype is None else None
        f = f or _checks.format_of(p.dtype)
        _checks.codes("q", q, f)
        rows, row = self.shape[0], self.shape[1:].numel()
        scale: Any = as_tensor("scale", p.scale).to(q.device)
        scale = scale if scale.dtype in CODED_SCALES else scale.to(torch.float32)
        zero: Any = as_tensor("zero_point", p.zero_point)
        zero = None if zero is None else zero.to(q.device)
        if symmetric is None and zero is not None:
            symmetric = not f.has_zero_point or not bool((zero != 0).any())
        given, zero = zero, None if symmetric or zero is None else zero.to(torch.int32)
        if zero is not None and not zero.is_meta and not bool((zero == given).all()):
            raise ValueError(
                "qparams: expected zero points that are whole numbers, as layers keep int32"
            )
        g: Any = as_tensor("global_scale", p.global_scale)
        g = None if g is None else g.to(q.device, torch.float32)
        for name, t in (("scale", scale), ("zero_point", zero), ("global_scale", g)):
            if t is not None and (t.numel() == 0 or (t.dim() == 1 and t.numel() > 1)):
                expected = "one number, or a matrix of one for each block"
                raise _checks.wrong(ValueError, name, expected, f"shape {tuple(t.shape)}")
        blocks = p.block_size
        if scale.dim() == 2 and blocks is None:
            blocks = (rows // scale.shape[0], row // scale.shape[1])
        self._fields: dict[str, Any] = {
            "q_min": p.q_min, "q_max": p.q_max, "dtype": p.dtype, "block_size": blocks,
            "compute_dtype": torch.float32, "round_first": p.round_first,
        }  # fmt: skip
        parameters = (t if t is None else torch.atleast_1d(t) for t in (scale, zero, g))
        tensors = dict(zip(_TENSORS, (q, *parameters), strict=True))
        self._dtypes = {n: t.dtype for n, t in tensors.items() if t is not None}
        self.weight = nn.Parameter(_bytes(q.detach()), requires_grad=False)
        for name in _TENSORS[1:]:
            t = tensors[name]
            self.register_buffer(name, None if t is None else _bytes(t.detach()))
        # Wrong shapes are found here, by the checks of the operator alone.
        x = dequantize_tensor(self.codes.to("meta"), self.qparams.to("meta"))
        if x.shape != (rows, row):
            raise ValueError(
                f"q: expected codes of shape {(rows, row)} for a weight of shape "
                f"{tuple(self.shape)}, got {tuple(x.shape)}"
            )

    # ---- the weight -----------------------------------------------------------------------------------

    def _tensor(self, name: str) -> torch.Tensor | None:
        """A tensor in its own dtype, not in bytes."""
        t: torch.Tensor | None = getattr(self, name)
        if t is None or t.dtype == self._dtypes[name]:
            return t
        if self._dtypes[name] == E8M0 and torch.onnx.is_in_onnx_export():
            raise ValueError(  # the exporter itself has no number of this dtype
                f"quantkit.onnx cannot write scales of {E8M0}: docs/onnx.md has what it can"
            )
        return t.view(self._dtypes[name])

    @property
    def codes(self) -> torch.Tensor:
        """The codes, as :func:`quantkit.quantize` returns them."""
        q = self._tensor("weight")
        assert q is not None
        return q

    @property
    def qparams(self) -> QuantizationParams:
        """Their parameters, as :func:`quantkit.quantize` returns them; without zero points None."""
        scale, zero, g = (
            t if t is None or t.dim() != 1 else t.reshape(())
            for t in map(self._tensor, _TENSORS[1:])
        )
        assert scale is not None
        zero = None if zero is None else zero.to(torch.float32)
        return QuantizationParams(scale, zero, global_scale=g, **self._fields)

    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in floats, in the shape of the float layer's. dtype: None is ``self.dtype``."""
        return _decoded(self.codes, self.qparams, dtype or self.dtype).reshape(self.shape)

    def float_layer(self) -> nn.Module:
        """The float layer: with the decoded weight, and with the same bias."""
        return self._float(nn.Parameter(self.dequantized()))

    def _float(self, weight: nn.Parameter) -> nn.Module:
        settings = {name: getattr(self, name) for name in self._settings}
        if self._has_bias:
            settings["bias"] = self.bias is not None
        layer: Any = self.float_class(**settings, device="meta")
        layer.weight = weight
        if self.bias is not None:
            frozen = self.activations is not None
            layer.bias = nn.Parameter(self.bias.detach()) if frozen else self.bias
        _move_hooks(self, layer)
        return layer.train(self.training)

    def _skeleton(self, device: torch.device | str = "meta") -> nn.Module:
        """The float layer with a weight that says nothing."""
        empty = torch.empty(self.shape, dtype=self.dtype, device=device)
        return self._float(nn.Parameter(empty))

    # ---- as a module ----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What moves and converts a module: scales are moved alone.

        fn gets float32 scales as int32, which no conversion to a float dtype touches. So ``.to(dtype)``
        keeps them, and ``.to(device)``, ``.to_empty`` and ``share_memory`` do as ever.
        """
        if fn(torch.empty(0, dtype=torch.int32, device=self.weight.device)).dtype != torch.int32:
            raise TypeError("type: it would convert codes, too; expected .to(dtype)")
        kept = {id(t) for t in map(self._buffers.get, _TENSORS) if t is not None}

        def keeping(t: torch.Tensor) -> torch.Tensor:
            if id(t) not in kept or t.dtype != torch.float32:
                return fn(t)
            bits = t.view(torch.int32)
            moved = fn(bits)
            return t if moved is bits else moved.view(torch.float32)

        result = super()._apply(keeping, recurse)
        probe = torch.empty(0, dtype=self.dtype, device=self.weight_scale.device)
        self.dtype = fn(probe).dtype
        return result

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        for name, dtype in self._dtypes.items():
            t = destination.get(prefix + name)
            if t is not None and t.dtype != dtype and not keep_vars:
                destination[prefix + name] = t.view(dtype)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Take tensors of the right kind alone: copying floats into codes would round them."""
        taken = dict(state_dict)
        if prefix + "weight_packed" in taken:
            error_msgs.append(
                f"{prefix}weight_packed: expected {prefix}weight; quantkit.nn.load_checkpoint_ "
                "takes this layout"
            )
        for name, dtype in self._dtypes.items():
            t = taken.get(prefix + name)
            if not isinstance(t, torch.Tensor):
                continue
            if not _takes(name, dtype, t.dtype):
                error_msgs.append(
                    f"{prefix}{name}: expected {_name(dtype)} of {type(self).__name__} with scheme "
                    f"{self.scheme}, got {_name(t.dtype)}"
                )
                taken[prefix + name] = getattr(self, name)
            else:
                taken[prefix + name] = t.view(torch.uint8) if dtype in _BYTES else t.to(dtype)
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            taken, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in self._shown]
        if self._has_bias:
            parts.append(f"bias={self.bias is not None}")
        held = [t for t in map(self._tensor, _TENSORS) if t is not None]
        bits = 8 * sum(t.numel() * t.element_size() for t in held) / max(self.shape.numel(), 1)
        parts += [f"scheme={self.scheme}", f"bits={bits:.2f}"]
        if self.activations is not None:
            parts.append(f"activations={self.activations}")
        return ", ".join(parts)


class QuantLinear(QuantizedLayer):
    """A torch.nn.Linear whose weight is codes.

    Weight only: the weight is decoded in x's dtype, then comes torch's own product. x has a gradient.
    It takes less memory, and no less time.

    ``activations="int8"``: :func:`quantkit.linear_w8a8`, faster than float32 and without a gradient. It
    takes int8 weights with a scale for each row or for all, without zero points: "int8_channel".
    """

    float_class = nn.Linear
    _settings = ("in_features", "out_features")
    _shown = _settings
    in_features: int
    out_features: int

    def _check_activations(self, activations: str) -> None:
        check_activations(activations)
        scale = self.weight_scale
        by_row = scale.numel() == 1 or scale.shape == (self.shape[0], 1)
        if _torch.is_dtensor(self.weight):
            raise ValueError(
                "activations: expected None for a weight that is a DTensor, got 'int8'"
            )
        plain = self.weight_zero_point is None and self.weight_global_scale is None
        kind = self._dtypes["weight"], self._dtypes["weight_scale"]
        if not (kind == (torch.int8, torch.float32) and by_row and plain):
            raise ValueError(
                f"activations: expected None for scheme {self.scheme}, got 'int8', which takes int8 "
                "weights with a scale for each row or for all, without zero points"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = _dtype_for(x)
        if self.activations is not None:
            scale = self.weight_scale
            scale = scale.reshape(()) if scale.numel() == 1 else scale
            x = x if x.dtype == dtype else x.to(dtype)
            if x.dim() == 0 or x.shape[-1] != self.in_features:
                expected = f"a last size of {self.in_features}"
                raise _checks.wrong(ValueError, "x", expected, f"shape {tuple(x.shape)}")
            return linear_w8a8(x, self.weight, scale.to(torch.float32), self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x, self.dequantized(dtype), bias)


class QuantEmbedding(QuantizedLayer):
    """A torch.nn.Embedding whose weight is codes: only the rows that are asked for are decoded.

    The result has ``dtype``, as that of the float layer has its weight's.
    """

    float_class = nn.Embedding
    _settings = ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq", "sparse")
    _shown = _settings[:3]
    _has_bias = False
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    @classmethod
    def _check(cls, module: object) -> None:
        super()._check(module)
        if (norm := getattr(module, "max_norm", None)) is not None:
            raise ValueError(
                f"module: expected max_norm=None, got {norm}: it would change the weight"
            )

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        if hasattr(self.weight, "device_mesh"):
            # A DTensor: selecting rows of codes would gather them. So each rank decodes its shard.
            return F.embedding(indices, self.dequantized())
        flat = indices.reshape(-1)
        p = self.qparams
        q = _rows(self.weight, flat, self._dtypes["weight"])
        if p.scale.dim() == 2:
            assert p.block_size is not None
            height, width = p.block_size
            where = flat // (self.shape[0] if height == -1 else height)
            zero, g = (
                t if t is None or t.dim() == 0 else t.index_select(0, where)
                for t in (p.zero_point, p.global_scale)
            )
            p = QuantizationParams(
                _rows(self.weight_scale, where, self._dtypes["weight_scale"]), zero, global_scale=g,
                **{**self._fields, "block_size": (1, width)},
            )  # fmt: skip
        return _decoded(q, p, self.dtype).reshape(*indices.shape, self.embedding_dim)


class QuantConv2d(QuantizedLayer):
    """A torch.nn.Conv2d whose weight is codes: decoded in x's dtype, then torch's own convolution.

    The weight is quantized as a matrix: a row of all numbers of an output channel.
    """

    float_class = nn.Conv2d
    _settings = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    )  # fmt: skip
    _shown = _settings
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = _dtype_for(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._sides(), mode=self.padding_mode)
            padding = (0, 0)
        return F.conv2d(
            x, self.dequantized(dtype), bias, self.stride, padding, self.dilation, self.groups
        )

    def _sides(self) -> list[int]:
        """What F.pad takes: the last dimension comes first."""
        sides: list[int] = []
        for i in (1, 0):
            if isinstance(self.padding, str):
                total = self.dilation[i] * (self.kernel_size[i] - 1) * (self.padding == "same")
                sides += [total // 2, total - total // 2]
            else:
                sides += [self.padding[i]] * 2
        return sides


#: From the classes of float layers to those of quantized ones.
LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    layer.float_class: layer for layer in (QuantLinear, QuantEmbedding, QuantConv2d)
}


def _is_placing(hook: object) -> bool:
    """Whether it is a hook of torch's tensor parallel, which places DTensors and knows no layer."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor.")


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Those of torch's tensor parallel."""
    for kind in _MOVED:
        moved = {key: hook for key, hook in getattr(old, kind).items() if _is_placing(hook)}
        getattr(new, kind).update(moved)
        named = getattr(old, kind + "_with_kwargs")
        getattr(new, kind + "_with_kwargs").update({k: named[k] for k in moved if k in named})


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    """One row for each output."""
    return weight.detach().reshape(weight.shape[0], -1)


def check_activations(activations: object) -> None:
    if activations not in (None, "int8"):
        raise _checks.wrong(ValueError, "activations", "None or 'int8'", _checks.shown(activations))


def check_finite(weight: torch.Tensor) -> None:
    """Raise ValueError for NaN or an infinity, where the weight has memory."""
    if weight.is_meta or _torch.is_fake(weight) or weight.numel() == 0:
        return
    if not all(bool(torch.isfinite(t)) for t in aminmax(weight.detach())):
        raise ValueError("weight: expected finite numbers, got NaN or an infinity")


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8) if t.dtype in _BYTES else t


def _rows(t: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a layer's tensor in its own dtype: torch selects none of float8, and its compiler knows no
    E8M0, whose powers of two are float32 here."""
    rows = t.index_select(0, indices)
    if dtype == E8M0:
        return power_of_two(rows.to(torch.int32))
    return rows if rows.dtype == dtype else rows.view(dtype)


def _decoded(q: torch.Tensor, p: QuantizationParams, dtype: torch.dtype) -> torch.Tensor:
    """Codes as numbers; of float64 those of float32."""
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return dequantize_tensor(q, p, output_dtype=dtype)
    return dequantize_tensor(q, p, output_dtype=torch.float32).to(dtype)


def _dtype_for(x: torch.Tensor) -> torch.dtype:
    """The dtype that torch's own product takes: x's, or that of autocast."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOAT_DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise _checks.wrong(TypeError, "x", "a tensor of floats", got)
    kind = x.device.type
    there = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if there and x.dtype != torch.float64 else x.dtype


def _takes(name: str, held: torch.dtype, given: torch.dtype) -> bool:
    """Whether a tensor of a state_dict can stand for one that the layer holds."""
    if name == "weight":
        return given == held
    if held in CODED_SCALES:
        return given == held or (given == torch.uint8 and held == torch.float8_e8m0fnu)
    whole = not (given.is_floating_point or given.is_complex or given == torch.bool)
    return whole if name == "weight_zero_point" else not whole and given.itemsize > 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
