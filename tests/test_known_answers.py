"""Answers that others' tests and pages print: independent of the reference, and of torch's operators.

torch's own operators are compared by tests/rivals/test_torch.py.
"""

import pytest
import torch
from lib.cases import assert_same, ops

pytestmark = pytest.mark.fallback

INT8, UINT8, INT16 = (
    (dtype, torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for dtype in (torch.int8, torch.uint8, torch.int16)
)
INT4, UINT4 = (torch.int8, -8, 7), (torch.uint8, 0, 15)

ONNX_AXIS = (
    [[[-162, 10], [-100, 232], [-20, -50]], [[-76, 0], [0, 252], [32, -44]],
     [[245, -485], [-960, -270], [-375, -470]]],
    [[[2]], [[4]], [[5]]], [[[84]], [[24]], [[196]]],
    [[[3, 89], [34, 200], [74, 59]], [[5, 24], [24, 87], [32, 13]],
     [[245, 99], [4, 142], [121, 102]]],
)  # fmt: skip
ONNX_BLOCK_SCALES = [[1.5, 2.5], [3.0, 4.9], [5.1, 6.9]]
ONNX_INT16 = [
    0, -514, 3, -3, 2.9, -2.9, 3.1, -3.1, 65022, -66046, 65023, -66047, 65024, -66048, 70000, -70000,
]  # fmt: skip
ONNX_FOUR_BITS = [[0, 2.5, 4.8, 8.6], [-30, -20, 6, 9], [12, 15, 16, 40]]
FBGEMM_CORNERS = [3.40282e38, -2.16845e38]  # the quotient overflows
TIES = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]

# x, scale, zero point, limits, codes.
QUANTIZED = {
    # ONNX's node tests.
    "onnx QuantizeLinear": ([0, 2, 3, 1000, -254, -1000], 2, 128, UINT8, [128, 129, 130, 255, 1, 0]),
    "onnx axis": (*ONNX_AXIS[:3], UINT8, ONNX_AXIS[3]),
    "onnx int16": (
        ONNX_INT16, 2, 256, INT16,
        [256, -1, 258, 254, 257, 255, 258, 254, 32767, -32767, 32767, -32768, 32767, -32768, 32767,
         -32768],
    ),
    "onnx int4": (
        ONNX_FOUR_BITS, [[2], [3], [4]], 1, INT4, [[1, 2, 3, 5], [-8, -6, 3, 4], [4, 5, 5, 7]]
    ),
    "onnx uint4": (
        ONNX_FOUR_BITS, [[2], [3], [4]], 1, UINT4, [[1, 2, 3, 5], [0, 0, 3, 4], [4, 5, 5, 11]]
    ),
    "onnx blocks, symmetric": (
        [[6, -8, -10, 5], [1, 8, 4, 5], [0, 20, 10, 4]], ONNX_BLOCK_SCALES, 0, INT16,
        [[4, -5, -4, 2], [0, 3, 1, 1], [0, 4, 1, 1]],
    ),
    "onnx blocks, asymmetric": (
        [[6, 12, 50, 5], [1, 8, 4, 5], [0, 20, 10, 4]], ONNX_BLOCK_SCALES,
        [[0, 1], [1, 0], [2, 3]], UINT8, [[4, 8, 21, 3], [1, 4, 1, 1], [2, 6, 4, 4]],
    ),
    # The examples in torch's documentation.
    "torch quantize_per_tensor": ([-1, 0, 1, 2], 0.1, 10, UINT8, [0, 10, 20, 30]),
    "torch quantize_per_channel": (
        [[-1, 0], [1, 2]], [[0.1], [0.01]], [[10], [0]], UINT8, [[0, 10], [100, 200]]
    ),
    # FBGEMM's QuantizeTest.cornerCases.
    "fbgemm int8": (FBGEMM_CORNERS, 1.19209e-07, 0, INT8, [127, -128]),
    "fbgemm uint8": (FBGEMM_CORNERS, 1.19209e-07, 0, UINT8, [255, 0]),
    "fbgemm int16": (FBGEMM_CORNERS, 1.19209e-07, 0, INT16, [32767, -32768]),
    # Ties go to even after the zero point was added. FBGEMM (torch.quantize_per_* on x86) agrees. ONNX,
    # torch.fake_quantize_* and quantize_per_tensor and _per_channel of quantized_decomposed round first,
    # and beside an odd zero point get [-1, -1, 1, 1, 3, 3].
    "ties beside 0": (TIES, 1, 0, INT8, [-2, -2, 0, 0, 2, 2]),
    "ties beside an odd zero point": (TIES, 1, 1, INT8, [-2, 0, 0, 2, 2, 4]),
    "ties beside an even zero point": (TIES, 1, 2, INT8, [0, 0, 2, 2, 4, 4]),
    # FBGEMM's vectorScalar: a quotient of -127.4999999754, which float32 rounds to the tie and so to
    # code 0. FBGEMM itself multiplies by 1 / scale and gets 1.
    "fbgemm beside a tie": ([-2.9483526e-05], 2.3124334356729307e-07, 128, UINT8, [0]),
}  # fmt: skip


