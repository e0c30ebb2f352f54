"""Layouts of checkpoints: tiles, the way back, what is said about them; no other package."""

import hashlib
import itertools
import json
from dataclasses import replace

import pytest
import torch
from lib.checkpoints import ALL, of, quantized, stored, weight
from lib.rivals import bell, powers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.config_json import Weight, metadata, quantization_config, weights_in
from quantkit.checkpoint.layouts import SCALES, SCHEMES, WEIGHT_DTYPES, Part, WeightScheme
from quantkit.formats import OF_NAME, scale_numbers
from quantkit.schemes import RULES

EACH = pytest.mark.parametrize("scheme", ALL.values(), ids=ALL)
EACH_DTYPE = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
NAME = "model.layer.weight"
SHAPE = (144, 256)


def same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        assert torch.equal(*(t[name].reshape(-1).view(torch.uint8) for t in (a, b))), name


def shape_for(scheme):
    """With a short last block where the scheme has one."""
    short = scheme.layout in ("deepseek", "quantkit") or scheme.block in (None, (1, -1))
    return (200, 264) if short else (256, 384)


@EACH_DTYPE
@pytest.mark.parametrize(
    "name, limit, eps", [("w8a8", 127, 1e-8), ("w8", 127, 1e-8), ("w4", 7, 1e-8), ("fp8", 448, 2**-126)]
)  # fmt: skip
def test_codes_are_those_of_the_page(name, limit, eps, dtype):
    """The formulas of docs/checkpoints.md, in torch; rows of zeros and tiny numbers have eps."""
    x = weight(SHAPE, torch.float32)
    x[0], x[1] = 0, x[1] * 1e-12
    x = x.to(dtype)
    f = SCHEMES[name].format
    q, p = SCHEMES[name].quantize(x)
    groups = x.float().view(len(x), p.scale.shape[1], -1)
    eps = 2.0**-24 if dtype == torch.float16 else eps
    scale = (groups.abs().amax(-1) / limit).clamp_min(eps).to(dtype)
    assert torch.equal(p.scale, scale)
    numbers = (groups / scale.float()[..., None]).view(x.shape)
    codes = numbers.round() if f.has_zero_point else numbers.to(f.storage).float()
    assert torch.equal(f.decode(f.unpack(q)).float(), codes)


@EACH
@EACH_DTYPE
def test_tiles_change_no_byte_and_come_back(scheme, dtype):
    shape = shape_for(scheme)
    x = weight(shape, dtype)
    assert scheme.why_not(shape, dtype) is None
    whole = stored(scheme, NAME, x)
    for rows in (1, 24, 130):
        same_bytes(stored(scheme, NAME, x, rows), whole)
    q, p = quantized(scheme, x)
    again, same = scheme.loaded(whole, NAME, shape, dtype)
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8)) and same == p
    # The stored scale is the one that made the codes, and the error can be measured.
    made = quantkit.quantize_tensor(x, same)
    assert torch.equal(made.view(torch.uint8), q.view(torch.uint8))
    assert 1 < quantkit.measure(x, same).sqnr_db < 60


@EACH
def test_a_tile_is_loaded_by_itself(scheme):
    shape, dtype = shape_for(scheme), torch.bfloat16
    tensors = stored(scheme, NAME, weight(shape, dtype))
    whole = quantkit.dequantize(*scheme.loaded(tensors, NAME, shape, dtype))
    first = scheme.rows * (40 // scheme.rows or 1)
    count = shape[0] - first
    pieces = {}
    for part in scheme.parts(NAME, shape, dtype):
        offset, sizes = part.tile(first, count)
        data = tensors[part.name].reshape(-1).view(torch.uint8)[offset:]
        size = torch.Size(sizes).numel() * part.dtype.itemsize
        pieces[part.name] = data[:size].clone().view(part.dtype).view(sizes)
    rows = quantkit.dequantize(*scheme.loaded(pieces, NAME, (count, shape[1]), dtype))
    assert torch.equal(rows, whole[first:])


@pytest.mark.parametrize("shape", [(1, 128), (3, 128), (9, 256)], ids=str)
@EACH
def test_few_rows(scheme, shape):
    if scheme.why_not(shape, torch.float32):
        assert scheme.name == "fp8" and scheme.block == (128, 128)
        return
    x = weight(shape, torch.float32)
    q, p = quantized(scheme, x)
    same_bytes(stored(scheme, NAME, x, 1), stored(scheme, NAME, x))
    again, same = scheme.loaded(stored(scheme, NAME, x), NAME, shape, x.dtype)
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8)) and same == p


