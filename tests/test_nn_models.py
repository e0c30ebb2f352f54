"""quantkit.nn: whole models, in place and back, and the checkpoints of the command in them."""

import copy

import pytest
import torch
from lib.cases import assert_same
from torch import nn

import quantkit
from quantkit import checkpoint
from quantkit.nn import (
    QuantConv2d,
    QuantEmbedding,
    QuantizedLayer,
    QuantLinear,
    load_checkpoint_,
)


class Model(nn.Module):
    """Layers of every class, a head that is tied to an embedding, a layer in two places."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(32, 256)
        self.kinds = nn.Embedding(3, 256)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(256, 64), "down": nn.Linear(64, 256, bias=False)})
            for _ in range(2)
        )
        self.again = self.blocks[1]["up"]
        self.norm = nn.LayerNorm(256)
        self.conv = nn.Conv2d(1, 2, 3)
        self.lm_head = nn.Linear(256, 32, bias=False)
        self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, i):
        h = self.embed(i) + self.kinds(i % 3)
        for block in self.blocks:
            h = self.norm(h + block["down"](block["up"](h).relu()))
        return self.lm_head(h + self.again(h).mean() + self.conv(h[:, None]).mean())


INPUT = torch.tensor([[1, 2, 3, 5], [31, 0, 4, 4]])
BLOCKS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
USUAL = {*BLOCKS, "again", "kinds", "conv"}


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return Model(dtype)


def of_class(m, cls):
    return {n for n, layer in m.named_modules(remove_duplicate=False) if type(layer) is cls}


def test_layers_are_replaced_and_come_back():
    m, before = model(), model()
    done = quantkit.quantize_model_(m, "int8_channel")
    assert set(done) == USUAL
    assert all(m.get_submodule(name) is layer for name, layer in done.items())
    assert m.again is m.blocks[1]["up"] and m.lm_head.weight is m.embed.weight
    assert of_class(m, QuantLinear) == {*BLOCKS, "again"}
    assert of_class(m, QuantEmbedding) == {"kinds"} and of_class(m, QuantConv2d) == {"conv"}
    expected = m(INPUT)
    back = quantkit.dequantize_model_(m)
    assert set(back) == USUAL and not of_class(m, QuantLinear)
    assert m.again is m.blocks[1]["up"]
    assert_same(m(INPUT), expected)
    for name in ("conv", "blocks.0.up"):
        weight = before.get_submodule(name).weight.detach()
        q, p = quantkit.quantize(weight.flatten(1), "int8_channel")
        restored = m.get_submodule(name).weight
        assert_same(restored.detach(), quantkit.dequantize(q, p).view_as(weight))
        assert restored.requires_grad
    assert set(m.state_dict()) == set(before.state_dict())


def test_the_bias_and_the_mode_stay():
    m = model().eval()
    bias = m.blocks[0]["up"].bias
    quantkit.quantize_model_(m)
    assert m.blocks[0]["up"].bias is bias and not m.blocks[0]["up"].training
    quantkit.dequantize_model_(m)
    assert m.blocks[0]["up"].bias is bias and not m.blocks[0]["up"].training


def test_include_and_exclude():
    m = model()
    more = {"include": ["embed", "lm_head.weight"], "exclude": ["re:blocks[.]1", "again"]}
    done = quantkit.quantize_model_(m, "mxfp8", **more)
    assert set(done) == {"embed", "lm_head", "blocks.0.up", "blocks.0.down", "kinds", "conv"}
    assert type(m.again) is nn.Linear
    assert_same(m(INPUT).isfinite().all(), torch.tensor(True))


def test_rules():
    m = model()
    rules = [
        ("*.0.down", None),
        ("*down", "int4_group128"),
        ["re:.*up", {"dtype": "uint4", "sym": False}],
    ]
    done = quantkit.quantize_model_(m, rules)
    schemes = {name: layer.scheme for name, layer in done.items()}
    assert schemes == {
        "again": "{'dtype': 'uint4', 'sym': False}",  # a second name of blocks.1.up
        "blocks.1.down": "int4_group128",
        "blocks.0.up": "{'dtype': 'uint4', 'sym': False}",
        "blocks.1.up": "{'dtype': 'uint4', 'sym': False}",
    }
    assert m.again is m.blocks[1]["up"]
    more = quantkit.quantize_model_(m, "int8_channel", activations="int8", exclude=["*.0.down"])
    assert set(more) == {"kinds", "conv"}


def test_int8_activations_are_of_linear_layers():
    m = model()
    done = quantkit.quantize_model_(m, activations="int8")
    kinds = {name: layer.activations for name, layer in done.items()}
    assert kinds == {**dict.fromkeys([*BLOCKS, "again"], "int8"), "conv": None, "kinds": None}
    layer, x = m.blocks[0]["up"], torch.randn(3, 256)
    y = quantkit.linear_w8a8(x, layer.weight, layer.weight_scale, layer.bias)
    assert_same(layer(x), y)


def hooked(m):
    m.blocks[1]["down"].register_forward_pre_hook(lambda *_: None)


def replaced(m):
    m.conv.forward = lambda x: x


def infinite(m):
    m.conv.weight.data[0, 0, 1, 1] = float("inf")


@pytest.mark.parametrize(
    ("scheme", "options", "change", "error", "message"),
    [
        ("int9", {}, None, ValueError, "scheme: expected one of int8_tensor"),
        (3, {}, None, TypeError, "scheme"),
        ([("*", "int9")], {}, None, ValueError, "scheme: expected one of int8_tensor"),
        (["int8_channel"], {}, None, TypeError, "scheme: expected pairs of a pattern and a scheme"),
        ("int8_channel", {"include": ["nobody*"]}, None, ValueError, r"pattern 'nobody\*': matches no"),
        ("int8_channel", {"exclude": ["norm"]}, None, ValueError, "pattern 'norm': matches no layer"),
        ([("norm", "mxfp8")], {}, None, ValueError, "pattern 'norm': matches no layer"),
        ("int8_channel", {"exclude": "conv"}, None, TypeError, "exclude: expected a list of patterns"),
        ("int8_channel", {"exclude": ["re:("]}, None, ValueError, r"pattern 're:\('"),
        ([("*", "mxfp8")], {"include": ["conv"]}, None, ValueError, "include: expected no patterns"),
        ("int4_group128", {}, None, ValueError, r"^conv \(Conv2d\): .*last size that 2 divides"),
        ("mxfp8", {"activations": "int8"}, None, ValueError, r"^blocks.0.up \(Linear\): activations"),
        ("int8_channel", {"activations": "int4"}, None, ValueError, "None or 'int8', got 'int4'"),
        ("int8_channel", {"exclude": None}, None, TypeError, "exclude: expected a list of patterns"),
        ("int8_channel", {"include": [1]}, None, TypeError, "include: expected .*, got 1 among them"),
        ("int8_channel", {}, replaced, ValueError, r"^conv \(Conv2d\): .*without a forward of its own"),
        ("int8_channel", {}, hooked, ValueError, r"^blocks.1.down \(Linear\): .*without hooks"),
        ("int8_channel", {}, infinite, ValueError, r"^conv \(Conv2d\): weight: expected finite"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_changes(scheme, options, change, error, message):
    m = model()
    if change is not None:
        change(m)
    with pytest.raises(error, match=message):
        quantkit.quantize_model_(m, scheme, **options)
    assert not any(isinstance(layer, QuantizedLayer) for layer in m.modules())


def test_activations_are_checked_where_no_layer_has_them():
    with pytest.raises(ValueError, match="activations: expected None or 'int8', got 'banana'"):
        quantkit.quantize_model_(nn.Sequential(nn.Conv2d(1, 1, 1)), activations="banana")


def test_a_layer_by_itself_is_no_model():
    with pytest.raises(ValueError, match="got Linear; QuantLinear"):
        quantkit.quantize_model_(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="float_layer"):
        quantkit.dequantize_model_(QuantLinear.from_float(nn.Linear(4, 4), "fp8_tensor"))
    with pytest.raises(TypeError, match=r"model: expected a .*Module, got int"):
        quantkit.quantize_model_(3)


def test_torchs_own_transformer_takes_the_layers():
    """Its fast path would read weights itself, codes for numbers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, other = torch.randn(2, 3, 16), copy.deepcopy(encoder)
    done = quantkit.quantize_model_(encoder, "int8_channel")
    assert set(done) == {f"layers.{i}.linear{n}" for i in (0, 1) for n in (1, 2)}
    for name, made in done.items():
        other.get_submodule(name).weight.data = made.dequantized()
    for part in other.layers:
        part.activation_relu_or_gelu = 0  # torch's way to say that there is none
    with torch.no_grad():
        assert_same(encoder(x), other(x))


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_own_transformer_masks_padding(activations):
    """Its encoder would give layers nested tensors; the switches come back with the float layers."""
    torch.manual_seed(0)
    m = nn.Transformer(16, 2, 2, 1, 32, batch_first=True).eval()
    x, mask = torch.randn(2, 3, 16), torch.tensor([[False] * 3, [False, True, True]])
    names = "activation_relu_or_gelu", "use_nested_tensor"

    def switches():
        return [vars(part)[n] for part in m.modules() for n in names if n in vars(part)]

    before = switches()
    quantkit.quantize_model_(m, activations=activations)
    assert not any(switches())
    other = copy.deepcopy(m)
    with torch.no_grad():
        y = m(x, x, src_key_padding_mask=mask, memory_key_padding_mask=mask)
        assert_same(other(x, x, None, None, None, mask, None, mask), y)
    quantkit.dequantize_model_(other)
    quantkit.dequantize_model_(m)
    assert switches() == before == [1, 1, True]
    with torch.no_grad():
        y = m(x, x, src_key_padding_mask=mask, memory_key_padding_mask=mask)
    assert y.shape == x.shape


