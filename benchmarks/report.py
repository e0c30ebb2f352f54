"""From measured cells to tables and the sections of the pages that quote a run."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cells import OURS, OURS_OUT, ours_for, ratio

LARGE, MIDDLE, SMALL = [4096, 4096], [512, 1024], [64, 1024]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def title(cell: dict) -> str:
    shape = "×".join(map(str, cell["shape"]))
    scheme = "" if cell["scheme"] == "symmetric" else f", {cell['scheme']}"
    return f"{cell['op']} {shape} {cell['dtype']}, per {cell['granularity']}{scheme}"


def cell_table(cell: dict) -> Table:
    caches = f"{cell['caches']} caches, {cell['threads']} threads"
    table = Table(title=f"{title(cell)} ({caches})", title_justify="left")
    for name in ("", "min ms", "median ms", "GB/s", "time / ours", "result"):
        table.add_column(name, justify="left" if name in ("", "result") else "right")
    for name, c in cell["contestants"].items():
        moved = cell.get("copied_bytes", 0) if name in ("copy", "clone") else cell["bytes"]
        against = ratio(cell, name, ours_for(name))
        table.add_row(
            name,
            milliseconds(c["min"]),
            milliseconds(c["median"]),
            f"{moved / c['median'] / 1e9:.1f}" if moved else "",
            f"{against:.2f}" if against is not None and name not in (OURS, OURS_OUT) else "",
            c["note"],
        )
    for name, reason in cell["absent"].items():
        style = "bold red" if reason.startswith("missing") else "dim"
        table.add_row(name, "-", "-", "", "", escape(reason), style=style)
    return table


def memory_table(run: dict) -> Table:
    table = Table(title="Peak memory of one call without its outputs, MiB", title_justify="left")
    for name in ("", "MiB"):
        table.add_column(name, justify="right" if name else "left")
    for entry in run["memory"]:
        name = f"{entry['op']} 4096×4096 float32, per {entry['granularity']}"
        if "peak_bytes" in entry:
            own = (entry["peak_bytes"] - entry["output_bytes"]) / 2**20
            table.add_row(name, f"{own:.2f}")
        else:
            table.add_row(name, escape(entry["reason"]))
    return table


def show(run: dict, console: Console) -> None:
    groups = ("main", "threads", "granularities", "calls")
    for cell in run["cells"]:
        if cell["group"] in groups:
            console.print(cell_table(cell))
    if run["memory"]:
        console.print(memory_table(run))
    missing = sorted(k for k, v in run["machine"]["rivals"].items() if v is None)
    if missing:
        console.print(
            f"[bold red]not installed: {', '.join(missing)}[/] (make bench installs them)"
        )


# ---- the pages' sections -----------------------------------------------------------------------------

OPERATIONS = (
    ("quantize", {}),
    ("dequantize", {}),
    ("dynamic_quantize", {}),
    ("quantize_dequantize", {}),
    ("quantize_dequantize", {"granularity": "channel"}),
    ("quantize_dequantize", {"scheme": "asymmetric"}),
    ("quantize_dequantize", {"dtype": "bfloat16"}),
)
# Of docs/performance.md and of the README: operation, shape, what is unusual.
PAGE = (
    *((op, LARGE, {}) for op in ("choose_qparams", "fake_quantize")),
    *((op, shape, more) for shape in (LARGE, MIDDLE, SMALL) for op, more in OPERATIONS),
)
README = (
    *((op, LARGE, more) for op, more in (*OPERATIONS[:3], OPERATIONS[4])),
    ("quantize", SMALL, {}),
)
COLUMNS = {
    "eager": "plain PyTorch",
    "compile": "torch.compile",
    "torch": "torch's own",
    "torchao_compile": "torchao, compiled",
    "onnxruntime": "ONNX Runtime",
}


def _setting(run: dict) -> str:
    machine = run["machine"]
    setting = (machine["cpu"], f"{machine['threads']} threads", machine["quantkit"]["isa"])
    pages = machine["huge_pages"]
    versions = f"torch {machine['torch']}, huge pages `{pages}`, commit {machine['commit']}"
    return f"{', '.join(setting)}, {versions}"


def find(run: dict, op: str, shape: list[int], more: dict) -> dict | None:
    wanted = {"group": "main", "op": op, "shape": shape, "dtype": "float32"}
    wanted |= {"granularity": "tensor", "scheme": "symmetric"} | more
    return next((c for c in run["cells"] if all(c[k] == v for k, v in wanted.items())), None)


def quoted(run: dict, rows: Iterable[tuple[str, list[int], dict]] = PAGE) -> list[dict]:
    """The cells that a page shows."""
    return [cell for row in rows if (cell := find(run, *row)) is not None]


def markdown(run: dict, rows: Iterable[tuple[str, list[int], dict]] = PAGE) -> str:
    """A page's section: quantkit's time, and how many times longer each rival takes."""
    lines = [
        f"Medians of one run on {_setting(run)}.",
        "Of a copy: bytes per second into `out=`, divided by those of `y.copy_(x)`; minima. "
        "Further columns: the time divided by quantkit's. An asterisk marks other bits. "
        "ONNX Runtime reuses its output, as `out=` does.",
        "",
        "| operation | quantkit, ms | of a copy | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for cell in quoted(run, rows):
        entries = [_of_a_copy(cell), *(_entry(cell, rival) for rival in COLUMNS)]
        ours = milliseconds(cell["contestants"][OURS]["median"])
        lines.append(f"| {title(cell)} | {ours} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def _of_a_copy(cell: dict) -> str:
    times = cell["contestants"]
    if "copy" not in times:
        return "-"
    ours, copy = times[OURS_OUT]["min"], times["copy"]["min"]
    return f"{cell['bytes'] / ours / (cell['copied_bytes'] / copy):.2f}"


def _entry(cell: dict, rival: str) -> str:
    against = ratio(cell, rival, ours_for(rival))
    if against is None:
        return "-"
    star = "" if cell["contestants"][rival]["note"] == "same bits" else "\\*"
    return f"{against:.3g}×{star}"


def replaced(text: str, section: str, name: str = "speed") -> str:
    """The page with the section between its markers."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected the markers {begin} and {end}, once in each page")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{section}{end}{rest.split(end)[1]}"
