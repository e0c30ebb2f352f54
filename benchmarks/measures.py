"""quantkit.measure beside one read of x and beside float64 sums in torch.

python -m benchmarks.measures [--schemes int8_channel,mxfp4] [--threads 1,2]

GB/s of x, as a share of x.amax()'s, which reads x once, and how many times longer the sums take: of
x² and of (x_hat - x)², with x_hat there already, which measure does not need. Also how many times longer
measure takes where every 1,024th element is an outlier. Every call of a row runs in turn with the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import quantkit
from quantkit import SCHEMES

from .schemes import Job, run_jobs

READ, OURS, OUTLIERS = "x.amax()", "quantkit", "with outliers"
EAGER, COMPILED = "float64 sums", "float64 sums, compiled"


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


def main(arguments: list[str] | None = None) -> int:
    return run_jobs(
        "benchmarks.measures", __doc__, SCHEMES, ("int8_channel", "fp8_token", "mxfp4"), calls_of,
        lambda job: (job.x.nbytes, job.x.nbytes), ("measure", "of a read"), arguments,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
