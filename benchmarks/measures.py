"""quantkit.measure beside one read of x and beside float64 sums in torch.

python -m benchmarks.measures [--schemes int8_channel,mxfp4] [--threads 1,2]

GB/s of x, as a share of x.amax()'s, which reads x once, and how many times longer the sums take: of
x² and of (x_hat - x)², with x_hat there already, which measure does not need. Every call of a row runs in
turn with the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import quantkit

from . import machine
from .__main__ import shapes, words
from .measure import interleaved, summary
from .schemes import DTYPES, Job

READ, OURS, EAGER, COMPILED = "x.amax()", "quantkit", "float64 sums", "float64 sums, compiled"


def sums(x: torch.Tensor, x_hat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What one writes by hand."""
    return (x.double() ** 2).sum(), ((x_hat - x).double() ** 2).sum()


def calls_of(job: Job) -> dict[str, Callable[[], object]]:
    torch._dynamo.reset()
    compiled = torch.compile(sums, dynamic=False)
    return {
        READ: lambda: job.x.amax(),
        OURS: lambda: quantkit.measure(job.x, job.p),
        EAGER: lambda: sums(job.x, job.x_hat),
        COMPILED: lambda: compiled(job.x, job.x_hat),
    }


def cell(job: Job, threads: int, budget: float) -> dict:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = interleaved(calls_of(job), budget)
    finally:
        torch.set_num_threads(before)
    return {
        "scheme": job.scheme,
        "dtype": str(job.x.dtype).removeprefix("torch."),
        "shape": list(job.x.shape),
        "threads": threads,
        "gigabytes_per_second": job.x.nbytes / min(seconds[OURS]) / 1e9,
        "contestants": {k: {**summary(v), "seconds": v} for k, v in seconds.items()},
    }


def table(run: list[dict]) -> Table:
    grid = Table(title="measure, and how many times longer float64 sums take", title_justify="left")
    for column in ("shape", "dtype", "scheme", "threads", "GB/s", "of a read", EAGER, COMPILED):
        grid.add_column(
            column, justify="left" if column in ("shape", "dtype", "scheme") else "right"
        )
    for c in run:
        best = {name: c["contestants"][name]["min"] for name in c["contestants"]}
        longer = [f"{best[name] / best[OURS]:.1f}×" for name in (EAGER, COMPILED)]
        speed = f"{c['gigabytes_per_second']:.1f}", f"{best[READ] / best[OURS]:.2f}"
        shape = "×".join(map(str, c["shape"]))
        grid.add_row(shape, c["dtype"], c["scheme"], str(c["threads"]), *speed, *longer)
    return grid


def main(arguments: list[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("benchmarks.measures", description=__doc__, formatter_class=kind)
    schemes = ("int8_channel", "fp8_token", "mxfp4")
    p.add_argument("--schemes", type=words(quantkit.SCHEMES), default=schemes)
    p.add_argument("--dtypes", type=words(DTYPES), default=tuple(DTYPES))
    p.add_argument("--shapes", type=shapes, default=((4096, 4096), (512, 1024)))
    p.add_argument("--threads", type=words(("1", "2")), default=("1", "2"))
    p.add_argument("--seconds", type=float, default=1.0, help="for each cell; default: 1")
    p.add_argument("--json", type=Path, metavar="FILE", help="writes every time")
    args = p.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    jobs = [
        (scheme, shape, DTYPES[dtype], int(threads))
        for shape in args.shapes
        for dtype in args.dtypes
        for scheme in args.schemes
        for threads in args.threads
    ]
    run = [
        cell(Job(*job), threads, args.seconds)
        for *job, threads in track(jobs, description="measuring", console=console)
    ]
    console.print(table(run))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.description(), "cells": run}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
