"""Stochastic rounding beside a copy, rounding to nearest and torch.rand_like in eager torch.

python -m benchmarks.stochastic [--schemes int8_channel,fp8_tensor] [--threads 1,2]

Bytes per second of x and its codes, as a share of those of y.copy_(x), and how many times longer the
others take. Every call of a row runs in turn with the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import machine
from .__main__ import shapes, words
from .measure import interleaved, summary
from .schemes import DTYPES, Job

COPY, OURS, NEAREST, EAGER = "y.copy_(x)", "quantkit", "to nearest", "torch.rand_like"
SCHEMES = ("int8_tensor", "int8_channel", "fp8_tensor", "fp8_token")


def rounded(t: torch.Tensor) -> torch.Tensor:
    """Up or down at random."""
    whole = t.floor()
    return whole + (t - whole > torch.rand_like(t))


def by_hand(job: Job) -> torch.Tensor:
    """What one writes in torch."""
    v = torch.clamp(job.x / job.p.scale, job.p.q_min, job.p.q_max)
    if not job.is_float:
        return rounded(v).to(job.q.dtype)
    _, exponent = torch.frexp(v)
    step = torch.ldexp(torch.ones_like(v), exponent.clamp(min=-5) - 4)  # of float8_e4m3fn
    return (rounded(v / step) * step).to(job.q.dtype)


def calls_of(job: Job) -> dict[str, Callable[[], object]]:
    p, y, q = job.p, torch.empty_like(job.x), torch.empty_like(job.q)
    zero_point = None if job.is_float else p.zero_point
    nearest = functools.partial(
        torch.ops.quantkit.quantize.format_out, job.x, p.scale, zero_point, p.q_min, p.q_max,
        job.format.name, block_size=p.block_size, out=q,
    )  # fmt: skip
    return {
        COPY: lambda: y.copy_(job.x),
        OURS: functools.partial(nearest, seed=torch.tensor([7, 1])),
        NEAREST: nearest,
        EAGER: lambda: by_hand(job),
    }


def cell(job: Job, threads: int, budget: float) -> dict:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = interleaved(calls_of(job), budget)
    finally:
        torch.set_num_threads(before)
    best = {name: min(v) for name, v in seconds.items()}
    speed = job.bytes("quantize") / best[OURS]
    return {
        "scheme": job.scheme,
        "dtype": str(job.x.dtype).removeprefix("torch."),
        "shape": list(job.x.shape),
        "threads": threads,
        "gigabytes_per_second": speed / 1e9,
        "of_a_copy": speed / (2 * job.x.nbytes / best[COPY]),
        "contestants": {k: {**summary(v), "seconds": v} for k, v in seconds.items()},
    }


def table(run: list[dict]) -> Table:
    title = "stochastic rounding, and how many times longer others take"
    grid = Table(title=title, title_justify="left")
    for column in ("shape", "dtype", "scheme", "threads", "GB/s", "of a copy", NEAREST, EAGER):
        grid.add_column(
            column, justify="left" if column in ("shape", "dtype", "scheme") else "right"
        )
    for c in run:
        best = {name: c["contestants"][name]["min"] for name in c["contestants"]}
        longer = [f"{best[name] / best[OURS]:.2f}×" for name in (NEAREST, EAGER)]
        speed = f"{c['gigabytes_per_second']:.1f}", f"{c['of_a_copy']:.2f}"
        shape = "×".join(map(str, c["shape"]))
        grid.add_row(shape, c["dtype"], c["scheme"], str(c["threads"]), *speed, *longer)
    return grid


def main(arguments: list[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("benchmarks.stochastic", description=__doc__, formatter_class=kind)
    p.add_argument("--schemes", type=words(SCHEMES), default=("int8_tensor", "fp8_tensor"))
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
