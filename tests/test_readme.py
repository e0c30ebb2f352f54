"""The README: its code runs and gives the SQNRs it quotes, it is short, and its links work elsewhere."""

import re
from pathlib import Path

import pytest
import torch

import quantkit

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
# Where the files will be; a package index shows the README without them.
FILES = "https://github.com/quantkit/quantkit/blob/main/"
IMAGES = "https://raw.githubusercontent.com/quantkit/quantkit/main/"


def test_code_runs_and_gives_the_reference_bits_and_the_quoted_sqnr():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(block.replace("4096", "512"), names)
    expected = quantkit.reference.quantize_tensor(names["w"], names["qparams"])
    assert torch.equal(names["q"], expected)
    for name, quoted in re.findall(r"_, (\w+), _ = .*# SQNR ([\d.]+) dB", block):
        p = quantkit.get_asymmetric_qparams(names["x"], include_zero=name == "zero")
        assert torch.equal(names[name], quantkit.fake_quantize(names["x"], p))
        sqnr = quantkit.measure(names["x"], p).sqnr_db.item()
        assert sqnr == pytest.approx(float(quoted), abs=1), name
    assert block.count("SQNR") == 2


def test_it_is_short_and_begins_with_two_commands():
    assert len(README.splitlines()) <= 100
    commands = re.findall(r"```\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert [command.split("#")[0].strip() for command in commands] == ["make run", "make test"]


def test_links_work_on_a_package_index():
    links = dict(re.findall(r"^\[(\w+)\]: (.*)$", README, re.MULTILINE))
    used = re.findall(r"(!?)\[[^\]]*\]\[(\w+)\]", README)
    assert {name for _, name in used} == set(links)
    targets = [(image, links[name]) for image, name in used]
    targets += re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", README)
    assert len(targets) > 12
    for image, target in targets:
        base = IMAGES if image else FILES
        assert target.startswith(base), f"{target}: not where a package index finds it"
        assert (ROOT / target.removeprefix(base)).is_file(), target


def test_every_public_name_is_in_the_table_of_functions():
    table = README[README.index("| function |") : README.index("| scheme |")]
    for name in quantkit.__all__:
        assert f"`{name}" in table, name
