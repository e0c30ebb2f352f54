"""gguf: what can be had of Q8_0 and Q4_0."""

import numpy as np
import torch
from lib.rivals import COLUMNS, ROWS, chosen, needs, same

import quantkit
from quantkit import QuantizationParams

gguf = needs("gguf")
PEER = "gguf"


def test_q8_0():
    x = chosen(torch.float32, 127.0, 32)
    raw = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    back = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))
    blocks = torch.from_numpy(np.ascontiguousarray(raw)).view(-1, 34)
    stored = blocks[:, :2].contiguous().view(torch.float16).view(ROWS, -1)
    q = blocks[:, 2:].contiguous().view(torch.int8).view(ROWS, COLUMNS)
    p = quantkit.get_symmetric_qparams(x, block_size=[1, 32], eps=1e-30)
    row = "gguf Q8_0"
    same(PEER, row, "float32, scale", stored, p.scale.half())
    ours = quantkit.quantize_tensor(x, p)
    same(PEER, row, "float32, codes", q, ours)
    # Half away from zero of x · (1 / scale), by hand.
    v = (x.view(ROWS, -1, 32) * (1.0 / p.scale.unsqueeze(2))).view(x.shape)
    down = v.abs().floor()
    away = torch.copysign(down + (2 * (v.abs() - down)).floor(), v)
    one = QuantizationParams(1.0, 0.0, -128, 127)
    same(PEER, row, "float32, codes, half away from zero", q, quantkit.quantize_tensor(away, one))
    given = QuantizationParams(stored, 0.0, -128, 127, block_size=[1, 32])
    same(PEER, row, "back", back, quantkit.dequantize_tensor(q, given))
