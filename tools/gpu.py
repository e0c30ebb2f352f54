"""The parts of tools/gpu.sh, each with its budget in seconds and its JSON file; a summary comes last."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
LOOK = """
import json, platform, shutil, subprocess, sys, torch
say = lambda *command: subprocess.run(command, capture_output=True, text=True).stdout.strip()
gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
print(json.dumps({
    "gpu": gpu, "driver": say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if shutil.which("nvidia-smi") else "", "torch": torch.__version__, "cuda": torch.version.cuda,
    "python": platform.python_version(), "nvcc": say(nvcc, "--version").splitlines()[-1:],
}))
sys.exit(None if gpu else "this torch sees no GPU")
"""
BACKEND = """
import torch, quantkit
backend = quantkit.backend()
assert backend.extension and backend.cuda_archs, backend
x = torch.randn(512, 4096)
q, x_hat, _ = quantkit.quantize_dequant(x.cuda(), True)
right_q, right, _ = quantkit.reference.quantize_dequant(x, True)
assert torch.equal(q.cpu(), right_q) and torch.equal(x_hat.cpu(), right)
print(backend)
"""


def python(*arguments):
    return [PYTHON, *arguments]


def tests(selection, *files):
    return python("-m", "pytest", "--full", "-rs", "--durations=5", "-k", selection, *files)


@dataclass
class Part:
    """A command, which ends by its budget: seconds after its stage began."""

    name: str
    budget: int
    command: list[str]

    @property
    def tested(self):
        return "pytest" in self.command


ON_DEVICE = "cuda and not cuda_emu"
GPU = "tests/test_gpu.py"
STREAMS = "stream or synchronisation or current_one or refusals or no_launch"
GRAPHS = "captured or compiled"
LARGE = "32_bits"
SPEED = ("--device", "cuda", "--quick", "--rivals", "eager,compile,torchao,copy")
OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "results/gpu").resolve()

# The parts of a stage run at the same time: cores wait for the reference, while the GPU is idle.
STAGES = [
    [Part("machine", 20, python("-c", LOOK))],
    [Part("build", 120, python("setup.py", "--quiet", "build_ext", "--inplace"))],
    [Part("first bits", 30, python("-c", BACKEND))],
    [
        Part("kernels", 240, tests(ON_DEVICE, "tests/test_kernels.py")),
        Part("out", 240, tests(ON_DEVICE, "tests/test_out.py")),
        Part("generated", 240, tests(ON_DEVICE, "tests/test_generated.py")),
        Part("device", 240, tests(f"not ({STREAMS} or {GRAPHS} or {LARGE})", GPU)),
    ],
    [
        Part("streams", 60, tests(STREAMS, GPU)),
        Part("graphs", 60, tests(GRAPHS, GPU)),
        Part("large", 60, tests(LARGE, GPU)),
    ],
    [Part("speed", 120, python("-m", "benchmarks", *SPEED, "--png", str(OUT)))],
]


@dataclass
class Result:
    name: str
    ok: bool
    seconds: float
    budget: int
    said: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0


def count(report, result):
    """Tests from pytest's own report; a part that only skipped has shown nothing."""
    suite = ElementTree.parse(report).getroot().find("testsuite").attrib
    result.failed = int(suite["failures"]) + int(suite["errors"])
    result.skipped = int(suite["skipped"])
    result.passed = int(suite["tests"]) - result.failed - result.skipped
    if result.passed == 0 and result.ok:
        result.ok, result.said = False, "every test was skipped: " + result.said


def run(part, threads):
    file = OUT / part.name.replace(" ", "_")
    log, report = file.with_suffix(".log"), file.with_suffix(".xml")
    command = [*part.command, "--junitxml", str(report)] if part.tested else part.command
    if part.name == "speed":
        command = [*command, "--json", str(OUT / "cells.json")]
    environment = os.environ | {
        "FORCE_CUDA": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
    }
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        # Five seconds before the end pytest still writes what it has.
        for stop, seconds in ((signal.SIGINT, part.budget - 5), (signal.SIGKILL, 5), (None, None)):
            try:
                code = process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, stop)
    seconds = time.monotonic() - begin
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    late = f"stopped after {seconds:.0f} s: " if seconds > part.budget - 5 else ""
    result = Result(part.name, code == 0, round(seconds, 1), part.budget, late + lines[-1])
    if part.tested and report.exists():
        count(report, result)
    file.with_suffix(".json").write_text(json.dumps(asdict(result), indent=1))
    return result


def summary(results):
    for r in results:
        counts = f"{r.passed} passed, {r.failed} failed, {r.skipped} skipped; " if r.passed else ""
        state = "ok" if r.ok else "FAILED"
        print(f"{r.name:<11}{state:<7}{r.seconds:>6.1f} of {r.budget:>3} s  {counts + r.said:.120}")
    failed = [r.name for r in results if not r.ok]
    print(f"{OUT}: " + (f"failed: {', '.join(failed)}" if failed else "everything passed"))


def main():
    # A shell's background jobs ignore SIGINT, and what they start would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    OUT.mkdir(parents=True, exist_ok=True)
    results = []
    cores = os.cpu_count() or 1
    for stage in STAGES:
        with ThreadPoolExecutor(len(stage)) as pool:
            done = pool.map(run, stage, [max(cores // len(stage), 1)] * len(stage))
            for result in done:
                print(f"{result.name}: {'ok' if result.ok else 'FAILED'}", flush=True)
                results.append(result)
    (OUT / "summary.json").write_text(json.dumps([asdict(r) for r in results], indent=1))
    summary(results)
    sys.exit(not all(r.ok for r in results))


if __name__ == "__main__":
    main()
