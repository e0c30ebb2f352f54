"""From measured cells to tables, goals and the README's section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cells import OURS, OURS_LENT, ours_for, ratio

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
LARGE, MIDDLE, SMALL = [4096, 4096], [512, 1024], [64, 1024]
BOTH_CAN = ("torchao", "torchao_compile", "decomposed", "onnxruntime")
THREAD_BYTES = 4 << 20  # beside the outputs: stacks and scratch of the threads, allocator's slack


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
            f"{against:.2f}" if against is not None and name not in (OURS, OURS_LENT) else "",
            c["note"],
        )
    for name, reason in cell["absent"].items():
        style = "bold red" if reason.startswith("missing") else "dim"
        table.add_row(name, "-", "-", "", "", escape(reason), style=style)
    return table


# ---- goals ------------------------------------------------------------------------------------------


@dataclass
class Goal:
    text: str
    wanted: float
    measured: float
    at_most: bool = False
    by_minima: float | None = None  # the same from the fastest samples of each

    @property
    def sign(self) -> str:
        return "≤" if self.at_most else "≥"

    @property
    def met(self) -> bool:
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


class Cells:
    """Cells of one run, by what they measured, and which statistic of it counts: "median" or "min"."""

    def __init__(self, run: dict, statistic: str = "median"):
        self.all, self.memory, self.statistic = run["cells"], run["memory"], statistic

    def time(self, cell: dict, name: str) -> float:
        return cell["contestants"][name][self.statistic]

    def ratio(self, cell: dict, rival: str, ours: str = OURS) -> float:
        return self.time(cell, rival) / self.time(cell, ours)

    def rate(self, cell: dict, ours: str) -> float:
        """Bytes that must move, per second."""
        return cell["bytes"] / self.time(cell, ours)

    def share(self, cell: dict, of: str, ours: str) -> float:
        """Our bytes per second as a share of a copy's."""
        return self.rate(cell, ours) * self.time(cell, of) / cell["copied_bytes"]

    def find(
        self, op, shape, dtype="float32", granularity="tensor", scheme="symmetric", group="main"
    ):
        wanted = {"op": op, "shape": shape, "dtype": dtype, "granularity": granularity}
        wanted |= {"scheme": scheme, "group": group}
        return next((c for c in self.all if all(c[k] == v for k, v in wanted.items())), None)

    def group(self, name: str) -> list[dict]:
        return [cell for cell in self.all if cell["group"] == name]


def _ratios(cells: Cells) -> Iterator[Goal]:
    wanted = (  # op, what else, rival, at each of the three shapes
        ("quantize_dequantize", {}, "eager", (20, 5, 5)),
        ("quantize_dequantize", {}, "compile", (2.8, 3, 3)),
        ("quantize_dequantize", {"granularity": "channel"}, "eager", (22, 5, 5)),
        ("quantize_dequantize", {"granularity": "channel"}, "compile", (2.8, 3, 3)),
        ("quantize_dequantize", {"scheme": "asymmetric"}, "eager", (20, 5, 5)),
        ("quantize_dequantize", {"dtype": "bfloat16"}, "eager", (12, 5, 4)),
        ("quantize", {}, "eager", (35, 5, 4)),
        ("quantize", {}, "torch", (1.05, 1, 1)),
        ("dequantize", {}, "eager", (10, 4, 3)),
        ("dequantize", {}, "torch", (3, 1, 1)),
        ("dynamic_quantize", {}, "eager", (35, 6, 6)),
    )
    for op, more, rival, goals in wanted:
        for shape, goal in zip((LARGE, MIDDLE, SMALL), goals, strict=True):
            cell = cells.find(op, shape, **more)
            if cell is not None and rival in cell["contestants"]:
                yield Goal(f"{title(cell)}: {rival} / ours", goal, cells.ratio(cell, rival))


def _bandwidths(cells: Cells) -> Iterator[Goal]:
    for op, granularity, goal in (
        ("quantize", "tensor", 0.9),
        ("dequantize", "tensor", 0.85),
        ("fake_quantize", "tensor", 0.85),
        ("choose_qparams", "tensor", 0.85),
        ("dynamic_quantize", "channel", 0.85),
        ("quantize_dequantize", "channel", 0.85),
        ("dynamic_quantize", "tensor", 0.85),
        ("quantize_dequantize", "tensor", 0.85),
    ):
        cell = cells.find(op, LARGE, granularity=granularity)
        if cell is not None and "copy" in cell["contestants"]:
            text = f"{title(cell)}: bytes per second with out= / y.copy_(x)'s"
            yield Goal(text, goal, cells.share(cell, "copy", OURS_LENT))
    for op, granularity, goal in (
        ("dequantize", "tensor", 1.5),
        ("quantize_dequantize", "channel", 1.5),
        ("quantize_dequantize", "tensor", 2),
    ):
        cell = cells.find(op, LARGE, granularity=granularity)
        if cell is not None and "clone" in cell["contestants"]:
            text = f"{title(cell)}: bytes per second, fresh outputs / x.clone()'s"
            yield Goal(text, goal, cells.share(cell, "clone", OURS))
    for dtype in ("float16", "bfloat16"):
        for op in ("quantize", "quantize_dequantize"):
            half, full = cells.find(op, LARGE, dtype), cells.find(op, LARGE)
            if half is not None and full is not None:
                rates = [cells.rate(c, OURS_LENT) for c in (half, full)]
                yield Goal(f"{title(half)}: GB/s with out= / float32's", 0.7, rates[0] / rates[1])


