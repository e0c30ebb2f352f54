"""What quantizing did to each weight: a table, report.json, report.png."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .._version import __version__
from .files import shown

WORST = 10
_REASONS = 6  # that are named
_HIGH = 110.0  # dB, where bars of exact weights end
_LABELS = 300  # of more weights a picture names the worst alone


def summary(
    rows: Sequence[Mapping[str, Any]],
    kept: Sequence[Sequence[str]],
    scheme: str,
    sizes: tuple[int, int],
) -> dict[str, Any]:
    """report.json: the rows of the weights, what stayed as it was and why, bytes before and after."""
    return {
        "quantkit": __version__,
        "scheme": scheme,
        "bytes_before": sizes[0],
        "bytes_after": sizes[1],
        "tensors": list(rows),
        "kept": [list(pair) for pair in kept],
    }


def worst(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Ten weights, the worst first: those with most elements left out, then of the lowest SQNR."""
    rows = [r for r in report["tensors"] if r["left_out"] or r["sqnr_db"] is not None]
    return sorted(rows, key=lambda r: (-r["left_out"], r["sqnr_db"] or 0.0, r["name"]))[:WORST]


def table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table, the first row has the titles."""
    cells: list[tuple[str, ...]] = [
        ("weight", "shape", "scheme", "SQNR, dB", "max error", "saturated", "left out", "bytes")
    ]
    for r in rows:
        elements = max(1, math.prod(r["shape"]))
        cells.append(
            (
                shown(r["name"], 120), "x".join(map(str, r["shape"])), shown(r["scheme"], 60),
                "-" if r["sqnr_db"] is None else f"{r['sqnr_db']:.1f}", f"{r['max_error']:.3g}",
                f"{100 * r['saturated'] / elements:.3g} %", str(r["left_out"]),
                f"{r['bytes_before']:,} -> {r['bytes_after']:,}",
            )
        )  # fmt: skip
    return cells


def totals(report: Mapping[str, Any]) -> str:
    before, after = report["bytes_before"], report["bytes_after"]
    return (
        f"{len(report['tensors'])} weights quantized, {len(report['kept'])} tensors kept, "
        f"{size(before)} -> {size(after)}"
    )


def reasons(report: Mapping[str, Any]) -> str:
    """Why tensors were kept, the most frequent reasons first."""
    counts = Counter(reason for _, reason in report["kept"])
    common = counts.most_common(_REASONS)
    others = counts.total() - sum(count for _, count in common)
    common += [("other reasons", others)] if others else []
    return "; ".join(f"{shown(reason)} ({count})" for reason, count in common)


def size(count: float) -> str:
    """Bytes in words."""
    units = ("bytes", "KB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.3g} {units[power]}"


def picture(report: Mapping[str, Any]) -> bytes | None:
    """report.png; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = report["tensors"]
    bad = {row["name"] for row in worst(report)}
    named = [i for i, row in enumerate(rows) if len(rows) <= _LABELS or row["name"] in bad]
    columns = (
        ("SQNR, dB", [_HIGH if r["sqnr_db"] is None else r["sqnr_db"] for r in rows]),
        ("greatest error", [r["max_error"] for r in rows]),
        ("saturated, %", [100 * r["saturated"] / max(1, math.prod(r["shape"])) for r in rows]),
        ("MB, before and after", [r["bytes_before"] / 1e6 for r in rows]),
    )
    figure = Figure(figsize=(14, 1.6 + 0.16 * min(len(rows), _LABELS)), dpi=100)
    axes = figure.subplots(1, len(columns), sharey=True)
    colors = ["#c0392b" if row["name"] in bad else "#4c72b0" for row in rows]
    for axis, (title, values) in zip(axes, columns, strict=True):
        axis.barh(range(len(rows)), values, color=colors if axis is not axes[-1] else "#cccccc")
        axis.set_title(title, fontsize=9)
        axis.set_xlim(left=0)
        axis.tick_params(labelsize=6)
    axes[-1].barh(range(len(rows)), [r["bytes_after"] / 1e6 for r in rows], color=colors)
    axes[0].set_yticks(named, [shown(rows[i]["name"], 60).replace("$", r"\$") for i in named])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    text = f"{report['scheme']}: {totals(report)}. The ten worst are red."
    figure.suptitle(text.replace("$", r"\$"), fontsize=9)
    height = 0.16 * min(len(rows), _LABELS) + 1.6
    figure.subplots_adjust(
        left=0.2, right=0.98, wspace=0.1, top=1 - 0.6 / height, bottom=0.4 / height
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
