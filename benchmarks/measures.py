"""quantkit.measure beside one read of x and beside float64 sums in torch.

python -m benchmarks.measures [--schemes int8_channel,mxfp4] [--threads 1,2]

GB/s of x, as a share of x.amax()'s, which reads x once, and how many times longer the sums take: of
x² and of (x_hat - x)², with x_hat there already, which measure does not need. Also how many times longer
measure takes where every 1,024th element is an outlier. Every call of a row runs in turn with the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.table import Table

import quantkit
from quantkit import SCHEMES

from .measure import interleaved, summary
from .schemes import Job, run_with_threads

READ, OURS, OUTLIERS = "x.amax()", "quantkit", "with outliers"
EAGER, COMPILED = "float64 sums", "float64 sums, compiled"
LONGER = (OUTLIERS, EAGER, COMPILED)


def sums(x: torch.Tensor, x_hat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What one writes by hand."""
    return (x.double() ** 2).sum(), ((x_hat - x).double() ** 2).sum()


def calls_of(job: Job) -> dict[str, Callable[[], object]]:
    torch._dynamo.reset()
    compiled = torch.compile(sums, dynamic=False)
    far = job.x.clone()
    far.view(-1)[::1024] *= 1e5
    return {
        READ: lambda: job.x.amax(),
        OURS: lambda: quantkit.measure(job.x, job.p),
        OUTLIERS: lambda: quantkit.measure(far, job.p),
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
    grid = Table(title="measure, and how many times longer others take", title_justify="left")
    for column in ("shape", "dtype", "scheme", "threads", "GB/s", "of a read", *LONGER):
        grid.add_column(
            column, justify="left" if column in ("shape", "dtype", "scheme") else "right"
        )
    for c in run:
        best = {name: c["contestants"][name]["min"] for name in c["contestants"]}
        longer = [f"{best[name] / best[OURS]:.1f}×" for name in LONGER]
        speed = f"{c['gigabytes_per_second']:.1f}", f"{best[READ] / best[OURS]:.2f}"
        shape = "×".join(map(str, c["shape"]))
        grid.add_row(shape, c["dtype"], c["scheme"], str(c["threads"]), *speed, *longer)
    return grid


def main(arguments: list[str] | None = None) -> int:
    schemes = ("int8_channel", "fp8_token", "mxfp4")
    return run_with_threads(
        "benchmarks.measures", __doc__, SCHEMES, schemes, cell, table, arguments
    )


if __name__ == "__main__":
    raise SystemExit(main())
