"""Linear layers: float32 beside quantized weights, and beside weights and inputs of int8.

python -m benchmarks.linear [--tokens 1,16,256] [--threads 1,2] [--shapes 4096x1024]

How many times faster than torch's float32 layer each is, and its signal-to-noise ratio. Every call of a
row runs in turn with the others.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator

import torch
from rich.table import Table
from torch import nn

from quantkit.nn import QuantLinear

from .command import cells_parser, contestants, numbers, reason_of, run, table, threads

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


def cell(shape: tuple[int, int], tokens: int, count: int, names: list[str], budget: float) -> dict:
    torch.manual_seed(0)
    layer, x = nn.Linear(shape[1], shape[0]).eval(), torch.randn(tokens, shape[1])
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    calls, absent, sqnr = {}, {}, {}
    with threads(count), torch.no_grad():
        for name in names:
            copy = nn.Linear(shape[1], shape[0]).eval()
            copy.load_state_dict(layer.state_dict())
            try:
                made = CONTESTANTS[name](copy, x)
                error = made(x).double() - exact
            except Exception as reason:  # whatever a rival cannot do
                absent[name] = reason_of(reason)
                continue
            calls[name] = lambda made=made: made(x)
            sqnr[name] = float(10 * torch.log10(exact.square().sum() / error.square().sum()))
        measured = contestants(calls, budget)
    return {
        "shape": list(shape),
        "tokens": tokens,
        "threads": count,
        "sqnr_db": sqnr,
        "contestants": measured,
        "absent": absent,
    }


def entry(c: dict, name: str, which: str) -> str:
    if name in c["absent"]:
        return "–"
    time = c["contestants"][name][which]
    text = f"{time * 1e3:.3f}"
    if name != FLOAT and FLOAT in c["contestants"]:
        text += f" {c['contestants'][FLOAT][which] / time:.2f}× {c['sqnr_db'][name]:.0f}"
    return text


def main(arguments: list[str] | None = None) -> int:
    p = cells_parser("benchmarks.linear", __doc__, ((4096, 1024),), seconds=3.0)
    p.add_argument("--tokens", type=numbers, default=(1, 16, 256))
    p.add_argument("--threads", type=numbers, default=(1, 2))
    p.add_argument("--skip", default="", help="names that begin with one of these words, by commas")
    args = p.parse_args(arguments)
    skipped = tuple(word for word in args.skip.split(",") if word)
    names = [n for n in CONTESTANTS if not (skipped and n.startswith(skipped))]

    def tables(run: list[dict]) -> Iterator[Table]:
        for which in ("min", "median"):
            title = f"{which} of milliseconds, how many times faster than float32, and dB"
            rows = [
                (c["shape"], c["threads"], c["tokens"], *(entry(c, n, which) for n in names))
                for c in run
            ]
            yield table(title, ("shape",), ("threads", "tokens", *names), rows)

    cells = [
        (shape, tokens, count, names)
        for shape in args.shapes
        for count in args.threads
        for tokens in args.tokens
    ]
    found = run(args, cell, cells, tables)
    for name, reason in {k: v for c in found for k, v in c["absent"].items()}.items():
        print(f"{name}: {reason}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