def _others(cells: Cells) -> Iterator[Goal]:
    for rival in BOTH_CAN:
        both = [c for c in cells.group("main") if rival in c["contestants"]]
        if both:
            worst = min(both, key=lambda c: ratio(c, rival, ours_for(rival)))
            text = f"{rival} / ours, the worst of {len(both)} cells: {title(worst)}"
            yield Goal(text, 1, cells.ratio(worst, rival, ours_for(rival)))
    by_median = Cells({"cells": cells.all, "memory": []})
    group = [c for c in cells.group("granularities") if "copy" in c["contestants"]]
    if group:
        worst, best = (
            f(group, key=lambda c: by_median.share(c, "copy", OURS_LENT)) for f in (min, max)
        )
        names = (worst["granularity"], best["granularity"])
        text = f"per byte, the slowest granularity ({names[0]}) / the fastest ({names[1]})"
        rates = [cells.share(c, "copy", OURS_LENT) for c in (best, worst)]
        yield Goal(text, 1.5, rates[0] / rates[1], at_most=True)
    main = cells.group("main")
    if main:
        worst = max(main, key=lambda c: ratio(c, OURS_LENT))
        text = f"out= / allocating, the worst cell: {title(worst)}"
        yield Goal(text, 1.05, cells.ratio(worst, OURS_LENT), at_most=True)
    for cell in cells.group("calls"):
        c = {name: cells.time(cell, name) for name in cell["contestants"]}
        if cell["op"] == "operator":
            cost = c["torch.ops.quantkit.quantize"] / c["torch.ops.aten.abs"]
            yield Goal(
                "one call on 8 elements: quantkit.quantize / aten.abs", 2, cost, at_most=True
            )
            plain = "torch.ops.quantkit._fake_quantize"
            for ours in ("quantkit.fake_quantize", "torch.ops.quantkit.fake_quantize"):
                if ours in c and plain in c:
                    text = f"one call on 8 elements, no gradient asked for: {ours} / {plain}"
                    yield Goal(text, 1.3, c[ours] / c[plain], at_most=True)
        else:
            cost = (c["quantkit"] - c["operator alone"]) / c["eager"]
            text = f"{cell['op']} on 8 elements: Python's own cost / eager's total"
            yield Goal(text, 0.5, cost, at_most=True)
    threads = cells.group("threads")
    for op in dict.fromkeys(c["op"] for c in threads):
        times = {c["threads"]: cells.time(c, OURS) for c in threads if c["op"] == op}
        if 1 in times and 2 in times:
            yield Goal(f"{op} 512×1024: one thread / two", 1.7, times[1] / times[2])
    for entry in cells.memory:
        if "peak_bytes" in entry:
            beside = (entry["peak_bytes"] - entry["output_bytes"]) / 2**20
            text = f"{entry['op']} per {entry['granularity']} 4096×4096: MiB beside the outputs"
            yield Goal(text, THREAD_BYTES / 2**20, beside, at_most=True)


TOKENS = [131072, 4096]


def _on_gpu(cells: Cells) -> Iterator[Goal]:
    """What must move, by the copy's rate of the same run; and the compiler's best."""
    found = [c for c in cells.all if c.get("device") == "cuda"]
    for cell in found:
        reads_once = cell["op"] in ("quantize", "dequantize") or cell["granularity"] == "channel"
        if cell["shape"] == TOKENS and reads_once and "copy" in cell["contestants"]:
            text = f"{title(cell)}: bytes per second with out= / y.copy_(x)'s"
            yield Goal(text, 0.9, cells.share(cell, "copy", OURS_LENT))
        name = (cell["op"], cell["dtype"], cell["granularity"])
        if cell["shape"] == TOKENS and name == ("dynamic_quantize", "bfloat16", "channel"):
            text = f"{title(cell)}: microseconds with out= (580 is the goal on an H100)"
            yield Goal(text, 580, cells.time(cell, OURS_LENT) * 1e6, at_most=True)
    compiled = [c for c in found if "compile" in c["contestants"]]
    if compiled:
        worst = min(compiled, key=lambda c: ratio(c, "compile"))
        text = f"compile / ours on the GPU, the worst of {len(compiled)} cells: {title(worst)}"
        yield Goal(text, 1, cells.ratio(worst, "compile"))