def test_torchs_own_transformer_takes_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    torch.save(nn.ModuleDict({"a": layer}).state_dict(), tmp_path / "model.pt")
    checkpoint.quantize(tmp_path / "model.pt", tmp_path / "out", "w8a8", exclude=["*out_proj"])
    m = nn.ModuleDict({"a": copy.deepcopy(layer)})
    assert set(load_checkpoint_(m, tmp_path / "out")) == {"a.linear1", "a.linear2"}
    layer.activation_relu_or_gelu = 0
    for name in ("linear1", "linear2"):
        layer.get_submodule(name).weight.data = m["a"].get_submodule(name).dequantized()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        assert_same(m["a"](x), layer(x))


# ---- checkpoints ------------------------------------------------------------------------------------


def source(folder, dtype):
    """A file of a model, as transformers writes it: a tied weight once."""
    from safetensors.torch import save_file

    state = model(dtype).state_dict()
    for name in ("lm_head.weight", "again.weight", "again.bias"):
        del state[name]
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def expected_of(path, dtype):
    m = model(dtype)
    with checkpoint.Checkpoint(path) as there:
        for name in there:
            value = there[name]
            if isinstance(value, tuple):
                value = quantkit.dequantize(*value, output_dtype=dtype)
            m.get_parameter(name).data.copy_(value)
        return m(INPUT), {name.removesuffix(".weight") for name in there.weights}