@EACH
def test_parts_are_what_a_file_holds(scheme, tmp_path):
    shape = shape_for(scheme)
    tensors = stored(scheme, NAME, weight(shape, torch.bfloat16))
    path = tmp_path / "w.safetensors"
    weights = {NAME: Weight(scheme, shape, torch.bfloat16)}
    save_file(tensors, path, metadata(weights))
    same_bytes(load_file(path), tensors)
    with safe_open(path, "pt") as file:
        assert weights_in(file.metadata()) == weights


# ---- by the consumers' own steps, written again here ------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith("own")])
@EACH_DTYPE
def test_dequantized_in_the_dtype_of_the_weights(name, dtype):
    """(codes - zero) * scale in the scale's dtype, as compressed-tensors has it: one rounding."""
    scheme = ALL[name]
    shape = shape_for(scheme)
    x = weight(shape, dtype)
    q, p = quantized(scheme, x)
    f = scheme.format
    codes = f.decode(f.unpack(q)) if f.bits < 8 else q.float()
    steps = {"weight": dtype, "float32": torch.float32}.get(scheme.scale, torch.bfloat16)
    scale = scale_numbers(p.scale).to(steps)
    zero = p.zero_point.to(steps)
    if scheme.scale == "e4m3":
        scale = scale.float() / (1 / p.global_scale)  # exact: a power of two
    if scheme.block is not None:
        for dim, block in enumerate(scheme.block):
            of_each = torch.arange(shape[dim]) // (shape[dim] if block == -1 else block)
            scale = scale.index_select(dim, of_each)
            zero = zero.index_select(dim, of_each) if zero.dim() else zero
    back = ((codes.to(scale.dtype) - zero.to(scale.dtype)) * scale).to(dtype)
    assert torch.equal(back, quantkit.dequantize(q, p).to(dtype))


def test_int32s_hold_codes_from_the_lowest_bits_on():
    x = torch.tensor([[7.0, -7, 1, 0, -1, 2, 3, 7, 4, -7]] * 2)
    tensors = stored(of("w4", block=(1, -1)), NAME, x)
    words = tensors[f"{NAME}_packed"].tolist()
    codes = [(word >> 4 * i) % 16 - 8 for word in words[0] for i in range(8)]
    assert codes == [*x[0].tolist(), *[-8] * 6]  # what is left over is 0, which stands for -8
    assert tensors[f"{NAME}_shape"].tolist() == [2, 10]
    tensors = stored(of("w8", symmetric=False), NAME, torch.tensor([[0.0, 255, 3]] * 6))
    assert tensors[f"{NAME}_packed"].view(torch.uint8).tolist() == [[0, 255, 3, 0]] * 6
    assert tensors[f"{NAME}_zero_point"].view(torch.uint8).tolist() == [[0] * 4, [0] * 4]


def test_zero_points_share_int32s_along_rows():
    x = torch.arange(11.0)[:, None] - torch.tensor([0.0, 15.0])
    zeros = stored(of("w4", block=(1, -1), symmetric=False), NAME, x)[f"{NAME}_zero_point"]
    nibbles = [(word >> 4 * i) % 16 for word in zeros[:, 0].tolist() for i in range(8)]
    assert nibbles == [15 - i for i in range(11)] + [0] * 5


