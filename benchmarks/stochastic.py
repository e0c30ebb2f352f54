"""Stochastic rounding beside a copy, rounding to nearest and torch.rand_like in eager torch.

python -m benchmarks.stochastic [--schemes int8_channel,fp8_tensor] [--threads 1,2]

Bytes per second of x and its codes, as a share of those of y.copy_(x), and how many times longer the
others take. Every call of a row runs in turn with the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from rich.table import Table

from .measure import interleaved, summary
from .schemes import Job, run_with_threads

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
    schemes = ("int8_tensor", "fp8_tensor")
    return run_with_threads(
        "benchmarks.stochastic", __doc__, SCHEMES, schemes, cell, table, arguments
    )


if __name__ == "__main__":
    raise SystemExit(main())
