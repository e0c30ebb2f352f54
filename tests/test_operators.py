"""The operators as torch sees them: opcheck, schemas, meta tensors."""

from pathlib import Path

import pytest
import torch
from lib.backends import daily
from lib.cases import NAMES, flat, inputs

import quantkit
from quantkit.operators import OPERATORS

ops = torch.ops.quantkit
PACKAGE = Path(quantkit.__file__).parent
pytestmark = pytest.mark.fallback


EACH = pytest.mark.parametrize("which", daily(range(4), 1))  # of inputs()


@EACH
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, which):
    torch.library.opcheck(getattr(ops, name).default, list(inputs(name))[which])


@EACH
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_out(name, which):
    _, results, *_ = OPERATORS[name]
    args = list(inputs(name))[which]
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    made = flat(getattr(ops, name).default(*args))
    outs = {r: torch.empty_like(t) for r, t in zip(results, made, strict=True)}
    torch.library.opcheck(getattr(ops, name).out, args, outs)


def test_meta_tensors_have_the_results_of_real_ones():
    for name in NAMES:
        for args in inputs(name):
            real = getattr(ops, name)(*args)
            meta = getattr(ops, name)(
                *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
            )
            pairs = zip(*((r if isinstance(r, tuple) else (r,)) for r in (real, meta)), strict=True)
            for r, m in pairs:
                assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())
                assert m.device.type == "meta"


def test_extension_and_fallback_have_the_same_schemas(torch_process):
    program = (
        "import torch, quantkit\n"
        f"for name in {NAMES}:\n"
        "    for overload in ('default', 'out'):\n"
        "        print(getattr(getattr(torch.ops.quantkit, name), overload)._schema)\n"
    )
    done = torch_process.run(program, PACKAGE.parent, QUANTKIT_REFERENCE="1")
    here = [
        str(getattr(getattr(ops, name), overload)._schema)
        for name in NAMES
        for overload in ("default", "out")
    ]
    assert done.stdout.splitlines() == here, done.stderr
