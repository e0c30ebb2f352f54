"""Two figures, each for light and for dark pages.

bandwidth: how near to a copy's speed is each operation, over the tensor's size?
speedup: how many times as long as quantkit do others take, for a large tensor?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .cells import OURS_OUT, ours_for, ratio
from .report import COLUMNS, LARGE, OPERATIONS, find

# Okabe and Ito's colours, which the colour-blind tell apart, and a marker for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v")
THEMES = {"light": ("#ffffff", "#24292f", "#8c959f"), "dark": ("#0d1117", "#e6edf3", "#6e7681")}


def save(run: dict, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"bandwidth": _bandwidth, "speedup": _speedup}
    return [path for name, draw in figures.items() for path in _themes(run, folder, name, draw)]


def _themes(
    run: dict, folder: Path, name: str, draw: Callable[[dict, Axes], bool]
) -> Iterator[Path]:
    for theme, (paper, ink, line) in THEMES.items():
        colours = dict.fromkeys(
            ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink
        )
        colours |= {"figure.facecolor": paper, "axes.facecolor": paper, "axes.edgecolor": line}
        sides = dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
        with plt.rc_context(colours | sides | {"grid.color": line, "font.size": 11}):
            figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
            if draw(run, axis):
                path = folder / f"{name}-{theme}.png"
                figure.savefig(path, dpi=130)
                yield path
            plt.close(figure)


def _setting(run: dict) -> str:
    machine = run["machine"]
    isa = machine["quantkit"]["isa"]
    return f"{machine['cpu']}, {machine['threads']} threads, {isa}, torch {machine['torch']}"


def _heading(axis: Axes, question: str, run: dict) -> None:
    axis.set_title(f"{question}\n", loc="left", fontsize=13, fontweight="bold")
    axis.text(0, 1.03, _setting(run), transform=axis.transAxes, fontsize=9)


def _bandwidth(run: dict, axis: Axes) -> bool:
    cells = [c for c in run["cells"] if c["group"] == "sizes"]
    points = {
        op: [c for c in cells if c["op"] == op] for op in dict.fromkeys(c["op"] for c in cells)
    }
    if "quantize" not in points:
        return False

    def line(of: list[dict], bytes_: str, contestant: str, **style) -> None:
        sizes = [c["shape"][0] * 4 for c in of]
        rates = [c[bytes_] / c["contestants"][contestant]["median"] / 1e9 for c in of]
        axis.plot(sizes, rates, **style)

    copy = {"color": plt.rcParams["axes.edgecolor"], "linestyle": "--", "label": "copy of x"}
    line(points["quantize"], "copied_bytes", "copy", **copy)
    for (op, of), colour, marker in zip(points.items(), COLOURS, MARKERS, strict=False):
        line(of, "bytes", OURS_OUT, color=colour, marker=marker, label=op)
    axis.set_xscale("log", base=2)
    units = ("1 KiB", "16 KiB", "256 KiB", "4 MiB", "64 MiB", "1 GiB")
    axis.set_xticks([2**power for power in range(10, 31, 4)], units)
    axis.set_xlabel("size of x in float32, results into out=")
    axis.set_ylabel("GB/s of bytes that must move")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    _heading(axis, "How near to the speed of a copy?", run)
    return True


def _speedup(run: dict, axis: Axes) -> bool:
    cells = [cell for op, more in OPERATIONS if (cell := find(run, op, LARGE, more)) is not None]
    if not cells:
        return False
    for (rival, label), colour, marker in zip(COLUMNS.items(), COLOURS, MARKERS, strict=True):
        at = [(row, ratio(cell, rival, ours_for(rival))) for row, cell in enumerate(cells)]
        found = [(value, row) for row, value in at if value is not None]
        if found:
            axis.scatter(
                *zip(*found, strict=True), color=colour, marker=marker, s=60, label=label, zorder=2
            )
    axis.axvline(1, color=plt.rcParams["text.color"])
    axis.set_xscale("log")
    axis.set_xticks(times := [1, 2, 5, 10, 20, 50], [f"{n}×" for n in times])
    axis.minorticks_off()
    axis.set_xlabel("time / quantkit's time")
    axis.set_yticks(range(len(cells)), [_name(cell) for cell in cells])
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _heading(axis, "How many times as long do others take? 4096×4096", run)
    return True


def _name(cell: dict) -> str:
    usual = {"dtype": "float32", "granularity": "tensor", "scheme": "symmetric"}
    return ", ".join(
        [cell["op"], *(cell[key] for key, plain in usual.items() if cell[key] != plain)]
    )
