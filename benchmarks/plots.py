"""Two figures: speed-up bars per rival, and GB/s over tensor size beside a copy."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .cells import OURS_LENT, ours_for, ratio
from .rivals import BANDWIDTH, RIVALS


def save(run: dict, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [path for path in (_speedups(run, folder), _sizes(run, folder)) if path is not None]


def _subtitle(run: dict) -> str:
    machine = run["machine"]
    isa = machine["quantkit"]["isa"]
    return f"{machine['cpu']}, {machine['threads']} threads, {isa}, torch {machine['torch']}"


def _speedups(run: dict, folder: Path) -> Path | None:
    cells = [c for c in run["cells"] if c["group"] == "main"]
    if not cells:
        return None
    names = [name for name in RIVALS if name not in BANDWIDTH]
    shapes = list(dict.fromkeys(tuple(c["shape"]) for c in cells))
    figure, axes = plt.subplots(
        len(shapes), 1, figsize=(13, 4.4 * len(shapes)), squeeze=False, layout="constrained"
    )
    colors = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        shown = [c for c in cells if tuple(c["shape"]) == shape]
        position, ticks, labels = 0.0, [], []
        for cell in shown:
            begin = position
            for name in names:
                value = ratio(cell, name, ours_for(name))
                if value is not None:
                    axis.bar(position, value - 1, bottom=1, width=0.9, color=colors[name])
                    position += 1
            if position > begin:
                ticks.append((begin + position - 1) / 2)
                more = (cell["dtype"], cell["granularity"], cell["scheme"])
                usual = ("float32", "tensor", "symmetric")
                unusual = [word for word, plain in zip(more, usual, strict=True) if word != plain]
                labels.append("\n".join([cell["op"], *unusual]))
                position += 1
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(ticks, labels, rotation=30, ha="right", fontsize=8)
        axis.set_ylabel("rival's time / quantkit's")
        axis.set_title("×".join(map(str, shape)))
        axis.grid(axis="y", which="both", alpha=0.25)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"How many times longer than quantkit (above 1: slower)\n{_subtitle(run)}")
    return _write(figure, folder / "speedup.png")


def _sizes(run: dict, folder: Path) -> Path | None:
    cells = [c for c in run["cells"] if c["group"] == "sizes"]
    if not cells:
        return None
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for op in dict.fromkeys(c["op"] for c in cells):
        points = [c for c in cells if c["op"] == op]
        sizes = [c["shape"][0] * 4 for c in points]
        rates = [c["bytes"] / c["contestants"][OURS_LENT]["median"] / 1e9 for c in points]
        axis.plot(sizes, rates, marker="o", markersize=4, label=f"{op}, out=")
    points = [c for c in cells if c["op"] == "quantize"]
    rates = [c["copied_bytes"] / c["contestants"]["copy"]["median"] / 1e9 for c in points]
    sizes = [c["shape"][0] * 4 for c in points]
    axis.plot(sizes, rates, color="black", linestyle="--", label="y.copy_(x)")
    axis.set_xscale("log", base=2)
    powers = range(10, 31, 4)
    units = ["1 KiB", "16 KiB", "256 KiB", "4 MiB", "64 MiB", "1 GiB"]
    axis.set_xticks([2**power for power in powers], units)
    axis.set_xlabel("size of x in float32 (warm caches)")
    axis.set_ylabel("GB/s, bytes that must move")
    axis.set_title(f"Bandwidth over tensor size\n{_subtitle(run)}")
    axis.grid(alpha=0.3)
    axis.legend()
    return _write(figure, folder / "bandwidth.png")


def _write(figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