# SHA-256 of what files hold for one weight in three dtypes. Other bytes are other checkpoints: files of
# an earlier version would fail `quantkit verify`.
DIGESTS = {
    "w8a8": "af41e1c4211cf351",
    "w8": "75fe75cd8c606e28",
    "w4": "fef9d65d0d9af4bc",
    "fp8": "a9592d0ce1edb37e",
    "mxfp8": "e0b22a8ce3c8582c",
    "mxfp4": "06045ef17e94c30b",
    "nvfp4": "608a35a5d6fac61c",
    "fp8_block": "3dc6fdf83d90fa17",
}


@pytest.mark.fallback
@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_stay_what_they_are(name):
    digest = hashlib.sha256()
    for dtype in WEIGHT_DTYPES:
        x = (bell(1, 256, 384) * powers(2, -9, 0, 256, 384)).to(dtype)
        for part, t in stored(SCHEMES[name], NAME, x, 128).items():
            digest.update(part.encode() + t.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]


# ---- numbers at the edges ---------------------------------------------------------------------------


def test_the_global_scale_is_a_power_of_two_that_most_weights_share():
    def chosen(largest):
        return quantized(SCHEMES["nvfp4"], torch.full((2, 16), largest))[1].global_scale.item()

    least, most = 2.625 / 512, 2.625  # (least, most]
    assert [chosen(v) for v in (least * (1 + 2.0**-23), 0.1, 1.0, most)] == [2.0**-10] * 4
    assert chosen(most * (1 + 2.0**-22)) == 2.0**-9 and chosen(2688.0) == 1
    assert chosen(least) == chosen(0.005) == 2.0**-19
    assert chosen(0.0) == 2.0**-126


@pytest.mark.parametrize("name", SCHEMES)
@EACH_DTYPE
def test_zeros_and_tiny_weights_have_finite_scales(name, dtype):
    scheme = SCHEMES[name]
    tiny = torch.finfo(dtype).smallest_normal / 64
    for x in (torch.zeros(128, 128), torch.full((128, 128), tiny)):
        tensors = stored(scheme, NAME, x.to(dtype))
        q, p = scheme.loaded(tensors, NAME, (128, 128), dtype)
        assert (scale_numbers(p.scale) > 0).all()
        assert torch.isfinite(quantkit.dequantize(q, p)).all()


def test_half_precision_scales_are_used_as_they_are_stored():
    x = weight((64, 128), torch.bfloat16)
    q, p = quantized(SCHEMES["w8a8"], x)
    exact = quantkit.get_symmetric_qparams(x, True, compute_dtype=torch.float32)
    assert p.scale.dtype == torch.bfloat16 and torch.equal(p.scale, exact.scale.bfloat16())
    assert not torch.equal(quantkit.quantize_tensor(x, exact), q)
    assert quantkit.measure(x, exact).sqnr_db - quantkit.measure(x, p).sqnr_db < 0.05


