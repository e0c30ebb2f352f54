"""What ran: the machine, torch, quantkit and the rivals' versions, without names of hosts or folders."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

import quantkit

from .rivals import RIVALS

ROOT = Path(__file__).resolve().parent.parent


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def _gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "l2": found.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def description() -> dict:
    cpuinfo = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    pages = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(f"{index}/type").strip() != "Instruction":
            caches["L" + _read(f"{index}/level").strip()] = _read(f"{index}/size").strip()
    return {
        "cpu": model[1] if model else platform.processor(),
        "avx512": " avx512f" in cpuinfo,
        "machine": platform.machine(),
        "cores": len(re.findall(r"^processor", cpuinfo, re.MULTILINE)) or None,
        "caches": caches,
        "system": f"{platform.system()} {platform.release()}",
        "huge_pages": pages[1] if pages else None,
        "gpu": _gpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "quantkit": asdict(quantkit.backend()),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rivals": {name: rival.version() for name, rival in RIVALS.items()},
    }
