"""Finds the compiled extension, or registers the reference as the operators' implementation.

Either way ``torch.ops.quantkit.*`` exists afterwards with the same schemas, fake kernels and autograd.
"""

from __future__ import annotations

import importlib
import inspect
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import _autograd, _checks, _fake, reference

CONTRACT = 1

_CHOOSE = (
    "Tensor x, int[]? block_size, int q_min, int q_max, float eps, bool symmetric, "
    "{dtype}bool include_zero=False"
)
_DYNAMIC = _CHOOSE.format(dtype="ScalarType dtype, ")
_GIVEN = "Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max"

# name: (arguments, results, reference, fake); csrc/ops.cpp has the same schemas.
_OPERATORS: dict[str, tuple[str, tuple[str, ...], Callable[..., Any], Callable[..., Any]]] = {
    "choose_qparams": (
        _CHOOSE.format(dtype=""),
        ("scale", "zero_point"),
        reference.choose_qparams_op,
        _fake.choose_qparams,
    ),
    "quantize": (
        _GIVEN + ", ScalarType dtype", ("out",), reference.quantize_op, _fake.quantize,
    ),
    "dequantize": (
        "Tensor q, Tensor scale, Tensor zero_point",
        ("out",),
        reference.dequantize_op,
        _fake.dequantize,
    ),
    "dynamic_quantize": (
        _DYNAMIC,
        ("q", "scale", "zero_point"),
        reference.dynamic_quantize_op,
        _fake.dynamic_quantize,
    ),
    "quantize_dequantize": (
        _DYNAMIC,
        ("q", "x_hat", "scale", "zero_point"),
        reference.quantize_dequantize_op,
        _fake.quantize_dequantize,
    ),
    "fake_quantize": (_GIVEN, ("out",), reference.fake_quantize_op, _fake.fake_quantize),
    # The same without a gradient (an Autograd kernel costs every call), and the gradient itself.
    "_fake_quantize": (_GIVEN, ("out",), reference.fake_quantize_op, _fake.fake_quantize),
    "_fake_quantize_backward": (
        "Tensor grad, " + _GIVEN,
        ("out",),
        reference.fake_quantize_backward_op,
        _fake.fake_quantize_backward,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """What runs behind the public functions and ``torch.ops.quantkit``.

    Attributes:
        extension: whether the compiled kernels run.
        reason: why they do not run, where they do not.
        isa: the instruction set in use, "reference" without the extension.
        isas: the instruction sets that this machine and this build have.
        cuda_archs: the GPU architectures compiled in.
        threads: how many threads a call may use.
        contract: the version of docs/numerics.md that is implemented.
    """

    extension: bool
    reason: str
    isa: str
    isas: tuple[str, ...]
    cuda_archs: tuple[str, ...]
    threads: int
    contract: int

    def __str__(self) -> str:
        kind = f"extension, {self.isa}" if self.extension else f"reference ({self.reason})"
        cuda = f"CUDA {' '.join(self.cuda_archs)}" if self.cuda_archs else "no CUDA kernels"
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"quantkit: {kind}, {cuda}, {threads}, contract {self.contract}"


def backend() -> Backend:
    """Tell which code runs: compiled kernels and their instruction set, or the reference, and why."""
    threads = torch.get_num_threads()
    if extension is None:
        return Backend(False, reason, "reference", (), (), threads, CONTRACT)
    threads = 1 if extension.forked_from_threads() else threads
    isas, archs = tuple(extension.isas()), tuple(extension.cuda_archs())
    return Backend(True, "", extension.isa(), isas, archs, threads, CONTRACT)


def _load():
    """(the extension's module, "") or (None, why it is not used)."""
    wanted = os.environ.get("QUANTKIT_REFERENCE", "")
    if wanted not in ("", "0", "1"):
        raise ImportError(f"QUANTKIT_REFERENCE: expected 0 or 1, got {wanted!r}")
    forced_isa = os.environ.get("QUANTKIT_ISA", "")
    if wanted == "1":
        if forced_isa:
            raise ImportError(
                f"QUANTKIT_REFERENCE=1 and QUANTKIT_ISA={forced_isa} exclude each other: unset one"
            )
        return None, "QUANTKIT_REFERENCE=1"
    remedy = "remedy: reinstall quantkit for this Python and torch (pip install --force-reinstall "
    remedy += "--no-deps .), or set QUANTKIT_REFERENCE=1 to run the slow reference"
    spec = find_spec("quantkit._C")
    if spec is None or spec.origin is None:  # without an origin it is a mere folder
        foreign = sorted(path.name for path in Path(__file__).parent.glob("_C*.so"))
        if foreign:
            raise ImportError(
                f"quantkit's extension was built for another Python ({', '.join(foreign)}); {remedy}"
            )
        elsewhere = platform.system() != "Linux"
        if forced_isa:
            build = "unset it" if elsewhere else "build it (pip install .)"
            raise ImportError(
                f"QUANTKIT_ISA={forced_isa}: there is no compiled extension; remedy: {build}"
            )
        return None, f"the extension is {'built on Linux only' if elsewhere else 'not built'}"
    try:
        module = importlib.import_module("quantkit._C")
    except ImportError as error:
        raise ImportError(f"quantkit's extension does not load: {error}; {remedy}") from error
    try:
        module.isa()  # chooses the instruction set now
    except RuntimeError as error:  # QUANTKIT_ISA names one that cannot run
        raise ImportError(str(error)) from None
    return module, ""


def _schemas(name: str) -> tuple[str, str]:
    """The functional schema and that of the ``out`` overload."""
    arguments, results, *_ = _OPERATORS[name]
    returns = "Tensor" if len(results) == 1 else f"({', '.join(['Tensor'] * len(results))})"
    outs = ", ".join(f"Tensor({chr(97 + i)}!) {result}" for i, result in enumerate(results))
    return f"{name}({arguments}) -> {returns}", f"{name}.out({arguments}, *, {outs}) -> ()"


def _as_operator(function):
    """An operator raises RuntimeError where the Python functions raise the exact type, as from C++."""

    def kernel(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from None

    return kernel


def _out_overload(name: str, function, write: bool):
    """The ``out`` overload of a functional implementation (or, without writing, of a fake one)."""
    _, names, *_ = _OPERATORS[name]
    signature = inspect.signature(function)

    def kernel(*args, **kwargs):
        outs = {name: kwargs.pop(name) for name in names}
        arguments = signature.bind(*args, **kwargs).arguments
        results = function(**arguments)
        results = results if isinstance(results, tuple) else (results,)
        inputs = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        _checks.outputs(
            outs,
            [(r.shape, r.dtype, r.device) for r in results],
            inputs,
            in_place="x" if name.endswith("fake_quantize") else None,
        )
        _checks.outside_of_graphs(outs)
        if write:
            _checks.claim(outs)
            for out, result in zip(outs.values(), results, strict=True):
                out.copy_(result)

    return kernel


def _negative_kernel(operator):
    """For a lazy negation (``z.conj().imag``) among the arguments: torch's own fallback loses ``out``."""

    def kernel(*args, **outs):
        for name, out in outs.items():
            if isinstance(out, torch.Tensor) and out.is_neg():
                raise RuntimeError(
                    f"{name}: expected a tensor that is not lazily negated; pass a clone"
                )
        return operator(
            *(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args), **outs
        )

    return kernel


def _register_fallback(library: torch.library.Library) -> None:
    for name, (_, _, function, _) in _OPERATORS.items():
        for schema in _schemas(name):
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        out = _out_overload(name, function, write=True)
        library.impl(name, _as_operator(function), "CompositeExplicitAutograd")
        library.impl(f"{name}.out", _as_operator(out), "CompositeExplicitAutograd")


def _register_shared(library: torch.library.Library) -> None:
    """Fake kernels and autograd: the same for the extension and the fallback."""
    for name, (_, _, _, fake) in _OPERATORS.items():
        torch.library.register_fake(f"quantkit::{name}", _as_operator(fake), lib=library)
        torch.library.register_fake(
            f"quantkit::{name}.out",
            _as_operator(_out_overload(name, fake, write=False)),
            lib=library,
        )
        # Without a kernel on this key results would claim requires_grad=True.
        if name != "fake_quantize":
            library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        library.impl(f"{name}.out", torch.library.fallthrough_kernel, "Autograd")
        out = getattr(torch.ops.quantkit, name).out
        for operator in (getattr(torch.ops.quantkit, name).default, out):
            if torch.Tag.pt2_compliant_tag not in operator.tags:  # from C++ only since torch 2.12
                operator.tags.append(torch.Tag.pt2_compliant_tag)
        library.impl(f"{name}.out", _negative_kernel(out), "Negative")
    library.impl("fake_quantize", _autograd.kernel, "Autograd")


extension, reason = _load()
_library = torch.library.Library("quantkit", "DEF" if extension is None else "FRAGMENT")
if extension is None:
    _register_fallback(_library)
    warnings.warn(
        f"quantkit runs its slow pure-torch reference: {reason}", UserWarning, stacklevel=3
    )
_register_shared(_library)
