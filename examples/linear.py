"""Linear layers with int4 and float8 weights, and with float8 weights and inputs.

PYTHONPATH=. .venv/bin/python examples/linear.py
"""

import torch
from torch import nn

import quantkit


class QuantizedLinear(nn.Module):
    """The weight by a scheme; the input too, where it has one. The product is torch's, in bfloat16."""

    def __init__(self, linear, scheme, input_scheme=None):
        super().__init__()
        q, self.qparams = quantkit.quantize(linear.weight, scheme)
        self.register_buffer("q", q)
        self.input_scheme = input_scheme

    def forward(self, x):
        if self.input_scheme is not None:
            x = quantkit.dequantize(
                *quantkit.quantize(x, self.input_scheme), output_dtype=torch.bfloat16
            )
        weight = quantkit.dequantize(self.q, self.qparams, output_dtype=torch.bfloat16)
        return nn.functional.linear(x, weight)


if __name__ == "__main__":
    torch.manual_seed(0)
    linear = nn.Linear(1024, 768, bias=False, dtype=torch.bfloat16)
    x = torch.randn(32, 1024, dtype=torch.bfloat16)
    right = linear(x).double()
    for schemes in (
        ("int4_group128",),
        ("fp8_block128",),
        ("fp8_block128", "fp8_group128"),  # DeepSeek's: weights by blocks, inputs by groups
        ("int8_channel", "int8_token"),
    ):
        layer = QuantizedLinear(linear, *schemes)
        with torch.no_grad():
            error = layer(x).double() - right
        ratio = 10 * torch.log10(right.square().sum() / error.square().sum()).item()
        kib = (layer.q.nbytes + layer.qparams.scale.nbytes) / 1024
        print(
            f"{', '.join(schemes)}: {kib:.0f} KiB of {linear.weight.nbytes / 1024:.0f}, {ratio:.1f} dB"
        )
        assert ratio > 15
