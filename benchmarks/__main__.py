"""Measure quantkit beside its rivals, or render a run for the pages that quote it.

python -m benchmarks [options]              measures; writes JSON and plots
python -m benchmarks publish RUN [--schemes RUN ...] [--root DIR]
                                            puts runs into README.md and docs/ of this source tree
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import quantkit

from . import cells, command, machine, report, schemes
from .cases import (
    CUDA_SHAPES,
    DTYPES,
    GRANULARITIES,
    OPS,
    SCHEMES,
    SHAPES,
    Case,
    cuda_cases,
    default_cases,
)
from .command import shapes, words
from .rivals import RIVALS

FORMAT = 1
MOST_THREADS = 1024
MEMORY = (
    *((op, "tensor") for op in OPS),
    ("dynamic_quantize", "channel_last"),
    ("quantize_dequantize", "channel"),
    ("quantize_dequantize", "group32"),
)


def threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise argparse.ArgumentTypeError(
            f"expected a number from 1 to {MOST_THREADS}, got {text!r}"
        )
    return int(text)


def parser() -> argparse.ArgumentParser:
    p = command.parser("benchmarks", __doc__)
    p.add_argument("--ops", type=words(OPS), help="default: all")
    p.add_argument("--dtypes", type=words(DTYPES), help="default: all, for some operators")
    p.add_argument(
        "--shapes",
        type=shapes,
        help="default: 4096x4096,512x1024,64x1024; cuda: 131072x4096,16384x4096",
    )
    p.add_argument("--granularity", type=words(GRANULARITIES), help="default: tensor and channel")
    p.add_argument("--schemes", type=words(SCHEMES), help="default: symmetric, others for some ops")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument("--threads", type=threads, help="default: torch's")
    p.add_argument(
        "--rivals", type=words(RIVALS), help="default: all; with --quick, none that compiles"
    )
    p.add_argument("--quick", action="store_true", help="a few cells, shortly: noisier")
    p.add_argument("--json", type=Path, default=Path("results/bench.json"), metavar="FILE")
    p.add_argument("--png", type=Path, default=Path("results"), metavar="FOLDER")
    return p


def chosen(args) -> list[Case]:
    """The cases asked for: the default ones, or every combination of what was named."""
    named = (args.ops, args.dtypes, args.granularity, args.schemes)
    all_sizes = CUDA_SHAPES if args.device == "cuda" else SHAPES
    sizes = args.shapes or (all_sizes[1:] if args.quick else all_sizes)
    if not any(named) and args.device == "cuda":
        return list(cuda_cases(sizes))
    if not any(named):
        dtypes = ("float32", "bfloat16") if args.quick else tuple(DTYPES)
        return list(default_cases(sizes, dtypes))
    return [
        Case(op, shape, dtype, granularity, scheme)
        for shape in sizes
        for dtype in args.dtypes or ("float32",)
        for granularity in args.granularity or ("tensor",)
        for scheme in args.schemes or ("symmetric",)
        for op in args.ops or OPS
        if all(
            size % max(block, 1) == 0
            for size, block in zip(shape, GRANULARITIES[granularity] or (), strict=False)
        )
    ]


def work(args, cases: list[Case]) -> Iterator[dict]:
    """Every cell, measured as it is asked for."""
    scale = 0.2 if args.quick else 1.0
    rivals = args.rivals or [r for r in RIVALS if not (args.quick and r.endswith("compile"))]
    for case in cases:
        large = case.shape[0] * case.shape[1] > 1 << 22
        budget = scale * (4 if large else 1)
        yield cells.cell(case, rivals, budget, device=args.device)
    if extras(args):
        yield from cells.call_cells(scale * 0.5)
        yield from cells.thread_cells(scale)
        yield from cells.granularity_cells(scale * 0.5, 1 << (20 if args.quick else 24))
        yield from cells.size_cells(scale * 0.3, 1 << (24 if args.quick else 30))


def extras(args) -> bool:
    """Whether the whole picture was asked for, not some cells."""
    named = (args.ops, args.dtypes, args.granularity, args.schemes, args.shapes)
    return args.device == "cpu" and not any(named)


def measure(args, console: Console) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = chosen(args)
    if not cases:
        raise SystemExit("benchmarks: no shape can be cut into those blocks")
    total = len(cases)
    run = {"format": FORMAT, "machine": machine.description(), "cells": [], "memory": []}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring", total=total)
        try:
            for cell in work(args, cases):
                run["cells"].append(cell)
                done = len(run["cells"])
                progress.update(
                    task, completed=done, total=max(total, done), description=report.title(cell)
                )
            if extras(args):
                progress.update(task, description="peak memory")
                run["memory"] = [cells.memory(*entry) for entry in MEMORY]
        except KeyboardInterrupt:  # what is measured stays
            console.print(f"interrupted after {len(run['cells'])} cells")
            if not run["cells"]:
                raise
    return run


def load(path: Path) -> dict:
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks: {path}: {error}") from None
    known = {"format", "machine", "cells", "memory"}
    if not isinstance(run, dict) or run.get("format") != FORMAT or not known <= set(run):
        raise SystemExit(f"benchmarks: {path} is not a run of this program (format {FORMAT})")
    return run


def main_publish(arguments: list[str], console: Console) -> int:
    p = argparse.ArgumentParser("benchmarks publish")
    p.add_argument("run", type=Path)
    p.add_argument(
        "--schemes", type=Path, nargs="+", default=[], metavar="RUN",
        help="of benchmarks.schemes, one for each instruction set; the first has the rivals",
    )  # fmt: skip
    p.add_argument("--root", type=Path, default=machine.ROOT, metavar="DIR")
    args = p.parse_args(arguments)
    run = load(args.run)
    if not report.quoted(run):
        raise SystemExit(f"benchmarks: {args.run} has none of the cells that the pages quote")
    docs = args.root / "docs"
    pages = {
        args.root / "README.md": report.markdown(run, report.README),
        docs / "performance.md": report.markdown(run),
    }
    try:
        texts = {path: report.replaced(path.read_text(), new) for path, new in pages.items()}
        if args.schemes:
            section = schemes.markdown([json.loads(path.read_text()) for path in args.schemes])
            page = docs / "performance.md"
            texts[page] = report.replaced(texts[page], section, "formats")
        for path, text in texts.items():
            path.write_text(text)
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks: {args.root}: {error}") from None
    except KeyError as missing:
        raise SystemExit(
            f"benchmarks: --schemes: expected runs of it, one has no {missing}"
        ) from None
    from . import plots

    paths = [*texts, *plots.save(run, docs)]
    console.print("wrote " + ", ".join(map(str, paths)))
    return 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    if arguments[:1] == ["publish"]:
        return main_publish(arguments[1:], console)
    args = parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if args.device == "cuda":
        if not quantkit.backend().cuda_archs:
            raise SystemExit("benchmarks: --device cuda: quantkit was built without CUDA")
        if not torch.cuda.is_available():
            raise SystemExit("benchmarks: --device cuda: torch sees no CUDA device")
    if not quantkit.backend().extension:
        console.print(f"[bold red]not the kernels: {quantkit.backend()}")
    try:  # now, not when hours were measured
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.open("a").close()
        args.png.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"benchmarks: {error}") from None
    try:
        run = measure(args, console)
    except (cells.Wrong, RuntimeError) as error:
        raise SystemExit(f"benchmarks: {error}") from None
    report.show(run, console)
    args.json.write_text(json.dumps(run) + "\n")
    paths = [args.json]
    try:
        from . import plots

        paths += plots.save(run, args.png)
    except ModuleNotFoundError as error:  # the measurements are there all the same
        console.print(f"no plots: {error.name} is not installed")
    console.print("wrote " + ", ".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