# ---- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "gguf"}, "layout: expected int-quantized or .*, got 'gguf'"),
        ({"layout": ["gguf"]}, r"layout: expected int-quantized or .*, got \['gguf'\]"),
        ({"dtype": "int4"}, "dtype: expected int8 for int-quantized, got 'int4'"),
        ({"block": (0, 4)}, r"block: expected \[rows .* got \[0, 4\]"),
        ({"block": (-1, 4)}, r"block: expected \[rows .* got \[-1, 4\]"),
        ({"block": (1, 4.0)}, r"block: expected \[rows .* got \[1, 4.0\]"),
        ({"block": 5}, r"block: expected \[rows .* got 5"),
        ({"block": "ab"}, r"block: expected \[rows .* got 'ab'"),
        ({"block": (1,)}, r"block: expected \[rows .* got \[1\]"),
        ({"block": (128, 128)}, r"block: expected one row for int-quantized, got \[128, 128\]"),
        ({"symmetric": "no"}, "symmetric: expected True or False for int8, got 'no'"),
        ({"symmetric": 1}, "symmetric: expected True or False for int8, got 1"),
        ({"activations": None}, "activations: expected True or False for .*, got None"),
        ({"scale": "e8m0"}, "scale: expected weight for int-quantized, got 'e8m0'"),
        (
            {"scale_rule": "even"},
            "scale_rule: expected None or half_range or ceil or floor for int8, weight, got 'even'",
        ),
        (
            {"scale_rule": "ceil", "symmetric": False},
            "scale_rule: expected None for int8, weight, got 'ceil'",
        ),
        (
            {"layout": "float-quantized", "dtype": "float8_e4m3fn", "symmetric": False},
            "symmetric: expected True for float8_e4m3fn, got False",
        ),
        (
            {"layout": "pack-quantized", "block": None, "symmetric": False},
            "block: expected a channel or a group for zero points in pack-quantized, got None",
        ),
        ({"layout": "quantkit", "dtype": "uint4"}, "symmetric: expected False for uint4, got True"),
        (
            {"layout": "quantkit", "scale": "e8m0", "block": None},
            "block: expected two sizes for scales in e8m0, got None",
        ),
        (
            {"layout": "quantkit", "scale": "e8m0", "symmetric": False},
            "symmetric: expected True for scales in e8m0, got False",
        ),
        (
            {"layout": "quantkit", "scale": "e4m3"},
            "dtype: expected float4_e2m1fn for scales in e4m3, got 'int8'",
        ),
    ],
    ids=str,
)
def test_a_scheme_that_its_layout_lacks(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(SCHEMES["w8a8"], **change)


def test_every_scheme_that_is_taken_can_be_made():
    """Of quantkit's own layout, which has all: what the checks let through, quantizes and comes back."""
    x = weight((32, 32), torch.bfloat16)
    made = 0
    for dtype, symmetric, scale, rule, block in itertools.product(
        OF_NAME, (True, False), SCALES, (None, *RULES), (None, (1, -1), (1, 16), (16, 16))
    ):
        fields = {"block": block, "symmetric": symmetric, "scale": scale, "scale_rule": rule}
        try:
            scheme = WeightScheme("custom", dtype, "quantkit", **fields)
        except ValueError:
            continue
        tensors = stored(scheme, NAME, x)
        same_bytes(stored(scheme, NAME, x, 1), tensors)
        q, p = scheme.loaded(tensors, NAME, (32, 32), x.dtype)
        again = quantkit.quantize_tensor(x, p)
        assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))
        made += 1
    assert made > 200


def test_layouts_of_one_kind_of_scale_and_block():
    for name, change in (
        ("mxfp8", {"block": (1, 16)}),
        ("mxfp4", {"scale": "float32"}),
        ("nvfp4", {"activations": True}),
        ("fp8_block", {"scale": "weight"}),
    ):
        with pytest.raises(ValueError, match=r"^(block|scale|activations): expected .*, got "):
            of(name, **change)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("w8a8", (4, 4), torch.int8, "its dtype is int8"),
        ("w8a8", (4, 4), torch.float64, "its dtype is float64"),
        ("w8a8", (4,), torch.float32, "it is 1-D, not 2-D"),
        ("w8a8", (0, 4), torch.float32, "it is empty"),
        ("w4", (4, 100), torch.float32, "its size 100 is no multiple of 128"),
        ("w4 channel", (4, 7), torch.float32, "its rows have 7 numbers, which fill no whole bytes"),
        ("fp8 blocks", (200, 128), torch.float32, "its size 200 is no multiple of 128"),
        ("nvfp4", (4, 24), torch.float32, "its size 24 is no multiple of 16"),
        ("fp8_block", (200, 100), torch.float32, None),
    ],
)
def test_why_a_weight_cannot_have_a_scheme(name, shape, dtype, reason):
    assert ALL[name].why_not(shape, dtype) == reason


def test_a_scheme_that_needs_extremes_says_so():
    with pytest.raises(ValueError, match=r"^extremes: expected .* got None$"):
        SCHEMES["nvfp4"].quantize(torch.ones(2, 16))


# ---- what a checkpoint says about itself ------------------------------------------------------------


@EACH
def test_schemes_are_json_and_hashable(scheme):
    again = WeightScheme(**json.loads(json.dumps(scheme.as_dict())))
    assert again == scheme and hash(again) == hash(scheme)


