"""The operators as torch sees them: opcheck, schemas, meta tensors."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lib.backends import daily
from lib.cases import NAMES, flat, inputs, invoke, on_meta

import quantkit
from quantkit.operators import OPERATORS, overloads

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
PACKAGE = Path(quantkit.__file__).parent
pytestmark = pytest.mark.fallback


def opcheck(overload, *args, **options):
    """torch's own, which cannot compare float8 before and after a call."""
    tests = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    if any(isinstance(t, torch.Tensor) and t.dtype in FLOAT8 for t in (*args, *options.values())):
        tests.remove("test_schema")
    torch.library.opcheck(overload, args, options, test_utils=tests)


EACH = pytest.mark.parametrize("which", daily(range(4), 1))  # of inputs()


@EACH
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, which):
    invoke(partial(opcheck, overloads(name)[0]), list(inputs(name))[which])


@EACH
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_out(name, which):
    _, results, *_ = OPERATORS[name]
    args = list(inputs(name))[which]
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    functional, out = overloads(name)
    made = flat(invoke(functional, args))
    outs = {r: torch.empty_like(t) for r, t in zip(results, made, strict=True)}
    invoke(partial(opcheck, out, **outs), args)


def test_meta_tensors_have_the_results_of_real_ones():
    for name in NAMES:
        for args in inputs(name):
            real = invoke(overloads(name)[0], args)
            meta = invoke(overloads(name)[0], on_meta(args))
            for r, m in zip(flat(real), flat(meta), strict=True):
                assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())
                assert m.device.type == "meta"


def test_extension_and_fallback_have_the_same_schemas(torch_process):
    program = (
        "import torch, quantkit\n"
        f"for name in {NAMES}:\n"
        "    for overload in quantkit.operators.overloads(name):\n"
        "        print(overload._schema)\n"
    )
    done = torch_process.run(program, PACKAGE.parent, QUANTKIT_REFERENCE="1")
    here = [str(overload._schema) for name in NAMES for overload in overloads(name)]
    assert done.stdout.splitlines() == here, done.stderr
