"""FBGEMM's rowwise codes with a bias. Its quantize with a zero point is torch.quantize_per_tensor."""

import torch
from lib.rivals import COLUMNS, ROWS, chosen, needs, same

import quantkit
from quantkit import QuantizationParams

needs("fbgemm-gpu-cpu", "fbgemm_gpu")
PEER = "fbgemm-gpu-cpu"


def test_fused_rowwise():
    x = chosen(torch.float32, 127.5)
    rows = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(x)
    q = rows[:, :COLUMNS].contiguous()
    scale, bias = rows[:, COLUMNS:].contiguous().view(torch.float32).split(1, dim=1)
    row = "FBGEMM fused 8-bit rowwise"
    p = quantkit.get_asymmetric_qparams(x, True, dtype=torch.uint8, eps=1e-30)
    same(PEER, row, "float32, scale", scale.contiguous(), p.scale)
    one = QuantizationParams(1.0, 0.0, 0, 255, dtype=torch.uint8)
    inverse = 255 / (x.amax(1, True) - bias + 1e-8)
    ours = quantkit.quantize_tensor((x - bias) * inverse, one)
    same(PEER, row, "float32, codes, (x - min) · (255 / (max - min + 1e-8))", q, ours)
    ours = quantkit.quantize_tensor(x - bias, QuantizationParams(scale, 0.0, 0, 255))
    same(PEER, row, "float32, codes, (x - min) / scale", q, ours)
    assert q.shape == (ROWS, COLUMNS)
