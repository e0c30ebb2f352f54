"""Finds the compiled extension, or registers the reference as the operators' implementation.

Either way ``torch.ops.quantkit.*`` exists afterwards with the same schemas, fake kernels and autograd.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import _autograd, _checks, _torch, ops
from .operators import GRADIENTS, OPERATORS, fake, functional, overloads, schemas

CONTRACT = 2


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


# ---- kernels around those of an operator ------------------------------------------------------------


def _out_overload(name: str, function: Callable[..., Any], write: bool) -> Callable[..., Any]:
    """The ``out`` overload of a functional implementation (or, without writing, of a fake one)."""
    operator = OPERATORS[name]
    names = [a.name for a in overloads(name)[0]._schema.arguments if not a.kwarg_only]
    in_place = "x" if name.partition(".")[0].endswith("fake_quantize") else None

    def kernel(*args, **options):
        outs = {result: options.pop(result) for result in operator.results}
        # What was given by name, of those that may be given by place, comes by place.
        arguments = dict(zip(names, args, strict=False)) | options
        placed = [arguments[name] for name in names if name in arguments]
        results = function(*placed, **{k: v for k, v in options.items() if k not in names})
        results = results if isinstance(results, tuple) else (results,)
        inputs = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        _checks.outputs(outs, results, inputs, in_place)
        if write:
            _checks.claim(outs)
            for out, result in zip(outs.values(), results, strict=True):
                out.copy_(result)

    return kernel


def _negative(operator: Callable[..., Any], results: tuple[str, ...]) -> Callable[..., Any]:
    """For a lazy negation (``z.conj().imag``) among the arguments: torch's own fallback loses ``out``."""

    def plain(argument):
        return argument.resolve_neg() if isinstance(argument, torch.Tensor) else argument

    def kernel(*args, **options):
        for name in results:
            out = options[name]
            if isinstance(out, torch.Tensor) and out.is_neg():
                raise RuntimeError(
                    f"{name}: expected a tensor that is not lazily negated; pass a clone"
                )
        return operator(*map(plain, args), **{k: plain(v) for k, v in options.items()})

    return kernel


def _raising_runtime_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """As C++ does: operators raise RuntimeError where the functions raise the exact type."""

    def kernel(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from None

    return kernel


def _are_first_dtensors(values: Iterable[Any], raised: Exception) -> bool:
    """Whether a DTensor is among them and quantkit.distributed was not loaded; it is now."""
    name = f"{__package__}.distributed"
    if name in sys.modules:
        return False
    in_a_transform = "does not have a sharding strategy" in str(raised)  # torch.func wraps tensors
    if not in_a_transform and not any(map(_torch.is_dtensor, values)):
        return False
    importlib.import_module(name)
    return True


def _raising_exact_errors(
    operator: Callable[..., Any], check: Callable[..., Any]
) -> Callable[..., Any]:
    """operator for the public functions; where it raises, check(*args) names the error."""

    def call(*args, **options):
        try:
            return operator(*args, **options)
        except Exception as error:  # torch's own of foreign arguments are of any type
            raised = error
        try:
            if _are_first_dtensors((*args, *options.values()), raised):
                return call(*args, **options)
            check(*args, **options)
            raise raised
        except Exception as explained:
            raise explained from None
        finally:
            # A frame that its own error holds lives until the collector runs, and with it torch's
            # guards in the error's frames: no torch.func transform works meanwhile.
            del raised

    return call


# ---- registration -----------------------------------------------------------------------------------


def _register(library: torch.library.Library) -> None:
    """The operators where there is no extension; fake kernels and autograd, the same for both."""
    for name, operator in OPERATORS.items():
        if extension is None:
            for schema in schemas(name):
                library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        plain, plain_fake = operator.reference, fake(name)
        kernels = plain, _out_overload(name, plain, write=True)
        fakes = plain_fake, _out_overload(name, plain_fake, write=False)
        for kernel, fake_kernel, overload in zip(kernels, fakes, overloads(name), strict=True):
            if extension is None:
                kernel = _raising_runtime_errors(kernel)
                library.impl(overload, kernel, "CompositeExplicitAutograd")
            fake_kernel = _raising_runtime_errors(fake_kernel)
            torch.library.register_fake(overload, fake_kernel, lib=library)
            if torch.Tag.pt2_compliant_tag not in overload.tags:  # from C++ only since torch 2.12
                overload.tags.append(torch.Tag.pt2_compliant_tag)
        allocating, out = overloads(name)
        library.impl(out, _negative(out, operator.results), "Negative")
        # Without a kernel on this key results would claim requires_grad=True.
        library.impl(out, torch.library.fallthrough_kernel, "Autograd")
        if name == "linear_w8a8":
            torch.library.register_autograd(
                allocating, _autograd.no_gradient, setup_context=_autograd.keep_forms, lib=library
            )
        elif name.partition(".")[0] != "fake_quantize":
            library.impl(allocating, torch.library.fallthrough_kernel, "Autograd")
    library.define(_autograd.NO_GRADIENT, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("_no_gradient", _autograd.no_gradient_op, "CompositeExplicitAutograd")
    torch.library.register_fake("quantkit::_no_gradient", _autograd.no_gradient_fake, lib=library)
    for name, operator in GRADIENTS.items():
        library.define(schemas(name)[0], tags=(torch.Tag.pt2_compliant_tag,))
        overload, kernel = functional(name), _raising_runtime_errors(operator.reference)
        library.impl(overload, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(overload, fake(name), lib=library)
        library.impl(overload, torch.library.fallthrough_kernel, "Autograd")


_SINGLE = tuple(field.name for field in fields(ops.SingleOperators))


def _functions_call(library: torch.library.Library, overload: str) -> ops.Operators:
    """What the public functions call: one overload of each operator, and the gradient beside it."""
    names = {
        name.partition(".")[0]: name
        for name in OPERATORS
        if name.partition(".")[2] == overload and name not in _SINGLE
    }
    calls = {base: functional(name) for base, name in names.items()}
    masked, gradient = calls["_fake_quantize_masked"], functional("_masked_gradient")
    of_parameters = [functional(name) for name in GRADIENTS if name.partition(".")[2] == overload]
    keywords = _autograd.keywords_of(OPERATORS[names["_fake_quantize_masked"]].reference)
    transformed, differentiable = _autograd.differentiable(
        masked, gradient, of_parameters, keywords
    )
    plain, public = calls["_fake_quantize"], calls["fake_quantize"]
    library.impl(public, _autograd.kernel(differentiable, plain), "Autograd")
    calls["fake_quantize"] = _autograd.by_mode(public, transformed, plain)

    return ops.Operators(**{
        base: _raising_exact_errors(call, OPERATORS[names[base]].check)
        for base, call in calls.items() if base[0] != "_"
    })  # fmt: skip


def _single_operators() -> ops.SingleOperators:
    calls = {name: functional(name) for name in _SINGLE}
    calls["linear_w8a8"] = _autograd.without_tangents(calls["linear_w8a8"])
    return ops.SingleOperators(**{
        name: _raising_exact_errors(call, OPERATORS[name].check) for name, call in calls.items()
    })  # fmt: skip


extension, reason = _load()
_library = torch.library.Library("quantkit", "DEF" if extension is None else "FRAGMENT")
_register(_library)
if extension is None:
    warnings.warn(
        f"quantkit runs its slow pure-torch reference: {reason}", UserWarning, stacklevel=3
    )
ops.operators = _functions_call(_library, "")
ops.format_operators = _functions_call(_library, "format")
ops.single_operators = _single_operators()
