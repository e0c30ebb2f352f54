"""Peak memory is the outputs: no copy of the input, no scratch that grows with it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantkit

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import re, torch, quantkit
ops = torch.ops.quantkit
x = torch.empty(4096, 4096, dtype=torch.{dtype}).normal_(){layout}
scale, zero_point = torch.full((), 0.1), torch.zeros(())
limits = (-128, 127)
chosen = (*limits, 1e-8, False, torch.int8)
def call(x):
    return {call}
call(torch.randn(1024, 1024).to(x.dtype))  # starts threads
def status(field):
    found = re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())
    return int(found[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = status("VmRSS")
results = call(x)
print(status("VmHWM") - before - sum(r.numel() * r.element_size() for r in results))
"""
CALLS = {
    "per tensor": "ops.quantize_dequantize(x, None, *chosen)",
    "per row": "ops.quantize_dequantize(x, [1, -1], *chosen)",
    "per column": "ops.dynamic_quantize(x, [-1, 1], *chosen)",
    "fake_quantize": "(ops.fake_quantize(x, scale, zero_point, *limits),)",
}
LAYOUTS = {"": "float32", ".t()": "bfloat16", "[:, :4000]": "float32"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS.items())
@pytest.mark.parametrize("call", CALLS)
def test_peak_memory_is_the_outputs(call, layout, dtype):
    program = PROGRAM.format(call=CALLS[call], layout=layout, dtype=dtype)
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Below 0 where the call reuses what the first one freed; far below, nothing was measured.
    assert -(16 << 20) < int(done.stdout) < 8 << 20


def test_a_result_that_memory_cannot_hold_is_torchs_error():
    x = torch.empty(1).expand(2**46)
    with pytest.raises(RuntimeError, match="memory"):
        quantkit.quantize_tensor(x, quantkit.QuantizationParams(1.0, 0.0, -128, 127))
