"""The table of docs/calibration.md, on all-MiniLM-L6-v2 and the sentences of this project's license."""

import re
from pathlib import Path

import pytest
import torch

import quantkit

transformers = pytest.importorskip("transformers", reason="make loaders-test")
ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "calibration.md"


def sentences():
    text = " ".join((ROOT / "LICENSE").read_text().split())
    return [s for s in re.split(r"[.;:,] ", text) if len(s) > 20]


def per_token(x):
    blocks = [1] * (x.dim() - 1) + [-1]
    return quantkit.get_symmetric_qparams(x, block_size=blocks)


def ways(stats, channels):
    """What the page names, and how a layer's input gets its parameters."""
    yield "weights only", None
    yield "dynamic, per token", lambda name: per_token
    yield "dynamic, per tensor", lambda name: quantkit.get_symmetric_qparams
    yield "static, per channel", lambda name: lambda x: channels[name].qparams(rank=x.dim())
    fp8 = stats.qparams(dtype="float8_e4m3fn")
    yield "static float8, minmax", lambda name: lambda x: fp8[name]
    for sym, word in ((True, "symmetric"), (False, "asymmetric")):
        for method in quantkit.observers.METHODS:
            found = stats.qparams(method, sym=sym)
            yield f"static, {method}, {word}", lambda name, p=found: lambda x: p[name]


def test_figures_of_the_page(minilm, capsys):
    def load():
        return transformers.AutoModel.from_pretrained(minilm).eval()

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    inputs = [tokenizer([s], return_tensors="pt") for s in sentences()]
    held, seen = inputs[::4], [i for n, i in enumerate(inputs) if n % 4]
    assert len(held) >= 20
    model = load()
    with (
        quantkit.observe(model) as stats,
        quantkit.observe(model, granularity="channel") as channels,
    ):
        for i in seen:
            model(**i)
    expected = [model(**i).last_hidden_state.double() for i in held]
    measured = {}
    for way, parameters in ways(stats, channels):
        other = load()
        for name in stats:
            layer = other.get_submodule(name)
            weight = layer.weight.data
            p = quantkit.get_symmetric_qparams(weight, True)
            layer.weight.data = quantkit.fake_quantize(weight, p)
            if parameters is not None:
                choose = parameters(name)
                layer.register_forward_pre_hook(
                    lambda _, args, choose=choose: quantkit.fake_quantize(args[0], choose(args[0]))
                )
        signal = noise = 0.0
        for i, y in zip(held, expected, strict=True):
            signal += y.square().sum().item()
            noise += (other(**i).last_hidden_state - y).square().sum().item()
        measured[way] = 10 * torch.tensor(signal / noise).log10().item()
    table = "\n".join(f"| {way} | {db:.1f} |" for way, db in measured.items())
    with capsys.disabled():
        print(f"\n{len(seen)} sentences, {len(held)} others\n{table}")
    rows = dict(re.findall(r"^\| ([a-z0-9 ,]+) \| (\d+\.\d) \|$", PAGE.read_text(), re.MULTILINE))
    assert rows.keys() == measured.keys()
    for way, db in measured.items():
        assert abs(float(rows[way]) - db) < 0.5, f"{way}: {db:.1f} dB"