GOOD = json.loads(metadata({"a": Weight(SCHEMES["w4"], (2, 128), torch.float16)})["quantkit"])


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", "[" * 100000,
        json.dumps({**GOOD, "version": 2}),
        json.dumps({**GOOD, "schemes": []}),
        json.dumps({**GOOD, "schemes": [{"name": "w4"}]}),
        json.dumps({**GOOD, "weights": [1]}),
        json.dumps({**GOOD, "weights": {"a": [0, ["x"], "float16"]}}),
        json.dumps({**GOOD, "weights": {"a": [0, [2.5, 128], "float16"]}}),
        json.dumps({**GOOD, "weights": {"a": [0, [True, 128], "float16"]}}),
        json.dumps({**GOOD, "weights": {"a": [0, [2, 128], "int8"]}}),
        json.dumps({**GOOD, "weights": {"a": [-1, [2, 128], "float16"]}}),
        json.dumps({**GOOD, "weights": {"a": [0, [-2, 128], "float16"]}}),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_metadata_of_others_is_one_error(text):
    with pytest.raises(
        ValueError, match=r"^metadata 'quantkit': not what quantkit writes"
    ) as error:
        weights_in({"quantkit": text})
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_no_metadata_is_no_weight():
    assert weights_in({"format": "pt"}) == {} and metadata({}) == {"format": "pt"}


def test_the_config_of_one_scheme():
    assert quantization_config({"embed.weight": None}) is None
    config = quantization_config({"a.weight": SCHEMES["w8a8"], "embed.weight": None})
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["embed", "lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "int-quantized",
                "weights": {**eight, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    }


def test_the_config_of_several_schemes_names_each_layer():
    mixed = {"a.weight": SCHEMES["w4"], "b.weight": SCHEMES["w8a8"], "c.weight": SCHEMES["w8a8"]}
    config = quantization_config({**mixed, "d.weight": None})
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["d", "lm_head"]
    groups = config["config_groups"].values()
    assert [g["targets"] for g in groups] == [["b", "c"], ["a"]]
    assert [g["format"] for g in groups] == ["int-quantized", "pack-quantized"]
    renamed = {**mixed, "b.weight": replace(SCHEMES["w8a8"], name="custom")}
    assert quantization_config(renamed) == quantization_config(mixed)
    embedded = quantization_config({"embed.weight": SCHEMES["w8"], "a.weight": SCHEMES["w8"]})
    assert embedded["config_groups"]["group_0"]["targets"] == ["a", "embed"]


def test_inputs_of_embeddings_are_not_quantized():
    both = quantization_config({"embed.weight": SCHEMES["w8a8"], "a.weight": SCHEMES["w8a8"]})
    inputs = {g["targets"][0]: g["input_activations"] for g in both["config_groups"].values()}
    assert inputs["embed"] is None and inputs["a"]["dynamic"] is True


def test_the_config_of_deepseeks_layout_and_of_quantkits():
    config = quantization_config({"a.weight": SCHEMES["fp8_block"], "gate.weight": None})
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "lm_head"],
    }
    assert quantization_config({"a.weight": ALL["own w4"]}) == {"layout": "quantkit"}
    with pytest.raises(ValueError, match=r"^wte: the layout deepseek has no quantized embeddings$"):
        quantization_config({"wte.weight": SCHEMES["fp8_block"]})
    with pytest.raises(ValueError, match=r"^layout: expected one kind .* and deepseek$"):
        quantization_config({"a.weight": SCHEMES["w4"], "b.weight": SCHEMES["fp8_block"]})


def test_parts_say_which_rows_they_are_about():
    assert SCHEMES["fp8_block"].parts("a", (300, 128), torch.bfloat16) == (
        Part("a", (300, 128), torch.float8_e4m3fn, 1),
        Part("a_scale_inv", (3, 1), torch.float32, 128),
    )
    part = of("w4", symmetric=False).parts("a", (300, 128), torch.bfloat16)[2]
    assert part == Part("a_zero_point", (38, 1), torch.int32, 8)
    assert part.tile(296, 4) == (37 * 4, (1, 1))
