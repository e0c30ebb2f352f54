"""transformers loads what quantkit writes: equal weights, equal outputs, and where not, why."""

import functools

import pytest
import safetensors.torch
import torch
from lib.checkpoints import ALL
from lib.loaders import RESULTS, Result, llama, write

import quantkit
from quantkit.checkpoint.layouts import SCHEMES

transformers = pytest.importorskip("transformers", reason="make loaders-test")
pytest.importorskip("compressed_tensors", reason="make loaders-test")

MODES = ("compressed", "dequantize")
IDS = torch.arange(3, 35).view(2, 16)
RULES = {"w4": ["*.q_proj", "*.query"], "w8a8": ["*.k_proj", "*.dense"], "w8": ["*.down_proj"]}
# transformers holds int zero points of pack-quantized in another shape than its file has.
UNREADABLE = "ignore_mismatched_sizes"


def load(folder, mode="compressed", dtype="auto"):
    """The model, and nothing missing or unexpected in its files."""
    given = {}
    if mode == "dequantize":
        method = transformers.AutoConfig.from_pretrained(folder).quantization_config["quant_method"]
        fp8, others = transformers.FineGrainedFP8Config, transformers.CompressedTensorsConfig
        given["quantization_config"] = (fp8 if method == "fp8" else others)(dequantize=True)
    model, info = class_of(folder).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **given
    )
    assert not any(v for k, v in info.items() if k != "error_msgs"), info
    return model.eval()


def class_of(folder):
    is_llama = transformers.AutoConfig.from_pretrained(folder).model_type == "llama"
    return transformers.AutoModelForCausalLM if is_llama else transformers.AutoModel


def holding(source, weights, dtype="auto"):
    """The model of the source with these weights."""
    model = class_of(source).from_pretrained(source, dtype=dtype).eval()
    for name, weight in weights.items():
        parameter = model.get_submodule(name).weight
        parameter.data = weight.to(parameter.dtype)
    return model


def quantizing_inputs(model, names, quantize):
    """Layers of these names quantize and dequantize what comes in."""
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args: (quantize(args[0]),))
    return model


def of_compressed_tensors(scheme):
    """Inputs quantized as compressed-tensors' layers do it."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from quantkit.checkpoint.config_json import quantization_config

    group = quantization_config({"a.weight": scheme})["config_groups"]["group_0"]
    args = QuantizationArgs(**group["input_activations"])

    def quantize(x):
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
        return fake_quantize(x, scale, zero, args)

    return quantize


def compare(model, reference, weights):
    """Every weight and the outputs, bit for bit, in the model's dtype."""
    output, expected = model(IDS)[0], reference(IDS)[0]  # first: it decompresses
    assert len(weights) > 10
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name
    assert output.dtype == expected.dtype and torch.equal(output, expected)


