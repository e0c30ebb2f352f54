"""A model with quantized weights: compiled, exported, saved, and run by a process that has but the files.

PYTHONPATH=. .venv/bin/python examples/export.py [FOLDER]

The files go to FOLDER, else to a temporary one.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import quantkit


class QuantizedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        q, p = quantkit.dynamic_quantize(linear.weight, block_size=[1, 32])  # groups of 32
        self.limits = p.q_min, p.q_max
        for name, tensor in (("q", q), ("scale", p.scale), ("zero_point", p.zero_point)):
            self.register_buffer(name, tensor)

    def forward(self, x):
        p = quantkit.QuantizationParams(self.scale, self.zero_point, *self.limits)
        return nn.functional.linear(x, quantkit.dequantize_tensor(self.q, p))


LATER = """
import sys, torch
import quantkit  # registers the operators that the file names
folder = sys.argv[1]
x = torch.load(f"{folder}/x.pt")
exported = torch.export.load(f"{folder}/model.pt2").module()
packaged = torch._inductor.aoti_load_package(f"{folder}/package.pt2")
torch.save([exported(x), packaged(x)], f"{folder}/y.pt")
"""


def main(folder):
    torch.manual_seed(0)
    model = QuantizedLinear(nn.Linear(256, 128, bias=False)).eval()
    x = torch.randn(7, 256)
    right = model(x)

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        print("compiled: largest difference", (compiled(x) - right).abs().max().item())
        rows = {0: torch.export.Dim("rows", min=2)}
        program = torch.export.export(model, (torch.randn(4, 256),), dynamic_shapes=(rows,))
    torch.export.save(program, folder / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "package.pt2"))
    torch.save(x, folder / "x.pt")

    subprocess.run([sys.executable, "-c", LATER, folder], check=True)
    for name, y in zip(("exported", "packaged"), torch.load(folder / "y.pt"), strict=True):
        print(f"{name}, in a new process: largest difference", (y - right).abs().max().item())
        assert torch.allclose(y, right)  # matmul is torch's; the weights' bits are quantkit's


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
