"""Linear layers: float32 beside quantized weights, and beside weights and inputs of int8.

python -m benchmarks.linear [--tokens 1,16,256] [--threads 1,2] [--shapes 4096x1024]

How many times faster than torch's float32 layer each is, and its signal-to-noise ratio. Every call of a
row runs in turn with the others.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from quantkit.nn import QuantLinear

from . import machine
from .measure import interleaved, summary
from .schemes import shapes

FLOAT = "float32"
Layer = Callable[[torch.Tensor], torch.Tensor]


def ours(scheme: str, activations: str | None = None) -> Callable[[nn.Linear, torch.Tensor], Layer]:
    return lambda layer, x: QuantLinear.from_float(layer, scheme, activations)


def quantize_dynamic(layer: nn.Linear, x: torch.Tensor) -> Layer:
    """torch's own, which is deprecated."""
    ao = importlib.import_module("torch.ao.quantization")
    return ao.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)


def torchao(layer: nn.Linear, x: torch.Tensor) -> Layer:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    quantization = importlib.import_module("torchao.quantization")
    model = nn.Sequential(layer)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_compiled(layer: nn.Linear, x: torch.Tensor) -> Layer:
    torch.compiler.reset()
    call = torch.compile(torchao(layer, x))
    call(x)
    return call


CONTESTANTS: dict[str, Callable[[nn.Linear, torch.Tensor], Layer]] = {
    FLOAT: lambda layer, x: layer,
    "W8A8": ours("int8_channel", "int8"),
    "weight only, int8": ours("int8_channel"),
    "weight only, int4": ours("int4_group128"),
    "torch, quantize_dynamic": quantize_dynamic,
    "torchao W8A8": torchao,
    "torchao W8A8, compiled": torchao_compiled,
}


def cell(
    shape: tuple[int, int], tokens: int, threads: int, names: list[str], budget: float
) -> dict:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer, x = nn.Linear(shape[1], shape[0]).eval(), torch.randn(tokens, shape[1])
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    calls, absent, sqnr = {}, {}, {}
    try:
        with torch.no_grad():
            for name in names:
                copy = nn.Linear(shape[1], shape[0]).eval()
                copy.load_state_dict(layer.state_dict())
                try:
                    made = CONTESTANTS[name](copy, x)
                    error = made(x).double() - exact
                except Exception as reason:  # whatever a rival cannot do
                    absent[name] = (
                        str(reason).splitlines()[0][:120] if str(reason) else repr(reason)
                    )
                    continue
                calls[name] = lambda made=made: made(x)
                sqnr[name] = float(10 * torch.log10(exact.square().sum() / error.square().sum()))
            seconds = interleaved(calls, budget)
    finally:
        torch.set_num_threads(before)
    return {
        "shape": list(shape),
        "tokens": tokens,
        "threads": threads,
        "sqnr_db": sqnr,
        "contestants": {k: {**summary(v), "seconds": v} for k, v in seconds.items()},
        "absent": absent,
    }


def table(run: list[dict], names: list[str], which: str) -> Table:
    title = f"{which} of milliseconds, how many times faster than float32, and dB"
    grid = Table(title=title, title_justify="left")
    for column in ("shape", "threads", "tokens", *names):
        grid.add_column(column, justify="left" if column == "shape" else "right")
    for c in run:
        row = ["×".join(map(str, c["shape"])), str(c["threads"]), str(c["tokens"])]
        for name in names:
            if name in c["absent"]:
                row.append("–")
                continue
            time = c["contestants"][name][which]
            text = f"{time * 1e3:.3f}"
            if name != FLOAT and FLOAT in c["contestants"]:
                text += f" {c['contestants'][FLOAT][which] / time:.2f}× {c['sqnr_db'][name]:.0f}"
            row.append(text)
        grid.add_row(*row)
    return grid


def numbers(text: str) -> list[int]:
    try:
        found = [int(n) for n in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,16,256, got {text!r}")
    return found


def main(arguments: list[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("benchmarks.linear", description=__doc__, formatter_class=kind)
    p.add_argument("--shapes", type=shapes, default=((4096, 1024),))
    p.add_argument("--tokens", type=numbers, default=[1, 16, 256])
    p.add_argument("--threads", type=numbers, default=[1, 2])
    p.add_argument("--skip", default="", help="names that begin with one of these words, by commas")
    p.add_argument("--seconds", type=float, default=3.0, help="for each cell; default: 3")
    p.add_argument("--json", type=Path, metavar="FILE", help="writes every time")
    args = p.parse_args(arguments)
    warnings.filterwarnings("ignore")
    skipped = tuple(word for word in args.skip.split(",") if word)
    names = [n for n in CONTESTANTS if not (skipped and n.startswith(skipped))]
    console = Console(width=None if sys.stdout.isatty() else 200)
    cells = [
        (shape, tokens, threads)
        for shape in args.shapes
        for threads in args.threads
        for tokens in args.tokens
    ]
    work = track(cells, description="measuring", console=console)
    run = [cell(*each, names, args.seconds) for each in work]
    for which in ("min", "median"):
        console.print(table(run, names, which))
    for name, reason in {k: v for c in run for k, v in c["absent"].items()}.items():
        console.print(f"{name}: {reason}", markup=False)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.description(), "cells": run}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