@pytest.fixture(params=("minilm", "small_llama"))
def source(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Quantized once for both modes."""

    @functools.cache
    def write_once(source, scheme):
        folder = tmp_path_factory.mktemp("made") / "q"
        return folder, write(source, folder, scheme)

    return write_once


def said(mode, source, scheme, result):
    model = "MiniLM float32" if source.name == "model" else "Llama bfloat16"
    RESULTS.append(Result(f"transformers, {mode}", model, scheme, result))


THEIRS = [name for name in ALL if not name.startswith("own")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", THEIRS)
def test_weights_and_outputs_are_equal(name, mode, source, made):
    scheme = ALL[name]
    folder, weights = made(source, scheme)
    compressed = mode == "compressed" and scheme.layout != "deepseek"
    if compressed and scheme.layout == "pack-quantized" and not scheme.symmetric:
        with pytest.raises(RuntimeError, match=UNREADABLE):
            load(folder, mode)
        said(mode, source, name, "does not load: it expects zero points that are not packed")
        return
    coded = scheme.scale in ("e8m0", "e4m3")
    dtype = "auto"
    if compressed and coded and source.name == "model":
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            load(folder, mode)(IDS)
        said(mode, source, name, "loads, and does not run: weights become bfloat16")
        dtype = torch.bfloat16
    weights = {n: w.to(dtype) if dtype != "auto" else w for n, w in weights.items()}
    model, reference = load(folder, mode, dtype), holding(source, weights, dtype)
    result = "weights and outputs equal"
    if compressed and scheme.activations:
        quantizing_inputs(reference, weights, of_compressed_tensors(scheme))
        result += ", inputs quantized"
    compare(model, reference, weights)
    said(mode, source, name, result + (", dtype=bfloat16" if dtype != "auto" else ""))


def test_another_dtype_rounds_the_scales(minilm, tmp_path):
    """dtype=bfloat16 for float32 files: compressed layers round scales first, and weights after that."""
    weights = write(minilm, tmp_path / "q", ALL["w8 weights alone"])
    tensors = safetensors.torch.load_file(tmp_path / "q" / "model.safetensors")
    model = load(tmp_path / "q", dtype=torch.bfloat16)
    model(IDS)
    for name, weight in weights.items():
        codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        got = model.get_submodule(name).weight
        assert torch.equal(got, codes.bfloat16() * scale.bfloat16())
        assert not torch.equal(got, weight.bfloat16())
    said("compressed", minilm, "w8, dtype=bfloat16", "weights differ: it rounds the scales")
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    dequantized = load(tmp_path / "q", "dequantize", torch.bfloat16)
    compare(dequantized, holding(minilm, weights, torch.bfloat16), weights)
    said("dequantize", minilm, "w8, dtype=bfloat16", "weights and outputs equal")


def test_inputs_of_w8a8_are_quantized_as_quantkit_would(minilm, tmp_path):
    weights = write(minilm, tmp_path / "q", SCHEMES["w8a8"])

    def quantize(x):
        blocks = [1] * (x.dim() - 1) + [-1]
        p = quantkit.get_symmetric_qparams(x, block_size=blocks, scale_rule="half_range")
        return quantkit.fake_quantize(x, p)

    reference = quantizing_inputs(holding(minilm, weights), weights, quantize)
    compare(load(tmp_path / "q"), reference, weights)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["w8a8", "w8"])
def test_embeddings(name, mode, minilm, tmp_path):
    weights = write(minilm, tmp_path / "q", ALL[name], include=["*_embeddings.weight"])
    assert sum("embeddings" in name for name in weights) == 3
    if (name, mode) == ("w8", "compressed"):
        with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'weight'"):
            load(tmp_path / "q", mode)
        said(mode, minilm, f"{name}, embeddings too", "does not load: it looks for 'weight'")
        return
    reference = holding(minilm, weights)
    if mode == "compressed" and ALL[name].activations:
        layers = [name for name in weights if "embeddings" not in name]
        quantizing_inputs(reference, layers, of_compressed_tensors(ALL[name]))
    compare(load(tmp_path / "q", mode), reference, weights)
    said(mode, minilm, f"{name}, embeddings too", "weights and outputs equal")


def test_tied_heads_need_no_scales(tmp_path):
    source = llama(tmp_path / "tied", tie_word_embeddings=True)
    weights = write(source, tmp_path / "q", SCHEMES["w4"])
    for mode in MODES:
        compare(load(tmp_path / "q", mode), holding(source, weights), weights)


def test_several_schemes(source, tmp_path):
    """One by one they load; dequantize=True takes the first group's scheme for all layers."""

    is_llama = source.name != "model"
    rules = [
        {"match": [p for p in patterns if ("proj" in p) == is_llama], "scheme": scheme}
        for scheme, patterns in RULES.items()
    ]
    rules = [rule for rule in rules if rule["match"]]
    rules.append({"match": "*", "skip": True})
    weights = write(source, tmp_path / "q", config={"rule": rules})
    config = transformers.AutoConfig.from_pretrained(tmp_path / "q").quantization_config
    assert len(config["config_groups"]) > 1
    reference = holding(source, weights)
    inputs = [n for n in weights if n.endswith((".k_proj", ".dense"))]
    quantizing_inputs(reference, inputs, of_compressed_tensors(SCHEMES["w8a8"]))
    model = load(tmp_path / "q")
    output, expected = model(IDS)[0], reference(IDS)[0]
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name
    assert torch.equal(output, expected)
    said("compressed", source, "several", "weights and outputs equal, inputs quantized")
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        load(tmp_path / "q", "dequantize")
    said("dequantize", source, "several", "does not load: it decodes all layers by one scheme")


# ---- DeepSeek's layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_short_blocks_that_do_not_divide_are_an_error(mode, tmp_path):
    """320 rows have 3 rows of scales: transformers, on the CPU, wants equal blocks."""
    source = llama(tmp_path / "llama", intermediate_size=320)
    write(source, tmp_path / "q", SCHEMES["fp8_block"])
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        load(tmp_path / "q", mode)
    said(mode, source, "fp8_block, 320 rows", "does not load: it wants equal blocks")


def test_short_blocks_that_divide_are_misread(tmp_path):
    """192 rows have 2 rows of scales, of 128 and of 64 rows: transformers takes two blocks of 96."""
    source = llama(tmp_path / "llama", intermediate_size=192)
    weights = write(source, tmp_path / "q", SCHEMES["fp8_block"])
    model = load(tmp_path / "q")
    for name, weight in weights.items():
        got = model.get_submodule(name).weight
        equal = [torch.equal(g, w) for g, w in zip(got, weight, strict=True)]
        if "gate_proj" in name or "up_proj" in name:
            assert all(equal[:96] + equal[128:]) and not all(equal[96:128])
        elif "down_proj" in name:
            assert torch.equal(got[:, :96], weight[:, :96])
            assert torch.equal(got[:, 128:], weight[:, 128:]) and not torch.equal(got, weight)
        else:
            assert all(equal), name
    said("compressed", source, "fp8_block, 192 rows", "misread: two blocks of 96 for 128 and 64")


# ---- quantkit's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own w8a8", "own nvfp4"])
def test_quantkits_own_layout_is_refused(name, small_llama, tmp_path):
    write(small_llama, tmp_path / "q", ALL[name])
    with pytest.raises(ValueError, match="has no `quant_method` attribute"):
        load(tmp_path / "q")
    said("compressed", small_llama, name, "refused: no quant_method")
