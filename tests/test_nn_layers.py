"""quantkit.nn: a layer computes what torch's own layer does with the decoded weight, and is a module."""

import copy
import dataclasses
import io
import pickle
import subprocess
import sys

import pytest
import torch
from lib.cases import FLOATS, assert_same
from torch import nn

import quantkit
from quantkit.nn import QuantConv2d, QuantEmbedding, QuantLinear
from quantkit.nn.layers import LAYERS

SCHEMES = [
    *quantkit.SCHEMES,
    {"dtype": "int4", "block_size": [32]},
    {"dtype": "uint4", "sym": False, "include_zero": True, "block_size": (3, 10)},
    {"dtype": "int16", "per_channel": True, "channel_dim": 1},
    {"dtype": "float8_e5m2", "per_channel": True, "scale_rule": "ceil"},
    {"dtype": "int2", "block_size": [8], "scale_dtype": torch.float8_e4m3fn, "global_scale": 0.01},
]
# Rows of 100 numbers have a short last block in most schemes; 36 is less than a group.
FLOAT_LAYERS = {
    "linear": lambda: nn.Linear(100, 6),
    "linear without bias": lambda: nn.Linear(64, 5, bias=False),
    "embedding": lambda: nn.Embedding(300, 100, padding_idx=1),
    "conv": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1),
    "grouped conv": lambda: nn.Conv2d(8, 4, (3, 2), padding=(2, 1), dilation=2, groups=2),
    "same, reflect": lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", bias=False),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid", padding_mode="replicate"),
}


def made(kind, dtype=torch.float32):
    """A float layer, and an input."""
    torch.manual_seed(0)
    layer = FLOAT_LAYERS[kind]().to(dtype)
    if isinstance(layer, nn.Embedding):
        return layer, torch.tensor([[1, 0, 299], [129, 128, 127]])
    if isinstance(layer, nn.Linear):
        return layer, torch.randn(2, 3, layer.in_features, dtype=dtype)
    return layer, torch.randn(2, layer.in_channels, 9, 8, dtype=dtype)


def quantized(layer, scheme, activations=None):
    return LAYERS[type(layer)].from_float(layer, scheme, activations)


def decoded(layer, scheme):
    """The float layer with the weight that the functions make of it."""
    weight = layer.weight.detach()
    q, p = quantkit.quantize(weight.flatten(1), scheme, compute_dtype=torch.float32)
    kind = weight.dtype if weight.dtype != torch.float64 else torch.float32
    other = copy.deepcopy(layer)
    other.weight.data = quantkit.dequantize(q, p, output_dtype=kind).view_as(weight).to(weight)
    return other


