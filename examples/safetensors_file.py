"""Quantized weights in a safetensors file: codes, scale and zero_point as tensors, the rest as metadata.

PYTHONPATH=. .venv/bin/python examples/safetensors_file.py [FILE]

Without FILE it writes to a temporary folder.

Of each weight NAME the file has the tensors NAME.q, NAME.scale and NAME.zero_point, and NAME.global_scale
where there is one. The metadata NAME is JSON with the other fields of QuantizationParams: {"format": str,
"q_min": int, "q_max": int, "block_size": [int] or null, "float32": bool, "round_first": bool}. Packed
codes are uint8 (U8), so the dtype of NAME.q alone does not say the format. Scales keep their dtype: F32,
F8_E8M0 or F8_E4M3.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quantkit

FORMATS = (
    "int8", "uint8", "int16", "uint16", "int4", "uint4", "int2", "uint2", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
OF_DTYPE = {getattr(torch, name): name for name in FORMATS}
OF_DTYPE[torch.float4_e2m1fn_x2] = "float4_e2m1fn"
TENSORS = ("q", "scale", "zero_point", "global_scale")


def save(weights, file):
    """weights: {name: (q, qparams)}."""
    tensors, metadata = {}, {}
    for name, (q, p) in weights.items():
        given = zip(TENSORS, (q, p.scale, p.zero_point, p.global_scale), strict=True)
        tensors |= {f"{name}.{part}": t for part, t in given if t is not None}
        fields = {
            "format": OF_DTYPE[p.dtype],
            "q_min": p.q_min,
            "q_max": p.q_max,
            "block_size": p.block_size,
            "float32": p.compute_dtype is torch.float32,
            "round_first": p.round_first,
        }
        metadata[name] = json.dumps(fields)
    save_file(tensors, file, metadata)


def load(file):
    weights = {}
    with safe_open(file, "pt") as opened:
        there = set(opened.keys())
        for name, text in opened.metadata().items():
            q, scale, zero_point, global_scale = (
                opened.get_tensor(key) if key in there else None
                for key in (f"{name}.{part}" for part in TENSORS)
            )
            fields = json.loads(text)
            p = quantkit.QuantizationParams(
                scale,
                zero_point,
                fields["q_min"],
                fields["q_max"],
                dtype=next(d for d, format in OF_DTYPE.items() if format == fields["format"]),
                block_size=None if fields["block_size"] is None else tuple(fields["block_size"]),
                global_scale=global_scale,
                compute_dtype=torch.float32 if fields["float32"] else None,
                round_first=fields["round_first"],
            )
            weights[name] = q, p
    return weights


def main(file):
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    groups = {"block_size": [1, 32], "dtype": torch.uint8, "sym": False, "include_zero": True}
    weights = {
        "per_channel": quantkit.dynamic_quantize(weight, True),
        "groups": quantkit.dynamic_quantize(weight, **groups),
        "int4": quantkit.quantize(weight.bfloat16(), "int4_group128"),
        "fp8": quantkit.quantize(weight.bfloat16(), "fp8_block128"),  # a short last block of 64
    }
    for scheme in ("mxfp8", "mxfp4", "nvfp4"):  # scales are codes; nvfp4 has a global_scale
        weights[scheme] = quantkit.quantize(weight.bfloat16(), scheme)
    int2 = {"dtype": "int2", "block_size": [32], "scale_rule": "half_range"}
    weights["int2"] = quantkit.quantize(weight, int2)  # four codes a byte
    save(weights, file)
    for name, (q, p) in load(file).items():
        assert torch.equal(q.view(torch.uint8), weights[name][0].view(torch.uint8))
        assert p == weights[name][1]
        assert torch.equal(quantkit.dequantize(q, p), quantkit.dequantize(*weights[name]))
        format = OF_DTYPE[p.dtype]
        scale = f"{str(p.scale.dtype).removeprefix('torch.')} scale {tuple(p.scale.shape)}"
        print(f"{name}: {tuple(q.shape)} {q.dtype}, {scale}, {format}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary) / "weights.safetensors")
