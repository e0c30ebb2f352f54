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


def test_code_runs_and_gives_the_reference_bits_and_the_quoted_sqnr(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(block.replace("4096", "512"), names)
    assert torch.equal(names["q"], quantkit.reference.quantize_tensor(names["w"], names["qparams"]))
    (quoted,) = re.findall(r"# ([\d.]+) dB", block)
    sqnr = quantkit.measure(names["w"], names["qparams"]).sqnr_db.item()
    assert sqnr == pytest.approx(float(quoted), abs=0.2)
    assert names["y"].shape == (16, 512)
    (loading,) = re.findall(r"# (torch\.load.*)", block)
    q, qparams = eval(loading, names)
    assert torch.equal(q, names["q"]) and qparams == names["qparams"]


def test_it_is_short_and_begins_with_two_commands():
    assert len(README.splitlines()) <= 100
    commands = re.findall(r"```\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert [command.split("#")[0].strip() for command in commands] == ["make run", "make test"]


def test_links_work_on_a_package_index():
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", README)
    pictures = re.findall(r'src(?:set)?="([^"]*)"', README)
    assert len(targets) > 12 and len(pictures) == 2
    targets += [("!", picture) for picture in pictures]
    for image, target in targets:
        base = IMAGES if image else FILES
        assert target.startswith(base), f"{target}: not where a package index finds it"
        assert (ROOT / target.removeprefix(base)).is_file(), target


def test_every_public_name_is_in_the_table_of_functions():
    table = README[README.index("| function |") : README.index("| granularity |")]
    for name in quantkit.__all__:
        assert f"`{name}" in table, name
