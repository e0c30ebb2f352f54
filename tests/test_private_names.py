"""torch may drop a name that it never promised: quantkit then imports and computes all the same."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit

PACKAGE = Path(quantkit.__file__).parent
# What quantkit/_torch.py uses: (the module, the name).
NAMES = [
    ("torch._C", "_is_tracing"),
    ("torch._C", "_are_functorch_transforms_active"),
    ("torch._C._functorch", "TransformType"),
    ("torch._functorch.pyfunctorch", "retrieve_all_functorch_interpreters"),
    ("torch.autograd.forward_ad", "_current_level"),
    ("torch", "_subclasses"),
    ("torch._subclasses", "FakeTensor"),
    ("torch.utils", "_pytree"),
    ("torch.utils._pytree", "register_pytree_node"),
    ("torch.utils._pytree", "_register_namedtuple"),
    ("torch.utils._pytree", "GetAttrKey"),
]
# One process imports torch, and a child forked from it runs each case.
PROGRAM = """
import importlib, os, sys, warnings
import torch
import torch._dynamo  # as torch.func does, in each child
warnings.simplefilter("ignore")
for names in {cases}:
    if (child := os.fork()) == 0:
        break
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"without {{names}}")
else:
    sys.exit()
hidden = []
for module, name in names:
    module = importlib.import_module(module)
    hidden.append((module, name, getattr(module, name)))
    delattr(module, name)
    sys.modules.pop(module.__name__ + "." + name, None)

import quantkit
x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
q, x_hat, p = quantkit.quantize_dequant(x, True)
right_q, right, _ = quantkit.reference.quantize_dequant(x, True)
assert torch.equal(q, right_q) and torch.equal(x_hat, right)
assert torch.equal(quantkit.dequantize_tensor(q, p), right)
out = torch.empty_like(x)
torch.ops.quantkit.dequantize.out(q, p.scale, p.zero_point, out=out)
assert torch.equal(out, right)

# From here on torch has the name, which its own autograd needs; quantkit has sought it in vain.
quantkit._torch._transforms()
for module, name, value in hidden:
    setattr(module, name, value)
    if type(value) is type(sys):
        sys.modules[value.__name__] = value
assert torch.equal(quantkit.fake_quantize(x, p), right)
assert torch.equal(torch.ops.quantkit.fake_quantize(x, p.scale, p.zero_point, -128, 127), right)
narrow = quantkit.QuantizationParams(p.scale, p.zero_point, -64, 63)
codes = torch.round(x / p.scale)
inside = ((codes >= -64) & (codes <= 63)).float()
y = x.clone().requires_grad_()
quantkit.fake_quantize(y, narrow).sum().backward()
assert torch.equal(y.grad, inside)
gradient = torch.func.grad(lambda x: quantkit.fake_quantize(x, narrow).sum())(x)
assert torch.equal(gradient, inside)
_, tangent = torch.func.jvp(lambda x: quantkit.fake_quantize(x, narrow), (x,), (torch.ones(6, 8),))
assert torch.equal(tangent, inside)
"""


ALL = sorted(NAMES, key=lambda each: -each[0].count("."))  # a module's names before the module


@pytest.mark.parametrize(
    ("reference", "cases"),
    [("0", [*([name] for name in NAMES), ALL]), ("1", [ALL])],
    ids=["extension", "fallback"],
)
@pytest.mark.full
def test_without_any_and_without_all_of_them_calls_and_gradients_are_right(reference, cases):
    env = {k: v for k, v in os.environ.items() if not k.startswith("QUANTKIT_")}
    env |= {"PYTHONPATH": str(PACKAGE.parent), "QUANTKIT_REFERENCE": reference}
    command = [sys.executable, "-c", PROGRAM.format(cases=cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def private_names(path):
    """(line, name) of what a module reads of torch under a name with an underscore."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            named = parts[0] in ("torch", "forward_ad") and parts[-1] != "__version__"
            private = named and any(p[0] == "_" for p in parts[1:])
            if private and not ast.unparse(node).startswith("torch.ops.quantkit"):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(name[0] == "_" for name in names):
                yield node.lineno, ".".join(names)


def test_they_stand_in_one_file():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "_torch.py"]
    found = {path: list(private_names(path)) for path in files}
    assert {name: names for name, names in found.items() if names} == {}
