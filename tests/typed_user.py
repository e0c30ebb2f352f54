"""A user's module under strict type checking: every public name, as its page says (never run)."""

from collections.abc import Sequence
from typing import assert_type

import torch

import quantkit
from quantkit import QuantizationParams, nn, reference


def functions(x: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    p = quantkit.get_symmetric_qparams(x, True, 0, torch.int8, 1e-8, q_min=-127, q_max=127)
    assert_type(p, QuantizationParams)
    assert_type(quantkit.get_asymmetric_qparams(x, include_zero=True), QuantizationParams)
    q = assert_type(quantkit.quantize_tensor(x, p), torch.Tensor)
    assert_type(quantkit.dequantize_tensor(q, p), torch.Tensor)
    codes, x_hat, _ = quantkit.quantize_dequant(x, per_channel=True, channel_dim=-1, sym=False)
    assert_type(codes, torch.Tensor)
    assert_type(x_hat, torch.Tensor)
    q, p = quantkit.dynamic_quantize(x, block_size=blocks, dtype=torch.uint8, eps=1e-6)
    assert_type(quantkit.dequantize_tensor(q, p, output_dtype=torch.float16), torch.Tensor)
    q, p = quantkit.dynamic_quantize(x, dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    q, p = quantkit.dynamic_quantize(x, dtype="int4", block_size=[1, 128], scale_rule="half_range")
    q, p = assert_type(
        quantkit.quantize(x, "fp8_block128"), tuple[torch.Tensor, QuantizationParams]
    )
    q, p = quantkit.quantize(x, "nvfp4", global_scale=p.global_scale, eps=0.125)
    q, p = quantkit.quantize(x, {"dtype": torch.uint16, "block_size": (-1,)}, eps=1e-6)
    assert_type(quantkit.dequantize(q, p, output_dtype=torch.bfloat16), torch.Tensor)
    assert_type(quantkit.SCHEMES["int8_token"], str)
    return quantkit.fake_quantize(x, p)


def schemes(x: torch.Tensor, own: dict[str, int]) -> torch.Tensor:
    assert_type(quantkit.SCHEMES["int4_group128"], str)
    names: list[str] = list(quantkit.SCHEMES)
    q, p = quantkit.quantize(x, names[0], q_min=-7)
    assert_type(quantkit.quantize(x, own), tuple[torch.Tensor, QuantizationParams])
    mixed = quantkit.quantize(x, {"dtype": "int4", "block_size": [32]})  # stubs have no torch.int4
    assert_type(mixed, tuple[torch.Tensor, QuantizationParams])
    return assert_type(quantkit.dequantize(q, p, output_dtype=torch.float16), torch.Tensor)


def formats(x: torch.Tensor) -> torch.Tensor:
    p = quantkit.get_symmetric_qparams(
        x, dtype="int4", block_size=(1, 32), scale_rule="half_range", compute_dtype=torch.float32
    )
    assert_type(p.block_size, tuple[int, ...] | None)
    assert_type(p.compute_dtype, torch.dtype | None)
    assert_type(p.round_first, bool)
    assert_type(p.global_scale, torch.Tensor | None)
    quantkit.get_asymmetric_qparams(
        x, dtype=torch.uint16, compute_dtype=torch.float32, round_first=True
    )
    _, x_hat, p = quantkit.quantize_dequant(x, dtype=torch.float8_e5m2, output_dtype=torch.bfloat16)
    p = quantkit.get_symmetric_qparams(
        x,
        dtype="float4_e2m1fn",
        block_size=[1, 32],
        scale_dtype=torch.float8_e8m0fnu,
        scale_rule="even",
    )
    q, p = quantkit.dynamic_quantize(
        x, dtype="int2", block_size=(1, 16), scale_dtype=torch.float8_e4m3fn, global_scale=p.scale
    )
    q, p = quantkit.dynamic_quantize(x, dtype="uint4", sym=False, include_zero=True, eps=None)
    x_hat = quantkit.dequantize_tensor(q, p, output_dtype=torch.float16)
    return x_hat


def why(codes: torch.Tensor, x: torch.Tensor, p: QuantizationParams) -> str:
    found = quantkit.explain(codes, x, p)
    assert_type(found.ranking, tuple[tuple[str, int, int], ...])
    assert_type(quantkit.linear_w8a8(x, codes, p.scale, x[0]), torch.Tensor)
    low, high = quantkit.aminmax(x, True, channel_dim=-1)
    assert_type(torch.stack([low, high]), torch.Tensor)
    return str(found)


def errors(x: torch.Tensor, p: QuantizationParams) -> torch.Tensor:
    found = quantkit.measure(x, p, over=[1, -1])
    assert_type(found, quantkit.Measured)
    limbs, greatest, counts = quantkit.measure_limbs(x, p, over=(-1, 1))
    assert_type(quantkit.join_measures(limbs, greatest, counts), quantkit.Measured)
    squares, squared_errors, max_error, saturated, left_out = found
    assert_type(torch.stack([squares / squared_errors, max_error, saturated]), torch.Tensor)
    assert_type(found.left_out + left_out, torch.Tensor)
    return assert_type(found.sqnr_db, torch.Tensor)


def at_random(x: torch.Tensor, p: QuantizationParams) -> torch.Tensor:
    index = assert_type(quantkit.shard_index(x.shape, [0, 3]), tuple[int, ...])
    q = quantkit.quantize_tensor(x, p, seed=7, index=index)
    q, p = quantkit.dynamic_quantize(x, dtype="int4", seed=(7, 2))
    _, x_hat, p = quantkit.quantize_dequant(x, seed=torch.tensor([7, 2]), index=[0, 8, 1])
    q, p = quantkit.quantize(x_hat, "fp8_tensor", seed=(7, 2), index=index)
    y = assert_type(quantkit.fake_quantize(x, p, seed=3), torch.Tensor)
    return quantkit.dequantize(q, p) - y


def models(model: torch.nn.Module, layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    done = quantkit.quantize_model_(model, "int8_channel", activations="int8", exclude=["*head"])
    assert_type(done, dict[str, torch.nn.Module])
    quantkit.quantize_model_(model, {"dtype": "int4", "block_size": [64]}, include=("embed",))
    quantkit.quantize_model_(model, [("*down", "mxfp8"), ("*up", {"dtype": "int8"}), ("*", None)])
    assert_type(quantkit.dequantize_model_(model), dict[str, torch.nn.Module])
    mine = assert_type(nn.QuantLinear.from_float(layer, "int8_token", "int8"), nn.QuantLinear)
    nn.load_checkpoint_(model, "folder", activations="int8", strict=False)
    assert_type(mine.qparams, QuantizationParams)
    return assert_type(quantkit.dequantize(mine.codes, mine.qparams), torch.Tensor)


def parameters() -> QuantizationParams:
    p = QuantizationParams(torch.ones(()), torch.zeros(()), -8, 7, dtype=torch.int8)
    QuantizationParams(
        torch.ones(4, 2), 0, -448, 448, dtype=torch.float8_e4m3fn, block_size=[1, 128],
        compute_dtype=torch.float32, round_first=False,
    )  # fmt: skip
    assert_type(QuantizationParams(0.1, 0, -8, 7), QuantizationParams)
    assert_type(p.scale, torch.Tensor)
    assert_type(p.q_min, int)
    assert_type(p.dtype, torch.dtype | None)
    assert_type(p.block_size, tuple[int, ...] | None)
    assert_type(p.compute_dtype, torch.dtype | None)
    QuantizationParams(0.1, 0, -8, 7, dtype=torch.int8, block_size=[1, 4], round_first=True)
    return p


def reference_functions(x: torch.Tensor) -> torch.Tensor:
    q, p = reference.dynamic_quantize(x, True, sym=False)
    assert_type(reference.quantize_dequant(x)[2], QuantizationParams)
    assert_type(reference.get_symmetric_qparams(x), QuantizationParams)
    assert_type(reference.get_asymmetric_qparams(x), QuantizationParams)
    assert_type(reference.quantize_tensor(x, p), torch.Tensor)
    assert_type(reference.fake_quantize(x, p), torch.Tensor)
    assert_type(reference.quantize(x, "fp8_block128"), tuple[torch.Tensor, QuantizationParams])
    assert_type(reference.dequantize(x, p), torch.Tensor)
    assert_type(reference.aminmax(x, block_size=[1, 8]), tuple[torch.Tensor, torch.Tensor])
    assert_type(reference.linear_w8a8(x, q, p.scale), torch.Tensor)
    assert_type(reference.measure(x, p).sqnr_db, torch.Tensor)
    assert_type(reference.measure_limbs(x, p)[0], torch.Tensor)
    return reference.dequantize_tensor(q, p)


def calibrated(model: torch.nn.Module, x: torch.Tensor) -> dict[str, QuantizationParams]:
    with quantkit.observe(model, include="re:.*proj", granularity="tensor") as stats:
        model(x)
    assert_type(stats, quantkit.observers.Stats)
    observer = assert_type(stats["up_proj"], quantkit.observers.Observer)
    assert_type(observer.qparams("mse", sym=False, dtype=torch.uint8), QuantizationParams)
    assert_type(stats.merge(stats).input_scales("percentile"), dict[str, torch.Tensor])
    return assert_type(stats.qparams(), dict[str, QuantizationParams])


def backend() -> str:
    b = quantkit.backend()
    assert_type(b.extension, bool)
    assert_type(b.isas, tuple[str, ...])
    assert_type(b.threads, int)
    return f"{quantkit.__version__} {b.isa} {b.reason} {b.cuda_archs} {b.contract}"