def floats(*values):
    return [torch.tensor(v, dtype=torch.float32) for v in values]


@pytest.mark.parametrize("case", QUANTIZED.values(), ids=QUANTIZED)
def test_known_codes(case):
    x, scale, zero_point, (dtype, low, high), codes = case
    q = ops.quantize(*floats(x, scale, zero_point), low, high, dtype)
    assert_same(q, torch.tensor(codes, dtype=dtype))


# q, its dtype, scale, zero point, values: ONNX's node tests.
DEQUANTIZED = {
    "onnx DequantizeLinear": ([0, 3, 128, 255], torch.uint8, 2, 128, [-256, -250, 0, 254]),
    "onnx axis": (ONNX_AXIS[3], torch.uint8, *ONNX_AXIS[1:3], ONNX_AXIS[0]),
    "onnx int16": ([-300, -30, -1025, 1270], torch.int16, 2, -1024, [1448, 1988, -2, 4588]),
    "onnx uint16": ([30000, 31000, 32768, 33000], torch.uint16, 2, 32767, [-5534, -3534, 2, 466]),
    "onnx int4": ([0, 1, 7, -4, -8], torch.int8, 2, 1, [-2, 0, 12, -10, -18]),
    "onnx uint4": ([0, 1, 7, 10, 15], torch.uint8, 2, 1, [-2, 0, 12, 18, 28]),
}


@pytest.mark.parametrize("case", DEQUANTIZED.values(), ids=DEQUANTIZED)
def test_known_values(case):
    q, dtype, scale, zero_point, values = case
    x_hat = ops.dequantize(torch.tensor(q, dtype=dtype), *floats(scale, zero_point))
    assert_same(x_hat, *floats(values))


# ONNX's DynamicQuantizeLinear: x, scale and zero point as printed there, codes. The last one of the first
# row is 0.5 / scale = 25.5 beside an odd zero point: 178.5, which goes to 178. ONNX rounds first: 179.
DYNAMIC = {
    "both signs": (
        [0, 2, -3, -2.5, 1.34, 0.5], 0.0196078438, 153, [153, 255, 0, 26, 221, 178]
    ),
    "all negative": (
        [-1.0, -2.1, -1.3, -2.5, -3.34, -4.0], 0.0156862754, 255, [191, 121, 172, 96, 42, 0]
    ),
    "all positive": (
        [[1, 2.1, 1.3, 2.5], [3.34, 4.0, 1.5, 2.6], [3.9, 4.0, 3.0, 2.345]], 0.0156862754, 0,
        [[64, 134, 83, 159], [213, 255, 96, 166], [249, 255, 191, 149]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DYNAMIC.values(), ids=DYNAMIC)
def test_known_dynamic_codes(case):
    """Nine digits tell every float32 from its neighbours, so the printed scale is the exact one."""
    x, scale, zero_point, codes = case
    results = ops.dynamic_quantize(*floats(x), None, 0, 255, 1e-8, False, torch.uint8, True)
    expected = torch.tensor(codes, dtype=torch.uint8), *floats(scale, zero_point)
    assert_same(results, expected)


# What torch's tests of its per-channel observers expect, by channel dimension: scales to 8 decimals, zero
# points for int8. Their symmetric scales are other ones: max_abs / 127.5, quantkit's are max_abs / 127.
# FBGEMM's ChooseQuantizationParams takes max_abs / 128.
OBSERVED = [
    [[[[1, 2], [2, 2.5]], [[3, 4], [4.5, 6]]], [[[-4, -3], [5, 5]], [[6, 3], [7, 8]]]],
    (([0.02352941, 0.04705882], [-128, -43]), ([0.03529412, 0.03137255], [-15, -128]),
     ([0.03921569, 0.03137255], [-26, -128]), ([0.04313726, 0.04313726], [-35, -58])),
]  # fmt: skip


@pytest.mark.parametrize(
    "shift, limits", [(0, (-128, 127)), (128, (0, 255))], ids=["int8", "uint8"]
)
def test_known_parameters(shift, limits):
    x, expected = floats(OBSERVED[0])[0], OBSERVED[1]
    for dim, (scales, zero_points) in enumerate(expected):
        blocks = [1 if d == dim else -1 for d in range(4)]
        scale, zero_point = ops.choose_qparams(x, blocks, *limits, 1e-8, False, True)
        assert [round(s, 8) for s in scale.flatten().tolist()] == scales
        assert zero_point.flatten().tolist() == [z + shift for z in zero_points]
