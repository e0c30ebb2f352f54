"""Cells: one case with all its contestants, measured; and the sets of cells beside the main table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import quantkit

from . import quant_tool
from .cases import Case, Job, differing, same_bits, same_numel
from .command import contestants, threads
from .machine import ROOT
from .measure import interleaved, interleaved_on_gpu, summary
from .rivals import Contestant, contestant

OURS, OURS_OUT = "quantkit", "quantkit out="


class Wrong(Exception):
    """quantkit did not return the reference's bits."""


def cell(
    case: Case,
    rivals: list[str],
    budget: float,
    group: str = "main",
    device: str = "cpu",
) -> dict:
    """Measures one case; every rival's result is compared with ours, ours with the reference's."""
    job = Job.of(case, device)
    calls = {OURS: job.allocating(), OURS_OUT: job.out()}
    calls[OURS_OUT]()
    for results in (job.expected, job.outs):
        for ours, expected in zip(results, job.reference(), strict=True):
            if ours.dtype != expected.dtype or not bool(same_bits(ours, expected).all()):
                raise Wrong(f"{case}: quantkit's result is not the reference's")
    notes = {OURS: "the reference's bits", OURS_OUT: "the reference's bits"}
    absent, apart = {}, []
    for name in rivals:
        made = contestant(name, job)
        if isinstance(made, Contestant):
            calls[name] = made.call
            if made.own_threads:
                apart.append(name)
            results = made.results() if made.results is not None else None
            notes[name] = "" if results is None else differing(results, job.expected)
        else:
            absent[name] = made
    if device == "cpu":
        measured = interleaved(calls, budget, apart=apart)
    else:
        measured = interleaved_on_gpu(calls, budget)
    return {
        "group": group,
        "op": case.op,
        "dtype": case.dtype,
        "shape": list(case.shape),
        "granularity": case.granularity,
        "scheme": case.scheme,
        "device": device,
        "threads": torch.get_num_threads(),
        "caches": "warm" if device == "cpu" else "cold",
        "bytes": job.bytes,
        "copied_bytes": 2 * job.x.numel() * job.x.element_size(),
        "contestants": {
            name: {"note": notes[name], "seconds": seconds, **summary(seconds)}
            for name, seconds in measured.items()
        },
        "absent": absent,
    }


def thread_cells(budget: float) -> Iterator[dict]:
    """512x1024 on one thread and on all."""
    for count in sorted({1, torch.get_num_threads()}):
        with threads(count):
            for op in ("quantize", "dequantize", "quantize_dequantize"):
                yield cell(Case(op, (512, 1024)), ["copy"], budget, group="threads")


def granularity_cells(budget: float, numel: int) -> Iterator[dict]:
    for case in same_numel(numel):
        yield cell(case, ["copy"], budget, group="granularities")


def size_cells(budget: float, largest: int) -> Iterator[dict]:
    """From 1 KiB of float32 up to `largest` bytes, four times as much at each step."""
    size = 1 << 10
    while size <= largest:
        for op in ("quantize", "dequantize", "quantize_dequantize"):
            yield cell(Case(op, (size // 4,)), ["copy"], budget, group="sizes")
        size *= 4


def call_cells(budget: float) -> Iterator[dict]:
    """The cost of one call, on 8 elements."""
    x = torch.randn(8)
    p = quantkit.get_symmetric_qparams(x)
    q = quantkit.quantize_tensor(x, p)
    ops = torch.ops.quantkit
    given = (x, p.scale, p.zero_point, -128, 127)
    pairs: dict[str, dict[str, Callable]] = {
        "operator": {
            "torch.ops.quantkit.quantize": lambda: ops.quantize(*given, torch.int8),
            "torch.ops.quantkit.dequantize": lambda: ops.dequantize(q, p.scale, p.zero_point),
            "torch.ops.quantkit.fake_quantize": lambda: ops.fake_quantize(*given),
            "torch.ops.quantkit._fake_quantize": lambda: ops._fake_quantize(*given),
            "quantkit.fake_quantize": lambda: quantkit.fake_quantize(x, p),
            "torch.ops.aten.abs": lambda: torch.ops.aten.abs(x),
        }
    }
    operators = {
        "get_symmetric_qparams": lambda: ops.choose_qparams.default(x, None, -128, 127, 1e-8, True),
        "get_asymmetric_qparams": lambda: ops.choose_qparams.default(
            x, None, -128, 127, 1e-8, False
        ),
        "quantize_tensor": lambda: ops.quantize.default(*given, torch.int8),
        "dequantize_tensor": lambda: ops.dequantize.default(q, p.scale, p.zero_point),
        "quantize_dequant": lambda: ops.quantize_dequantize.default(
            x, None, -128, 127, 1e-8, True, torch.int8
        ),
    }
    arguments = {"quantize_tensor": (x, p), "dequantize_tensor": (q, p)}
    for name, operator in operators.items():
        ours, theirs = getattr(quantkit, name), getattr(quant_tool, name)
        call = arguments.get(name, (x,))
        pairs[name] = {
            "quantkit": lambda f=ours, a=call: f(*a),
            "operator alone": operator,
            "eager": lambda f=theirs, a=call: f(*a),
        }
    for name, calls in pairs.items():
        yield {
            "group": "calls",
            "op": name,
            "dtype": "float32",
            "shape": [8],
            "granularity": "tensor",
            "scheme": "symmetric",
            "threads": torch.get_num_threads(),
            "caches": "warm",
            "bytes": 0,
            "contestants": {k: {"note": "", **v} for k, v in contestants(calls, budget).items()},
            "absent": {},
        }


_MEMORY = """
import re, torch, quantkit
from benchmarks.cases import Case, Job
job = Job.of(Case({op!r}, (4096, 4096), granularity={granularity!r}))
warm = Job.of(Case({op!r}, (512, 1024), granularity={granularity!r}))
warm.fresh()
def status(field):
    found = re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())
    return int(found[1]) * 1024
job.expected = job.outs = ()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
results = job.fresh()
print(status("VmHWM") - before, sum(r.numel() * r.element_size() for r in results))
"""


def memory(op: str, granularity: str) -> dict:
    """Peak extra memory of one call in a process of its own, beside the bytes of its outputs."""
    if not Path("/proc/self/clear_refs").exists():
        return {"op": op, "granularity": granularity, "reason": "needs Linux's /proc"}
    program = _MEMORY.format(op=op, granularity=granularity)
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, outputs = map(int, done.stdout.split())
    return {"op": op, "granularity": granularity, "peak_bytes": peak, "output_bytes": outputs}


def ratio(cell: dict, rival: str, ours: str = OURS) -> float | None:
    """How many times longer the rival takes, by medians."""
    contestants = cell["contestants"]
    if rival not in contestants or ours not in contestants:
        return None
    return contestants[rival]["median"] / contestants[ours]["median"]


def ours_for(rival: str) -> str:
    """Which of our two a rival is compared with: outputs that stay, or fresh ones."""
    return OURS_OUT if rival in ("onnxruntime", "copy", "stream") else OURS