@pytest.mark.parametrize("kind", FLOAT_LAYERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_gives_the_bits_of_the_decoded_weight(kind, scheme):
    layer, x = made(kind)
    mine, other = quantized(layer, scheme), decoded(layer, scheme)
    assert_same(mine(x), other(x))
    assert_same(mine.dequantized(), other.weight.detach())
    q, p = quantkit.quantize(layer.weight.detach().flatten(1), scheme, compute_dtype=torch.float32)
    assert_same(mine.codes, q)
    assert_same(mine.qparams.scale, p.scale)
    state = mine.state_dict()
    assert (state["weight"].dtype, state["weight_scale"].dtype) == (q.dtype, p.scale.dtype)
    assert all(type(t) is torch.Tensor for t in state.values())
    assert not mine.weight.requires_grad and isinstance(mine.weight, nn.Parameter)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(kind, dtype):
    layer, x = made(kind, dtype)
    mine = quantized(layer, "int8_channel")
    assert_same(mine(x), decoded(layer, "int8_channel")(x))
    assert mine.float_layer().weight.dtype == dtype
    assert_same(mine.float_layer()(x), mine(x))


@pytest.mark.parametrize("scheme", ["int8_channel", "int4_group128", "mxfp4", "nvfp4"])
def test_an_embedding_of_no_indices(scheme):
    layer = QuantEmbedding.from_float(torch.nn.Embedding(20, 128), scheme)
    for shape in ((0,), (2, 0)):
        none = torch.empty(shape, dtype=torch.int64)
        assert_same(layer(none), layer.float_layer()(none))


def test_inputs_of_another_dtype_than_the_weights():
    layer, x = made("linear")
    mine, other = quantized(layer, "int4_group128"), decoded(layer, "int4_group128")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert_same(mine(x.to(dtype)), copy.deepcopy(other).to(dtype)(x.to(dtype)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", ["int8_channel", "int8_token", "int8_tensor"])
def test_int8_activations(scheme, dtype):
    for kind in ("linear", "linear without bias"):
        layer, x = made(kind, dtype)
        mine = quantized(layer, scheme, "int8")
        q, p = quantkit.quantize(layer.weight.detach(), scheme)
        assert_same(mine(x), quantkit.linear_w8a8(x, q, p.scale, layer.bias))
        assert_same(mine(x[:0]), x.new_empty(0, 3, len(q)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    for kind in ("linear", "conv"):
        layer, x = made(kind)
        mine, other = quantized(layer, "mxfp8"), decoded(layer, "mxfp8")
        with torch.autocast("cpu", dtype):
            assert mine(x).dtype == dtype
            assert_same(mine(x), other(x))
            assert_same(mine(x.to(torch.bfloat16)), other(x.to(torch.bfloat16)))
    layer, x = made("linear")
    mine = quantized(layer, "int8_channel", "int8")
    expected = mine(x.to(dtype))
    with torch.autocast("cpu", dtype):
        assert_same(mine(x), expected)


def test_gradients_of_inputs_and_bias():
    for kind in ("linear", "conv"):
        layer, x = made(kind)
        mine, other = quantized(layer, "nvfp4"), decoded(layer, "nvfp4")
        grads = []
        for m in (mine, other):
            m.zero_grad()
            y = x.clone().requires_grad_()
            m(y).square().sum().backward()
            grads.append((y.grad, m.bias.grad))
        assert mine.weight.grad is None
        for a, b in zip(*grads, strict=True):
            assert_same(a, b)


def test_int8_activations_have_no_gradient():
    layer, x = made("linear")
    mine = quantized(layer, "int8_channel", "int8")
    with pytest.raises(RuntimeError, match="linear_w8a8: it has no gradient"):
        mine(x.requires_grad_()).sum().backward()
    assert not mine.bias.requires_grad and layer.bias.requires_grad
    assert not mine(x.detach()).requires_grad
    assert mine.float_layer().bias.requires_grad


# ---- as a module ------------------------------------------------------------------------------------

FEW = ["int8_channel", "uint8_token", "int4_group128", "fp8_tensor", "mxfp8", "nvfp4"]
KINDS = ["linear", "embedding", "grouped conv"]


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_meta(layer):
    """Without numbers first."""
    return copy.deepcopy(layer).to("meta").to_empty(device="cpu")


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "half and back": lambda m: copy.deepcopy(m).half().float(),
    "bfloat16 and back": lambda m: copy.deepcopy(m).to(torch.bfloat16).to(torch.float32),
    "double and back": lambda m: copy.deepcopy(m).double().float(),
    "shared memory": lambda m: copy.deepcopy(m).share_memory(),
    "channels_last": lambda m: copy.deepcopy(m).to(memory_format=torch.channels_last),
    "frozen": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", FEW)
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_survives(way, scheme, kind):
    layer, x = made(kind)
    if layer._parameters.get("bias") is not None:
        layer.bias.data = layer.bias.data.bfloat16().float()  # so that no way loses any of it
    mine = quantized(layer, scheme)
    expected, state = mine(x), mine.state_dict()
    other = WAYS[way](mine)
    assert_same(other(x), expected)
    assert repr(other) == repr(mine)
    for name, t in other.state_dict().items():
        if name != "bias":
            assert_same(t, state[name])


@pytest.mark.parametrize("scheme", FEW)
def test_scales_keep_their_dtype(scheme):
    layer, x = made("linear")
    for kind in ("half", "bfloat16", "double"):
        mine = quantized(layer, scheme)
        before = {n: t.clone() for n, t in mine.state_dict().items() if n != "bias"}
        getattr(mine, kind)()
        dtype = mine.bias.dtype
        assert dtype == mine.dtype != torch.float32
        for name, t in before.items():
            assert_same(mine.state_dict()[name], t)
        assert_same(mine(x.to(dtype)), decoded(layer, scheme).to(dtype)(x.to(dtype)))
    embedding, i = made("embedding")
    mine = quantized(embedding, scheme).to(torch.bfloat16)
    assert_same(mine(i), decoded(embedding, scheme).to(torch.bfloat16)(i))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", [*FEW, *SCHEMES[-5:]], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_strictly(kind, scheme, assign, tmp_path):
    from safetensors.torch import load_file, save_file

    layer, x = made(kind)
    mine = quantized(layer, scheme)
    save_file({n: t.contiguous() for n, t in mine.state_dict().items()}, tmp_path / "a")
    torch.save(mine.state_dict(), tmp_path / "b")
    meta = copy.deepcopy(layer).to("meta")
    for state in (load_file(tmp_path / "a"), torch.load(tmp_path / "b", weights_only=True)):
        others = [quantized(meta, scheme)]
        if not assign:
            others[0].to_empty(device="cpu")
            nn.init.ones_(layer.weight)
            others.append(quantized(layer, scheme))
        for other in others:
            result = other.load_state_dict(state, assign=assign)
            assert not result.missing_keys and not result.unexpected_keys
            assert_same(other(x), mine(x))
            assert not other.weight.requires_grad


def test_state_dicts_of_others_are_refused():
    layer, _ = made("linear")
    mine = quantized(layer, "int8_channel")
    before = mine.codes.clone()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="weight: expected int8 of QuantLinear with scheme"):
            mine.load_state_dict(layer.state_dict(), strict=strict)
    state = quantized(layer, "fp8_token").state_dict()
    with pytest.raises(RuntimeError, match=r"expected int8 .* got float8_e4m3fn"):
        mine.load_state_dict(state)
    packed = {**mine.state_dict(), "weight_packed": torch.zeros(6, 25, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match="load_checkpoint_ takes this layout"):
        mine.load_state_dict(packed)
    scale = {**mine.state_dict(), "weight_scale": torch.zeros(6, 1, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="weight_scale: expected float32"):
        mine.load_state_dict(scale)
    assert_same(mine.codes, before)


def test_scales_in_half_precision_and_bytes_load():
    layer, x = made("linear")
    mine = quantized(layer, "int8_channel", "int8")
    state = mine.state_dict()
    state["weight_scale"] = state["weight_scale"].bfloat16()
    for assign in (False, True):
        mine.load_state_dict(state, assign=assign)
        assert_same(mine.weight_scale, state["weight_scale"].float())
        mine(x)
    mine = quantized(layer, "mxfp8")
    state = mine.state_dict()
    expected = mine(x)
    state["weight_scale"] = state["weight_scale"].view(torch.uint8)  # as compressed-tensors has it
    mine.load_state_dict(state)
    assert_same(mine(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", FEW)
def test_on_the_meta_device(kind, scheme):
    layer, x = made(kind)
    mine = quantized(layer, scheme)
    other = quantized(copy.deepcopy(layer).to("meta"), scheme)
    assert all(t.is_meta for t in other.state_dict().values())
    assert other(x.to("meta")).shape == mine(x).shape
    for empty in (other.to_empty(device="cpu"), from_meta(mine)):
        empty.load_state_dict(mine.state_dict())
        assert_same(empty(x), mine(x))


def test_on_the_gpu():
    if not torch.cuda.is_available() or not quantkit.backend().cuda_archs:
        pytest.skip("no GPU")
    for kind in KINDS:
        for scheme in FEW:
            layer, x = made(kind)
            mine = quantized(layer, scheme).cuda()
            assert_same(mine(x.cuda()), decoded(layer, scheme).cuda()(x.cuda()))


# ---- compiled and exported --------------------------------------------------------------------------


def compiled(layer, **options):
    torch.compiler.reset()
    return torch.compile(layer, fullgraph=True, **options)


@pytest.mark.parametrize(
    "scheme", ["int8_channel", "mxfp8", pytest.param("nvfp4", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_give_the_same_bits(kind, scheme):
    layer, x = made(kind)
    mine = quantized(layer, scheme)
    expected = mine(x)
    if isinstance(layer, nn.Conv2d):  # the compiler takes another convolution than eager calls
        expected = compiled(decoded(layer, scheme))(x)
    assert_same(compiled(mine)(x), expected)
    assert_same(compiled(mine, backend="aot_eager")(x), mine(x))


def test_compiled_int8_activations_give_the_same_bits():
    layer, x = made("linear")
    mine = quantized(layer, "int8_channel", "int8")
    run = compiled(mine, dynamic=True)
    for tokens in (2, 1, 0):
        assert_same(run(x[:, :tokens]), mine(x[:, :tokens]))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(compiled(mine)(x), mine(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", FEW)
def test_exported_layers_give_the_same_bits(kind, scheme):
    layer, x = made(kind)
    check_export(quantized(layer, scheme).eval(), x)


def test_exported_int8_activations_give_the_same_bits():
    layer, x = made("linear")
    check_export(quantized(layer, "int8_channel", "int8"), x)


def check_export(mine, x):
    file = io.BytesIO()
    torch.export.save(torch.export.export(mine, (x,)), file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(x), mine(x))


# ---- codes that are there, errors -------------------------------------------------------------------


def test_layers_of_codes_that_are_there():
    layer, x = made("linear")
    q, p = quantkit.quantize(layer.weight.detach(), "uint8_token")
    assert_same(QuantLinear(layer, q, p)(x), decoded(layer, "uint8_token")(x))
    q, p = quantkit.quantize(
        layer.weight.detach().bfloat16(), {"dtype": "int8", "per_channel": True}
    )
    mine = QuantLinear(layer.to("meta"), q, p, "int8", scheme="old")
    assert mine.weight_zero_point is None and mine.weight_scale.dtype == torch.float32
    mine.bias = None
    assert_same(mine(x), quantkit.linear_w8a8(x, q, p.scale.float()))
    with pytest.raises(ValueError, match=r"expected codes of shape \(6, 100\)"):
        QuantLinear(layer, q.t().contiguous(), quantkit.quantize(q.t().float(), "int8_tensor")[1])
    with pytest.raises(ValueError, match="scale"):
        QuantLinear(layer, q, quantkit.quantize(torch.ones(7, 100), "int8_channel")[1])


def norm_embedding():
    return nn.Embedding(4, 8, max_norm=1.0)


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_nan():
    layer = nn.Linear(4, 4)
    layer.weight.data[1, 2] = float("nan")
    return layer


class Other(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("cls", "layer", "scheme", "activations", "error", "message"),
    [
        (QuantLinear, lambda: nn.Linear(4, 4), "int9", None, ValueError, "expected one of int8_tensor"),
        (QuantLinear, lambda: nn.Linear(4, 4), 3, None, TypeError, "expected a str or a mapping"),
        (QuantLinear, lambda: nn.Linear(4, 4), {"bits": 4}, None, TypeError, "bits"),
        (QuantLinear, lambda: nn.Conv2d(1, 1, 1), "mxfp4", None, TypeError, "nn.Linear, got Conv2d"),
        (QuantConv2d, lambda: nn.Linear(4, 4), "mxfp4", None, TypeError, "nn.Conv2d, got Linear"),
        (QuantLinear, lambda: Other(4, 4), "mxfp4", None, TypeError, "nn.Linear, got Other"),
        (QuantLinear, hooked, "mxfp4", None, ValueError, "without hooks, .* got forward_hooks"),
        (QuantLinear, with_nan, "mxfp4", None, ValueError, "weight: expected finite numbers"),
        (QuantLinear, lambda: nn.Linear(5, 4), "mxfp4", None, ValueError, "last size that 2 divides"),
        (QuantLinear, lambda: nn.Linear(4, 0), "int8_channel", None, ValueError,
         r"module: expected a torch.nn.Linear whose weight has elements, got \(0, 4\)"),
        (QuantEmbedding, norm_embedding, "mxfp4", None, ValueError, "max_norm=None, got 1.0"),
        (QuantLinear, lambda: nn.Linear(4, 4), "int8_channel", "int4", ValueError, "None or 'int8'"),
        (QuantLinear, lambda: nn.Linear(4, 4), "mxfp4", "int8", ValueError, "scheme mxfp4, got 'int8'"),
        (QuantLinear, lambda: nn.Linear(4, 4), "uint8_token", "int8", ValueError, "without zero points"),
        (QuantEmbedding, lambda: nn.Embedding(4, 4), "int8_channel", "int8", ValueError,
         "expected None for QuantEmbedding"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(cls, layer, scheme, activations, error, message):
    with pytest.raises(error, match=message):
        cls.from_float(layer(), scheme, activations)


def test_a_scheme_may_be_keywords():
    layer, x = made("linear")
    keywords = {"dtype": "int4", "block_size": [32]}
    mine = QuantLinear.from_float(layer, **keywords)
    assert_same(mine(x), QuantLinear.from_float(layer, keywords)(x))
    assert mine.scheme == str(keywords)
    with pytest.raises(TypeError, match="scheme: expected a scheme or its keywords, got both"):
        QuantLinear.from_float(layer, "mxfp4", dtype="int4")
    with pytest.raises(TypeError, match="scheme: expected a scheme or its keywords, got none"):
        QuantLinear.from_float(layer)


def test_numbers_as_parameters():
    layer, q = nn.Linear(8, 4), torch.arange(-16, 16).view(4, 8).to(torch.int8)
    zero = torch.tensor(3.0)
    mine, same = (
        QuantLinear(layer, q, quantkit.QuantizationParams(*pair, -128, 127))
        for pair in ((0.1, 3.0), (torch.tensor(0.1), zero))
    )
    assert_same(mine.dequantized(), same.dequantized())
    assert_same(mine.dequantized(), (q - zero) * torch.tensor(0.1))
    with pytest.raises(ValueError, match="qparams: expected zero points that are whole numbers"):
        QuantLinear(layer, q, quantkit.QuantizationParams(0.1, 2.5, -128, 127))


def test_codes_that_do_not_fit_are_named():
    layer = nn.Linear(8, 8)
    q, p = quantkit.quantize(layer.weight.detach(), "int8_channel")
    with pytest.raises(TypeError, match=r"qparams: expected a QuantizationParams, got NoneType"):
        QuantLinear(layer, q, None)
    for wrong in (q.float(), q.long(), q.view(torch.uint8)):
        with pytest.raises(TypeError, match=r"q: expected torch.int8 for int8, got torch."):
            QuantLinear(layer, wrong, p)
    with pytest.raises(TypeError, match=r"q: expected a torch.Tensor, got list"):
        QuantLinear(layer, q.tolist(), p)
    zero = torch.ones_like(p.scale)
    for name, t in (
        ("scale", p.scale.flatten()),
        ("scale", p.scale[:0]),
        ("zero_point", zero.flatten()),
        ("global_scale", zero.flatten()),
    ):
        wrong = dataclasses.replace(p, **{"zero_point": zero, "block_size": None, name: t})
        with pytest.raises(ValueError, match=rf"^{name}: expected one number, .*got shape \("):
            QuantLinear(layer, q, wrong)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_inputs_that_do_not_fit_are_named(activations):
    layer = quantized(nn.Linear(8, 4), "int8_channel", activations)
    for x, got in ((torch.ones(2, 8, dtype=torch.int32), "torch.int32"), ([1.0], "list")):
        with pytest.raises(TypeError, match=f"x: expected a tensor of floats, got {got}"):
            layer(x)
    if activations:
        for shape in ((2, 5), ()):
            with pytest.raises(ValueError, match=r"x: expected a last size of 8, got shape"):
                layer(torch.ones(shape))


def test_type_is_an_error_and_changes_nothing():
    layer = quantized(nn.Linear(8, 4), "int8_channel")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match=r"expected .to\(dtype\)"):
        layer.type(torch.float16)
    for name, t in layer.state_dict().items():
        assert_same(t, before[name])


def test_reprs_tell_scheme_and_sizes():
    mine = quantized(nn.Linear(256, 64), "int8_channel", "int8")
    assert repr(mine) == (
        "QuantLinear(in_features=256, out_features=64, bias=True, scheme=int8_channel, bits=8.12, "
        "activations=int8)"
    )
    mine = quantized(nn.Embedding(10, 128, padding_idx=3), {"dtype": "int4", "block_size": [64]})
    assert repr(mine) == (
        "QuantEmbedding(num_embeddings=10, embedding_dim=128, padding_idx=3, "
        "scheme={'dtype': 'int4', 'block_size': [64]}, bits=4.50)"
    )
    assert "groups=2" in repr(quantized(made("grouped conv")[0], "nvfp4"))


def test_the_package_is_imported_when_it_is_asked_for():
    program = (
        "import sys, quantkit\n"
        "assert not any(n.startswith(('quantkit.nn', 'quantkit.checkpoint')) for n in sys.modules)\n"
        "assert quantkit.quantize_model_ is quantkit.nn.quantize_model_\n"
        "from quantkit import *\n"
        "assert dequantize_model_ and 'quantize_model_' in dir(quantkit)\n"
        "try: quantkit.nothing\n"
        "except AttributeError as e: assert str(e) == \"module 'quantkit' has no attribute 'nothing'\"\n"
        "else: raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
