"""Learned step size quantization (Esser et al., 2020): scales of 3-bit weights are trained with them.

PYTHONPATH=. .venv/bin/python examples/lsq.py
"""

import torch
from torch import nn

import quantkit

Q_MIN, Q_MAX = -4, 3


class LearnedLinear(nn.Linear):
    """Weights of 3 bits, with a scale per output channel that is a parameter."""

    def __init__(self, *sizes, learned=True):
        super().__init__(*sizes)
        start = self.weight.detach().abs().mean(1, keepdim=True) * 2 / Q_MAX**0.5
        self.scale = nn.Parameter(start, requires_grad=learned)
        # The paper's factor: steps of scales and of weights are alike.
        factor = (self.in_features * Q_MAX) ** -0.5
        if learned:
            self.scale.register_hook(lambda grad: grad * factor)

    def forward(self, x):
        qparams = quantkit.QuantizationParams(self.scale, 0.0, Q_MIN, Q_MAX)
        return nn.functional.linear(x, quantkit.fake_quantize(self.weight, qparams), self.bias)


def train(learned, steps=400):
    torch.manual_seed(0)
    layers = (LearnedLinear(2, 64, learned=learned), LearnedLinear(64, 1, learned=learned))
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    scales = [layer.scale for layer in layers if learned]
    others = [p for layer in layers for p in (layer.weight, layer.bias)]
    optimizer = torch.optim.Adam([{"params": others}, {"params": scales, "lr": 1e-3}], lr=1e-2)
    x = torch.rand(1024, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), layers[0].scale


if __name__ == "__main__":
    fixed, start = train(learned=False)
    loss, scale = train(learned=True)
    change = (scale / start).detach()
    print(f"loss after training: {fixed:.5f} with fixed scales, {loss:.5f} with learned ones")
    print(f"scales became {change.min():.2f} to {change.max():.2f} times as large")
    assert loss < fixed * 2 / 3 and train(learned=True)[0] == loss  # the same bits in every run
