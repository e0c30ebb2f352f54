"""Interleaved timing: every contestant of a cell in turn, many times, so that a noisy moment hits all."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Collection

import torch

SAMPLE_SECONDS = 3e-4  # a shorter call is repeated within a sample
# Calls between these take several samples in a turn: calls beside them may be so slow that turns are few.
SEVERAL, SEVERAL_SECONDS = 5, (1e-3, 2e-2)
# Threads that wait for more work spin for a while: until then those of one pool leave no core to
# another's.
PAUSE_SECONDS = 5e-3


def interleaved(
    calls: dict[str, Callable[[], object]],
    budget: float,
    rounds: int = 7,
    apart: Collection[str] = (),
    alike: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one number (or SEVERAL) per round.

    Rounds go on until `budget` seconds are spent, at least `rounds` of them, each in another order.
    Caches are warm (an untimed call comes before each sample). Contestants in `apart` have
    threads of their own, and get a pause before and after. Contestants that are `alike` all have the same
    number of calls in a sample, and one sample in a round.
    """
    repeats, turns = {}, {}
    for name, call in calls.items():
        call()
        call()
        started = time.perf_counter()
        call()
        once = max(time.perf_counter() - started, 1e-7)
        repeats[name] = max(1, round(SAMPLE_SECONDS / once))
        turns[name] = SEVERAL if SEVERAL_SECONDS[0] < once < SEVERAL_SECONDS[1] else 1
    if alike:
        repeats = dict.fromkeys(calls, max(repeats.values()))
        turns = dict.fromkeys(calls, 1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names, order = list(calls), random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        ends = time.perf_counter() + budget
        done = 0
        while done < rounds or time.perf_counter() < ends:
            done += 1
            for name in names:
                call, count = calls[name], repeats[name]
                if name in apart:
                    time.sleep(PAUSE_SECONDS)
                for _ in range(turns[name]):
                    call()
                    started = time.perf_counter()
                    for _ in range(count):
                        call()
                    seconds[name].append((time.perf_counter() - started) / count)
                if name in apart:
                    time.sleep(PAUSE_SECONDS)
            order.shuffle(names)
    finally:
        if collecting:
            gc.enable()
    return seconds


def interleaved_on_gpu(
    calls: dict[str, Callable[[], object]], budget: float, rounds: int = 20
) -> dict[str, list[float]]:
    """The same on the current CUDA device: each call between two events, after its L2 was overwritten.

    The flush keeps the device busy while the host launches what follows: events time the kernels alone.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    for call in calls.values():
        call()
        call()
    torch.cuda.synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names, order = list(calls), random.Random(0)
    ends, done = time.perf_counter() + budget, 0
    while done < rounds or time.perf_counter() < ends:
        done += 1
        events = []
        for name in names:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            calls[name]()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
        for name, begin, end in events:
            seconds[name].append(begin.elapsed_time(end) / 1e3)
        order.shuffle(names)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Minimum, median and quartiles."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"min": min(seconds), "median": statistics.median(seconds), "lower": low, "upper": high}
