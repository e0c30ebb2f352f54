"""Peak memory is the outputs: no copy of the input, no scratch that grows with it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import ctypes, re, torch, quantkit
# What is freed goes back to the system at once, and is reused by no other call.
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
ops = torch.ops.quantkit
scale, zero_point = torch.full((), 0.1), torch.zeros(())
limits = (-128, 127)
chosen = (*limits, 1e-8, False, torch.int8)
calls = {
    "per tensor": lambda x: ops.quantize_dequantize(x, None, *chosen),
    "per row": lambda x: ops.quantize_dequantize(x, [1, -1], *chosen),
    "per column": lambda x: ops.dynamic_quantize(x, [-1, 1], *chosen),
    "fake_quantize": lambda x: (ops.fake_quantize(x, scale, zero_point, *limits),),
    "measure": lambda x: ops.measure(x, scale, zero_point, *limits, "int8", over=[1, -1]),
}

def status(field):
    found = re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())
    return int(found[1]) * 1024

torch.set_num_threads(2)
for dtype, layout in (
    (torch.float32, lambda x: x),
    (torch.bfloat16, lambda x: x.t()),
    (torch.float32, lambda x: x[:, :4000]),
):
    x = layout(torch.empty(4096, 4096, dtype=dtype).normal_())
    for name, call in calls.items():
        call(torch.randn(1024, 1024).to(dtype))  # starts threads
        open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
        before = status("VmRSS")
        results = call(x)
        peak = status("VmHWM") - before
        print(peak - sum(r.numel() * r.element_size() for r in results), dtype, x.stride(), name)
        del results
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_outputs(torch_process):
    done = torch_process.run(PROGRAM, ROOT)
    assert done.returncode == 0, done.stderr
    measured = done.stdout.splitlines()
    assert len(measured) == 15
    for line in measured:
        # Somewhat below 0 where a call reuses what another one freed.
        assert -(1 << 20) < int(line.split()[0]) < 8 << 20, line
