"""What tests of the public functions share: both modules that have them, an input, parameters."""

import dataclasses

import pytest
import torch
from lib.cases import values

import quantkit
from quantkit import QuantizationParams, reference

MODULES = pytest.mark.parametrize("m", [quantkit, reference], ids=lambda m: m.__name__)
F8, F4, F32 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2, torch.float32
E8M0 = torch.float8_e8m0fnu
X = values((6, 20), torch.bfloat16, 1)
P = QuantizationParams(torch.tensor(0.1), torch.tensor(0.0), -128, 127)


def of(**fields):
    return dataclasses.replace(P, **fields)
