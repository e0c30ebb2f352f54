"""quant_tool, whose names quantkit takes over, as its users have it: an independent oracle."""

from dataclasses import dataclass

import torch


@dataclass
class QuantizationParams:
    scale: torch.Tensor
    zero_point: torch.Tensor
    q_min: int
    q_max: int


def _other_dims(x, channel_dim):
    return [d for d in range(x.dim()) if d != channel_dim]


def get_symmetric_qparams(x, per_channel=False, channel_dim=0, dtype=torch.int8, eps=1e-8):
    info = torch.iinfo(dtype)
    if per_channel:
        max_abs = x.abs().amax(dim=_other_dims(x, channel_dim), keepdim=True)
    else:
        max_abs = x.abs().max()
    scale = torch.clamp(max_abs / max(info.max, 1), min=eps)
    return QuantizationParams(scale, torch.zeros_like(scale), info.min, info.max)


def get_asymmetric_qparams(x, per_channel=False, channel_dim=0, dtype=torch.int8, eps=1e-8):
    info = torch.iinfo(dtype)
    if per_channel:
        dims = _other_dims(x, channel_dim)
        x_min, x_max = x.amin(dim=dims, keepdim=True), x.amax(dim=dims, keepdim=True)
    else:
        x_min, x_max = x.min(), x.max()
    scale = torch.clamp((x_max - x_min) / max(info.max - info.min, 1), min=eps)
    zero_point = torch.clamp(info.min - torch.round(x_min / scale), info.min, info.max)
    return QuantizationParams(scale, zero_point, info.min, info.max)


def quantize_tensor(x, qparams):
    q = torch.round(x / qparams.scale + qparams.zero_point)
    return torch.clamp(q, qparams.q_min, qparams.q_max).to(torch.int8)


def dequantize_tensor(q, qparams):
    return (q.float() - qparams.zero_point) * qparams.scale


def quantize_dequant(x, per_channel=False, channel_dim=0, dtype=torch.int8, sym=True):
    choose = get_symmetric_qparams if sym else get_asymmetric_qparams
    qparams = choose(x, per_channel, channel_dim, dtype)
    q = quantize_tensor(x, qparams)
    return q, dequantize_tensor(q, qparams), qparams
