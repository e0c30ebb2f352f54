"""The README's code runs, and its table of variables is complete."""

import re
from pathlib import Path

import torch

import quantkit

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_code_runs_and_gives_the_reference_bits():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(block.replace("4096", "256"), names)
    expected = quantkit.reference.quantize_tensor(names["w"], names["qparams"])
    assert torch.equal(names["q"], expected)


def test_every_environment_variable_is_documented():
    sources = [*ROOT.glob("quantkit/*.py"), *ROOT.glob("csrc/**/*.cpp")]
    used = {
        name
        for path in sources
        for name in re.findall(r'(?:environ\.get|getenv)\("(QUANTKIT_\w+)"', path.read_text())
    }
    assert used == {"QUANTKIT_ISA", "QUANTKIT_REFERENCE", "QUANTKIT_HUGEPAGES"}
    assert all(name in README for name in used)