def zeroed(m):
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
    return m


def on_meta(dtype):
    with torch.device("meta"):
        return Model(dtype)


def prepared(m, *arguments, **options):
    quantkit.quantize_model_(m, *arguments, **options)
    return m


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", [*checkpoint.SCHEMES, "asymmetric", "own"])
def test_a_checkpoint_of_the_command_loads(scheme, dtype, tmp_path):
    given = {
        "asymmetric": {"base": "w4", "block": [1, 64], "symmetric": False},
        "own": {"base": "nvfp4", "layout": "quantkit"},
    }.get(scheme, scheme)
    checkpoint.quantize(source(tmp_path, dtype), tmp_path / "out", given)
    expected, names = expected_of(tmp_path / "out", dtype)
    for m in (
        zeroed(prepared(model(dtype))),
        prepared(on_meta(dtype), [("blocks.*", "fp8_token")]),
        zeroed(model(dtype)),
        on_meta(dtype),
    ):
        done = load_checkpoint_(m, tmp_path / "out")
        assert set(done) == names >= {"blocks.0.up", "kinds"}
        assert_same(m(INPUT), expected)
        assert m.again is m.blocks[1]["up"] and m.lm_head.weight is m.embed.weight
        # And the same once more, by torch's own call.
        other = zeroed(copy.deepcopy(m))
        other.load_state_dict(m.state_dict())
        assert_same(other(INPUT), expected)


def test_activations_of_a_checkpoint(tmp_path):
    checkpoint.quantize(source(tmp_path, torch.float32), tmp_path / "out", "w8a8")
    one, two = prepared(model(), activations="int8"), on_meta(torch.float32)
    load_checkpoint_(one, tmp_path / "out")
    load_checkpoint_(two, tmp_path / "out", activations="int8")
    assert one.again.activations == two.again.activations == "int8"
    assert one.kinds.activations is None
    assert_same(one(INPUT), two(INPUT))
    assert type(two.conv) is nn.Conv2d
    checkpoint.quantize(source(tmp_path, torch.float32), tmp_path / "w4", "w4")
    load_checkpoint_(one, tmp_path / "w4", activations="int8")
    assert one.again.activations is None and one.again.scheme == "w4"


def test_int_quantized_files_load_by_torchs_own_call(tmp_path):
    from safetensors.torch import load_file

    checkpoint.quantize(source(tmp_path, torch.float32), tmp_path / "out", "w8a8")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    m = prepared(model(), exclude=["conv"])
    result = m.load_state_dict(load_file(file), strict=False)
    assert {n.partition(".")[0] for n in result.missing_keys} == {"again", "lm_head"}
    assert not result.unexpected_keys
    assert_same(m(INPUT), expected_of(tmp_path / "out", torch.float32)[0])


