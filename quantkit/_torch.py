"""What quantkit needs of torch: the oldest version, and names that torch does not promise to keep.

A torch without one of these names still imports quantkit. Its stand-in is right, and only slower.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ._version import TORCH_FLOOR, floor_text, release

RELEASE = release(torch.__version__)


def check_version(version: str) -> None:
    if release(version) < TORCH_FLOOR:
        raise ImportError(
            f"quantkit needs torch {floor_text()} or newer, found {version}; "
            "remedy: pip install --upgrade torch"
        )


check_version(torch.__version__)

# Without jit.trace there is nothing to be traced by.
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)
# Whether one of torch.func's transforms runs; True where nobody can tell.
may_be_transformed: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)


def may_have_tangents() -> bool:
    """Whether forward-mode differentiation runs; True where nobody can tell."""
    return getattr(forward_ad, "_current_level", 0) >= 0


@functools.cache
def _transforms() -> tuple[Callable[[], Any], tuple[Any, Any]] | None:
    """torch.func's stack of transforms, and the kinds that differentiate."""
    try:
        from torch._C._functorch import TransformType
        from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

        return retrieve_all_functorch_interpreters, (TransformType.Grad, TransformType.Jvp)
    except (ImportError, AttributeError):
        return None


def is_transformed() -> bool | None:
    """Whether a transform of torch.func differentiates (vmap does not); None where nobody can tell."""
    if not may_be_transformed():
        return False
    transforms = _transforms()
    if transforms is None:
        return None
    stack, differentiating = transforms
    return any(level.key() in differentiating for level in stack())


def is_fake(t: torch.Tensor) -> bool:
    kind = getattr(getattr(torch, "_subclasses", None), "FakeTensor", None)
    return kind is not None and isinstance(t, kind)


def is_dtensor(t: object) -> bool:
    """Without importing torch.distributed: who has one has imported it."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(t, kind)


def no_dtensors(name: str, *values: object) -> None:
    """Raise where one of values is a DTensor."""
    if "torch.distributed.tensor" in sys.modules and any(map(is_dtensor, values)):
        raise RuntimeError(
            f"{name}: expected plain tensors, got a DTensor; pass full_tensor() or to_local()"
        )


def fast_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What function.apply() ends in, without its search for default arguments.

    The search takes twice as long as all the rest.
    """
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def all_reduce(t: torch.Tensor, how: str, mesh: Any, mesh_dim: int) -> torch.Tensor:
    """t of all ranks along a mesh dimension by "max" or "sum": also inside of a compiler's graph."""
    try:
        from torch.distributed import _functional_collectives as collectives
    except ImportError:
        from torch import distributed

        made = t.clone()
        operation = getattr(distributed.ReduceOp, how.upper())
        distributed.all_reduce(made, operation, group=mesh.get_group(mesh_dim))
        return made
    return collectives.wait_tensor(collectives.all_reduce(t, how, (mesh, mesh_dim)))


_ranks_tag = ""


def keep_ranks_apart() -> None:
    """Have torch.compile's caches on the disk keep the graphs of ranks apart, which hold their shards.

    torch gives one rank the graph of another. What the user has for the tag stays in front.
    """
    global _ranks_tag
    from torch import distributed

    config: Any = getattr(torch.compiler, "config", None)
    tag = getattr(config, "cache_key_tag", None)
    if tag is None or not (distributed.is_available() and distributed.is_initialized()):
        return
    mine = f" rank {distributed.get_rank()} of {distributed.get_world_size()}"
    if not tag.endswith(mine):
        config.cache_key_tag = (tag.removesuffix(_ranks_tag) if _ranks_tag else tag) + mine
    _ranks_tag = mine


def register_pytree_node(*args: Any, **names: Any) -> None:
    """For export, vmap and torch.func; without it they take the class for a leaf."""
    try:
        from torch.utils import _pytree

        register = _pytree.register_pytree_node
    except (ImportError, AttributeError):
        return
    register(*args, **names)


def register_namedtuple(kind: type[Any], name: str) -> None:
    """For torch.export.save; without it that refuses programs that return one."""
    try:
        from torch.utils import _pytree

        register = _pytree._register_namedtuple
    except (ImportError, AttributeError):
        return
    register(kind, serialized_type_name=name)


def pytree_key(name: str) -> Any:
    from torch.utils import _pytree

    return _pytree.GetAttrKey(name)
