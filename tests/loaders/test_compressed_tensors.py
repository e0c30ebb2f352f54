"""compressed-tensors' own decompressors and packers on single weights of all shapes."""

import pytest
import torch
from lib.checkpoints import ALL, quantized, stored, weight
from lib.loaders import RESULTS, Result

import quantkit
from quantkit.checkpoint.config_json import quantization_config
from quantkit.checkpoint.layouts import WEIGHT_DTYPES

pytest.importorskip("compressed_tensors", reason="make loaders-test")

NAME = "layer.weight"
OWN = ("deepseek", "quantkit")
THEIRS = [name for name, s in ALL.items() if s.layout not in OWN]
SHAPES = [(1, 128), (3, 384), (130, 256), (5, 7), (9, 30), (256, 128)]


def scheme_of(scheme):
    from compressed_tensors.quantization import QuantizationScheme

    group = quantization_config({NAME: scheme})["config_groups"]["group_0"]
    return QuantizationScheme(**group)


def decompressed(scheme, tensors):
    from compressed_tensors.compressors import BaseCompressor

    local = {name.removeprefix("layer."): t for name, t in tensors.items()}
    compressor = BaseCompressor.get_value_from_registry(scheme.layout)
    names = set(compressor.compression_param_names(scheme_of(scheme)))
    assert names == set(local)
    return compressor.decompress(local, scheme_of(scheme))["weight"]


@pytest.mark.parametrize("name", THEIRS)
def test_decompressed_weights_are_equal(name):
    scheme, compared = ALL[name], 0
    for dtype in WEIGHT_DTYPES:
        for seed, shape in enumerate(SHAPES):
            if scheme.why_not(shape, dtype):
                continue
            for factor in (1, 0, 2.0**-12, 2.0**8):
                x = (weight(shape, torch.float32, seed) * factor).to(dtype)
                if name == "w4 asymmetric" and shape[0] <= 8 and shape[1] > 128:
                    # Zero points of one row of int32s: their transpose is no tensor they can view.
                    with pytest.raises(RuntimeError, match="stride"):
                        decompressed(scheme, stored(scheme, NAME, x))
                    continue
                got = decompressed(scheme, stored(scheme, NAME, x))
                coded = scheme.scale in ("e8m0", "e4m3")
                assert got.dtype == (torch.bfloat16 if coded else dtype)
                back = quantkit.dequantize(*quantized(scheme, x))
                assert torch.equal(got, back.to(got.dtype)), (dtype, shape, factor)
                if coded:  # nothing is lost by bfloat16
                    assert torch.equal(got.float(), back)
                compared += 1
    assert compared >= 12
    RESULTS.append(Result("compressed-tensors", f"{compared} weights", name, "weights equal"))


@pytest.mark.parametrize("name", [n for n in THEIRS if ALL[n].layout == "pack-quantized"])
def test_int32s_are_theirs(name):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scheme = ALL[name]
    for seed, shape in enumerate(SHAPES):
        if scheme.why_not(shape, torch.float32):
            continue
        x = weight(shape, torch.float32, seed)
        tensors = stored(scheme, NAME, x)
        q, p = quantized(scheme, x)
        f = scheme.format
        codes = f.decode(f.unpack(q)).to(torch.int8)
        assert torch.equal(tensors[f"{NAME}_packed"], pack_to_int32(codes, f.bits))
        if not scheme.symmetric:
            zero = pack_to_int32(p.zero_point.to(torch.int8), f.bits, packed_dim=0)
            assert torch.equal(tensors[f"{NAME}_zero_point"], zero)


@pytest.mark.parametrize("name", [n for n in THEIRS if ALL[n].format.name == "float4_e2m1fn"])
def test_bytes_of_float4_are_theirs(name):
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    x = weight((130, 256), torch.float32)
    q, _ = quantized(ALL[name], x)
    f = ALL[name].format
    numbers = f.decode(f.unpack(q))
    assert torch.equal(pack_fp4_to_uint8(numbers), q)
    assert torch.equal(stored(ALL[name], NAME, x)[f"{NAME}_packed"], q)


def test_scales_of_mxfp4_are_theirs():
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    for dtype in (torch.float32, torch.bfloat16):
        x = weight((130, 256), dtype)
        scale = stored(ALL["mxfp4"], NAME, x)[f"{NAME}_scale"]
        largest = x.view(130, 8, 32).abs().amax(-1)
        assert torch.equal(scale, generate_mx_scales(largest, 4).to(torch.uint8))
