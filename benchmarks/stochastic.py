"""Stochastic rounding beside a copy, rounding to nearest and torch.rand_like in eager torch.

python -m benchmarks.stochastic [--schemes int8_channel,fp8_tensor] [--threads 1,2]

Bytes per second of x and its codes, as a share of those of y.copy_(x), and how many times longer the
others take. Every call of a row runs in turn with the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .schemes import Job, run_jobs

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


def main(arguments: list[str] | None = None) -> int:
    return run_jobs(
        "benchmarks.stochastic", __doc__, SCHEMES, ("int8_tensor", "fp8_tensor"), calls_of,
        lambda job: (2 * job.x.nbytes, job.bytes("quantize")),
        ("stochastic rounding", "of a copy"), arguments,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