def _measured(run: dict, statistic: str) -> list[Goal]:
    cells = Cells(run, statistic)
    return [*_ratios(cells), *_bandwidths(cells), *_others(cells), *_on_gpu(cells)]


def goals(run: dict) -> list[Goal]:
    found = _measured(run, "median")
    for goal, best in zip(found, _measured(run, "min"), strict=True):
        goal.by_minima = best.measured
    return found


def goal_table(run: dict) -> Table:
    table = Table(title="Goals", title_justify="left")
    for name in ("goal", "wanted", "by medians", "by minima", ""):
        table.add_column(name, justify="left" if name in ("goal", "") else "right")
    for goal in goals(run):
        met = "met" if goal.met else "[bold red]missed"
        numbers = (f"{goal.measured:.2f}", f"{goal.by_minima:.2f}")
        table.add_row(goal.text, f"{goal.sign} {goal.wanted:g}", *numbers, met)
    return table


def goals_markdown(run: dict) -> str:
    """The table of goals for docs/performance.md."""
    lines = [
        f"{_setting(run)}.",
        "",
        "| goal | wanted | by medians | by minima | |",
        "|---|---|---|---|---|",
    ]
    found = goals(run)
    for goal in found:
        numbers = f"{goal.measured:.2f} | {goal.by_minima:.2f}"
        met = "met" if goal.met else "**missed**"
        lines.append(f"| {goal.text} | {goal.sign} {goal.wanted:g} | {numbers} | {met} |")
    met = sum(goal.met for goal in found)
    return "\n".join([*lines, "", f"{met} of {len(found)} met by medians."]) + "\n"


def show(run: dict, console: Console) -> None:
    groups = ("main", "threads", "granularities", "calls")
    for cell in run["cells"]:
        if cell["group"] in groups:
            console.print(cell_table(cell))
    console.print(goal_table(run))
    missing = sorted(k for k, v in run["machine"]["rivals"].items() if v is None)
    if missing:
        console.print(
            f"[bold red]not installed: {', '.join(missing)}[/] (make bench installs them)"
        )


# ---- the README's section -----------------------------------------------------------------------------

_ROWS = (
    ("quantize", {}),
    ("dequantize", {}),
    ("dynamic_quantize", {}),
    ("quantize_dequantize", {}),
    ("quantize_dequantize", {"granularity": "channel"}),
    ("quantize_dequantize", {"scheme": "asymmetric"}),
    ("quantize_dequantize", {"dtype": "bfloat16"}),
)
_COLUMNS = ("eager", "compile", "torch", "torchao_compile", "onnxruntime")


def _setting(run: dict) -> str:
    machine = run["machine"]
    setting = (machine["cpu"], f"{machine['threads']} threads", machine["quantkit"]["isa"])
    pages = machine["huge_pages"]
    versions = f"torch {machine['torch']}, huge pages `{pages}`, commit {machine['commit']}"
    return f"{', '.join(setting)}, {versions}"


def quoted(run: dict) -> list[dict]:
    """The cells that the README's table shows."""
    cells = Cells(run)
    found = (cells.find(op, s, **more) for s in (LARGE, MIDDLE, SMALL) for op, more in _ROWS)
    return [cell for cell in found if cell is not None]


def markdown(run: dict) -> str:
    """The speed section: our time, and how many times longer each rival takes."""
    lines = [
        f"{_setting(run)}. Milliseconds are medians; the other columns tell how many times "
        "longer the rival takes, in the same interleaved run. An asterisk marks results whose bits "
        "differ from ours, which are the reference's. ONNX Runtime writes to memory that stays, and "
        "is compared with our `out=`.",
        "",
        "| | ms | " + " | ".join(_COLUMNS) + " |",
        "|---|---|" + "---|" * len(_COLUMNS),
    ]
    for cell in quoted(run):
        entries = [_entry(cell, rival) for rival in _COLUMNS]
        ours = milliseconds(cell["contestants"][OURS]["median"])
        lines.append(f"| {title(cell)} | {ours} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def _entry(cell: dict, rival: str) -> str:
    against = ratio(cell, rival, ours_for(rival))
    if against is None:
        return "-"
    star = "" if cell["contestants"][rival]["note"] == "same bits" else "\\*"
    return f"{against:.3g}×{star}"


def replaced(text: str, section: str) -> str:
    """The page with the section between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected the markers {BEGIN} and {END}, once in each page")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{section}{END}{rest.split(END)[1]}"