def test_what_does_not_fit_a_checkpoint_is_named(tmp_path):
    checkpoint.quantize(source(tmp_path, torch.float32), tmp_path / "out", "w8a8")
    more = model()
    more.extra = nn.Linear(2, 2)
    del more.norm
    before = more.state_dict()
    with pytest.raises(
        RuntimeError, match=r"missing extra.bias, .*unexpected norm.bias, norm.weight"
    ):
        load_checkpoint_(more, tmp_path / "out")
    for name, t in more.state_dict().items():
        assert_same(t, before[name])
    load_checkpoint_(more, tmp_path / "out", strict=False)
    assert type(more.again) is QuantLinear
    wrong = model()
    wrong.blocks[0]["up"] = nn.Bilinear(2, 2, 3)
    with pytest.raises(ValueError, match=r"blocks.0.up: expected Linear, Embedding or Conv2d"):
        load_checkpoint_(wrong, tmp_path / "out", strict=False)
    wrong.blocks[0]["up"] = nn.Linear(5, 5)
    with pytest.raises(
        ValueError,
        match=r"blocks.0.up \(Linear\): weight: expected shape \(5, 5\), got \(64, 256\)",
    ):
        load_checkpoint_(wrong, tmp_path / "out")
    assert not any(isinstance(layer, QuantizedLayer) for layer in wrong.modules())
    wrong = model()
    wrong.norm = nn.LayerNorm(5)
    with pytest.raises(ValueError, match=r"norm \(LayerNorm\): bias: expected shape \(5,\)"):
        load_checkpoint_(wrong, tmp_path / "out")
    assert not any(isinstance(layer, QuantizedLayer) for layer in wrong.modules())
    with pytest.raises(checkpoint.CheckpointError):
        load_checkpoint_(model(), tmp_path / "nowhere")
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        load_checkpoint_({}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"activations: expected None or 'int8', got 'banana'"):
        load_checkpoint_(model(), tmp_path / "out", activations="banana")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_stay_tied_where_a_file_names_both(device, tmp_path):
    torch.save(model().state_dict(), tmp_path / "model.pt")
    checkpoint.quantize(tmp_path / "model.pt", tmp_path / "out", "w8a8")
    with torch.device(device):
        m = Model()
    load_checkpoint_(m, tmp_path / "out")
    assert m.lm_head.weight is m.embed.weight
    assert_same(m.embed.weight.detach(), model().embed.weight.detach())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_tied_to_codes_get_the_decoded_weight(device, tmp_path):
    """Where the file has nothing for them."""
    state = model().state_dict()
    del state["lm_head.weight"]
    torch.save(state, tmp_path / "model.pt")
    checkpoint.quantize(tmp_path / "model.pt", tmp_path / "out", "w8a8", include=["embed"])
    with torch.device(device):
        m = Model()
        m.also = nn.Linear(256, 32, bias=False)
    m.also.weight = m.embed.weight
    load_checkpoint_(m, tmp_path / "out")
    assert type(m.embed) is QuantEmbedding and type(m.lm_head) is nn.Linear
    assert m.lm_head.weight is m.also.weight and m.lm_head.weight.requires_grad
    assert_same(m.lm_head.weight.detach(), m.embed.dequantized())


@pytest.mark.parametrize(("codes", "floats"), [("embed", "lm_head"), ("lm_head", "embed")])
def test_tied_layers_get_floats_where_a_file_has_them(codes, floats, tmp_path):
    torch.save(model().state_dict(), tmp_path / "model.pt")
    checkpoint.quantize(tmp_path / "model.pt", tmp_path / "out", "w8a8", include=[codes])
    m = zeroed(model())
    m.also = nn.Linear(256, 32, bias=False)
    m.also.weight = m.embed.weight
    load_checkpoint_(m, tmp_path / "out")
    assert isinstance(m.get_submodule(codes), QuantizedLayer)
    assert m.also.weight is m.get_submodule(floats).weight
    assert_same(m.also.weight.detach(), model().embed.weight.detach())


def test_what_is_tied_to_codes_of_another_layer_is_missing(tmp_path):
    checkpoint.quantize(source(tmp_path, torch.float32), tmp_path / "out", "w8a8", include=["emb*"])
    m = prepared(model(), include=["embed"])
    m.lm_head.weight = m.embed.weight
    with pytest.raises(RuntimeError, match=r"missing lm_head.weight; unexpected none"):
        load_checkpoint_(m, tmp_path / "out")
