"""Quantized weights in a safetensors file: codes, scale and zero_point as tensors, limits as metadata.

python examples/safetensors_file.py FILE

Of each weight NAME the file has the tensors NAME.q (int8, uint8 or int16), NAME.scale and NAME.zero_point
(floats), whose shapes say the granularity; the metadata NAME is JSON: {"q_min": int, "q_max": int}.
"""

import json
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quantkit


def save(weights, file):
    """weights: {name: (q, qparams)}."""
    tensors, metadata = {}, {}
    for name, (q, p) in weights.items():
        tensors |= {f"{name}.q": q, f"{name}.scale": p.scale, f"{name}.zero_point": p.zero_point}
        metadata[name] = json.dumps({"q_min": p.q_min, "q_max": p.q_max})
    save_file(tensors, file, metadata)


def load(file):
    weights = {}
    with safe_open(file, "pt") as opened:
        for name, limits in opened.metadata().items():
            q, scale, zero_point = (
                opened.get_tensor(f"{name}.{part}") for part in ("q", "scale", "zero_point")
            )
            p = quantkit.QuantizationParams(scale, zero_point, **json.loads(limits), dtype=q.dtype)
            weights[name] = q, p
    return weights


if __name__ == "__main__":
    torch.manual_seed(0)
    weights = {
        "per_channel": quantkit.dynamic_quantize(torch.randn(64, 128), True),
        "groups": quantkit.dynamic_quantize(
            torch.randn(64, 128),
            block_size=[1, 32],
            dtype=torch.uint8,
            sym=False,
            include_zero=True,
        ),
    }
    save(weights, sys.argv[1])
    for name, (q, p) in load(sys.argv[1]).items():
        right = quantkit.dequantize_tensor(*weights[name])
        assert torch.equal(quantkit.dequantize_tensor(q, p), right)
        print(
            f"{name}: {tuple(q.shape)} {q.dtype}, scale {tuple(p.scale.shape)}, "
            f"limits {p.q_min} to {p.q_max}"
        )
