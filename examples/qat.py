"""Quantization-aware training: a small network learns with 4-bit weights and 8-bit activations.

PYTHONPATH=. .venv/bin/python examples/qat.py
"""

import torch
from torch import nn

import quantkit


class QuantizedLinear(nn.Linear):
    """Weights of 4 bits with a scale per output channel, inputs of 8 bits with one scale."""

    def forward(self, x):
        weight = quantkit.get_symmetric_qparams(self.weight, True, q_min=-8, q_max=7)
        inputs = quantkit.get_asymmetric_qparams(x, include_zero=True)
        x = quantkit.fake_quantize(x, inputs)
        return nn.functional.linear(x, quantkit.fake_quantize(self.weight, weight), self.bias)


def train(steps, function=lambda model: model):
    torch.manual_seed(0)
    model = nn.Sequential(QuantizedLinear(2, 64), nn.ReLU(), QuantizedLinear(64, 1))
    forward = function(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.rand(1024, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(forward(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    model, losses = train(300)
    print(f"loss {losses[0]:.4f} before, {losses[-1]:.4f} after training with 4-bit weights")
    q, qparams = quantkit.dynamic_quantize(model[0].weight, True, q_min=-8, q_max=7)
    print(f"codes of the first layer from {q.min()} to {q.max()}")
    assert losses[-1] < losses[0] / 10 and q.min() >= -8 and q.max() <= 7
    _, compiled = train(20, lambda model: torch.compile(model, fullgraph=True))
    print(f"compiled, after 20 steps: {compiled[-1]:.6f}; eager: {losses[19]:.6f}")
    # torch's own operators round otherwise when compiled.
    assert abs(compiled[-1] - losses[19]) < 1e-3
