"""explain: each convention, computed here by hand, is found first."""

import pytest
import torch
from lib.rivals import chosen, given

import quantkit
from quantkit import QuantizationParams, reference
from quantkit.formats import OF_NAME

pytestmark = pytest.mark.fallback
INT8 = (-128, 127)
ROWS = 64


def integers(x_dtype=torch.float32, nan=False):
    g = given(x_dtype, *INT8, nan=nan, rows=ROWS)
    return g, QuantizationParams(g.scale, g.zero_point, *INT8, dtype=torch.int8)


def codes(v):
    v = v.round().clamp(*INT8)
    return torch.where(v.isnan(), 0.0, v).to(torch.int8)


OURS = "quantkit, as called"


def first(found):
    """The conventions that give all codes, beside quantkit itself."""
    return [name for name, differing, _ in found.ranking if differing == 0 and name != OURS]


BY_HAND = {
    "x / scale + zero_point, rounded": lambda x, s, z: x / s + z,
    "round(x / scale) + zero_point": lambda x, s, z: (x / s).round() + z,
    "round(x * (1 / scale)) + zero_point": lambda x, s, z: (x * (1 / s)).round() + z,
    "x * (1 / scale) + zero_point, rounded": lambda x, s, z: x * (1 / s) + z,
    "fma(x, 1 / scale, zero_point), rounded": lambda x, s, z: (
        x.double() * (1 / s).double() + z
    ).float(),
    "round half away from zero": lambda x, s, z: (x / s).sign() * ((x / s).abs() + 0.5).floor() + z,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_conventions_of_integers(name):
    g, p = integers()
    x = g.x.clamp(-1e6, 1e6)
    found = quantkit.explain(codes(BY_HAND[name](x, g.scale, g.zero_point)), x, p)
    assert first(found) == [name]
    assert found.ranking == tuple(sorted(found.ranking, key=lambda entry: entry[1]))
    assert {total for _, _, total in found.ranking} == {x.numel()}
    lines = str(found).splitlines()
    assert lines[0] == f"All {x.numel():,} codes are those of"
    assert any(line.startswith(f"  {name}") for line in lines[1:3])


def test_quantkits_own_codes_and_calls():
    g, p = integers()
    found = quantkit.explain(quantkit.quantize_tensor(g.x, p), g.x, p)
    assert first(found) == ["x / scale + zero_point, rounded"]
    assert found.ranking[0] == (OURS, 0, g.x.numel())
    assert "[compressed-tensors; quantkit: compute_dtype=torch.float32]" in str(found)
    p.round_first = True
    found = quantkit.explain(quantkit.quantize_tensor(g.x, p), g.x, p)
    assert first(found) == ["round(x / scale) + zero_point"]
    assert "[ONNX, vLLM, AWQ; quantkit: round_first=True]" in str(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
@pytest.mark.parametrize("scale", [0.037, torch.tensor(0.037)])
def test_quantkits_own_codes_by_steps_of_any_dtype(scale, dtype):
    g, _ = integers()
    x = g.x.clamp(-300, 300).to(dtype)
    if dtype == torch.float64:  # ties but for the last bit
        x = ((torch.arange(x.numel()) % 200 - 100.5) * float(scale)).view(x.shape)
        x = x.double() * (1 + 2.0**-52)
    p = QuantizationParams(scale, 0.0, *INT8)
    found = quantkit.explain(quantkit.quantize_tensor(x, p), x, p)
    assert found.ranking[0] == (OURS, 0, x.numel())
    text = f"All {x.numel():,} codes are those of\n  {OURS} [quantize_tensor(x, qparams)]"
    assert str(found).startswith(text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_in_half_precision(dtype):
    g, _ = integers(dtype)
    x = g.x.clamp(-1000, 1000)
    p = QuantizationParams(g.scale.to(dtype), g.zero_point.to(dtype), *INT8)
    found = quantkit.explain(quantkit.quantize_tensor(x, p), x, p)
    assert first(found) == ["x / scale + zero_point, rounded in x's dtype"]
    found = quantkit.explain(codes((x * (1 / p.scale)).round() + p.zero_point), x, p)
    assert first(found) == ["round(x * (1 / scale)) + zero_point in x's dtype"]


@pytest.mark.parametrize("scheme, options", [("int8_token", {}), ("int4_group128", {})])
def test_scales_of_half_the_range(scheme, options):
    x = chosen(torch.float32, 7.5, 128)[:ROWS]
    _, p = quantkit.quantize(x, scheme)
    q, _ = quantkit.quantize(x, scheme, scale_rule="half_range")
    found = quantkit.explain(q, x, p)
    assert first(found)[0] == "x / scale + zero_point, rounded, scale of half the range"
    assert 'scale_rule="half_range"' in str(found)
    whole = QuantizationParams(
        p.scale, 0.0, p.q_min, p.q_max, dtype=p.dtype
    )  # shapes say the blocks
    assert quantkit.explain(q, x, whole).ranking == found.ranking


def test_the_limit_over_the_largest():
    x = chosen(torch.float32, 127.0)[:ROWS]
    _, p = quantkit.quantize(x, "int8_token")
    found = quantkit.explain(codes(x * (127 / x.abs().amax(1, True))), x, p)
    assert first(found) == ["x * (q_max / max abs x)"]


def test_codes_of_nan():
    g, p = integers(nan=True)
    q = quantkit.quantize_tensor(g.x, p)
    assert first(quantkit.explain(q, g.x, p)) == ["x / scale + zero_point, rounded"]
    for name, code in (("q_min", -128), ("q_max", 127)):
        found = quantkit.explain(torch.where(g.x.isnan(), code, q).to(torch.int8), g.x, p)
        assert first(found) == [f"x / scale + zero_point, rounded, NaN becomes {name}"]
        call = "[quantkit: compute_dtype=torch.float32, but NaN becomes 0]"
        assert f"NaN becomes {name} {call}" in str(found)
    p.round_first = True
    q = quantkit.quantize_tensor(g.x, p)
    found = quantkit.explain(torch.where(g.x.isnan(), -128, q).to(torch.int8), g.x, p)
    name = "round(x / scale) + zero_point, NaN becomes q_min"
    assert first(found) == [name]
    note = "[ONNX Runtime on x86; quantkit: round_first=True, but NaN becomes 0]"
    assert f"  {name} {note}\n" in str(found)


FLOAT8 = {"float8_e4m3fn": (448, 464), "float8_e5m2": (57344, 61440)}


@pytest.mark.parametrize("name", FLOAT8)
def test_float8(name):
    f = OF_NAME[name]
    largest, edge = FLOAT8[name]
    edges = [edge, -edge, edge * (1 - 2**-20), edge * (1 + 2**-20), 1e30, torch.inf, torch.nan]
    g = given(torch.float32, -largest, largest, zero_points=False, rows=ROWS)
    x = g.x.clone()
    x[0, 10:17] = torch.tensor(edges)
    x[1, 10] = -torch.tensor(torch.nan)
    scale = g.scale.clone()
    scale[0] = 1.0
    p = QuantizationParams(scale, 0.0, -largest, largest, dtype=f.dtype)
    q = quantkit.quantize_tensor(x, p)
    found = quantkit.explain(q, x, p)
    assert first(found) == ["x / scale"]
    bits = q.view(torch.uint8)
    signed = torch.where(x.isnan() & x.signbit(), 0xFF, bits).view(f.dtype)
    assert first(quantkit.explain(signed, x, p)) == ["x / scale, sign of NaN kept"]
    product = quantkit.quantize_tensor(x * (1 / scale), QuantizationParams(
        1.0, 0.0, -largest, largest, dtype=f.dtype
    ))  # fmt: skip
    assert first(quantkit.explain(product, x, p)) == ["x * (1 / scale)"]

    ml_dtypes = pytest.importorskip("ml_dtypes")
    numbers = x.where(~x.isnan(), 0.0) / scale
    raw = numbers.numpy().astype(getattr(ml_dtypes, name)).view("uint8")
    cast = torch.from_numpy(raw).view(f.dtype)
    found = quantkit.explain(cast, x.where(~x.isnan(), 0.0), p)
    assert first(found) == ["x / scale, cast without a clip"]


def test_codes_of_nobody():
    g, p = integers()
    found = quantkit.explain(torch.zeros_like(g.x, dtype=torch.int8), g.x, p)
    assert first(found) == []
    text = str(found)
    assert text.startswith(f"No known convention gives all {g.x.numel():,} codes. Where ")
    assert " differ" in text and text.endswith("\n  check scale and zero_point")


@pytest.mark.parametrize(
    "x", [torch.zeros(64, 8), torch.full((64, 8), torch.nan)], ids=["0", "nan"]
)
@pytest.mark.parametrize("code", [0, 77])
def test_conventions_that_tie_share_a_line(x, code):
    p = QuantizationParams(0.5, 0.0, *INT8)
    codes = torch.full(x.shape, code, dtype=torch.int8)
    text = str(quantkit.explain(codes, x, p))
    assert (
        len(text.splitlines()) <= 9 + ("check scale" in text)
        and f"  {OURS}" in text
        and " more" in text
    )
    assert max(text.count("512 differ"), text.count("codes are those of")) == 1


def test_scales_of_lower_rank_and_halves_of_the_range():
    x = chosen(torch.float32, 7.5)[:ROWS, :128]
    scale = x.abs().amax(0) / 127.5
    q = codes(x / scale)
    found = quantkit.explain(q, x, QuantizationParams(x.abs().amax(0) / 127, 0.0, *INT8))
    assert "x / scale + zero_point, rounded, scale of half the range" in first(found)


def test_codes_viewed_as_pairs_of_float4():
    x = torch.randn(8, 64)
    q, p = quantkit.quantize(x, "nvfp4")
    found = quantkit.explain(q.view(torch.float4_e2m1fn_x2), x, p)
    assert found.ranking[0] == (OURS, 0, x.numel()) == quantkit.explain(q, x, p).ranking[0]


@pytest.mark.parametrize(
    "scheme", [s for s in quantkit.SCHEMES if s not in ("int8_tensor", "uint8_tensor")]
)
def test_schemes(scheme):
    """Zero points, short blocks and packed codes."""
    torch.manual_seed(0)
    x = torch.randn(200, 300)
    q, p = quantkit.quantize(x, scheme)
    assert quantkit.explain(q, x, p).ranking[0][1:] == (0, x.numel())
    q, p = reference.quantize(x.half().t(), scheme)
    assert quantkit.explain(q, x.half().t(), p).ranking[0][1] == 0


@pytest.mark.parametrize(
    "x",
    [torch.tensor(3.0), torch.arange(-9, 9), torch.zeros(0, 4), torch.ones(3, 4).double()],
    ids=str,
)
def test_other_tensors(x):
    p = QuantizationParams(0.1, 3, *INT8)
    found = quantkit.explain(quantkit.quantize_tensor(x, p), x, p)
    assert found.ranking[0][1:] == (0, x.numel())


def test_a_leaf_keeps_its_gradient_to_itself():
    x = torch.randn(4, 8, requires_grad=True)
    q, p = quantkit.dynamic_quantize(x, True)
    assert quantkit.explain(q, x, p).ranking[0][1] == 0


def test_errors():
    x = torch.randn(4, 6)
    q, p = quantkit.dynamic_quantize(x, True)
    packed, p4 = quantkit.quantize(x, {"dtype": "int4"})
    for error, text, args in (
        (TypeError, "codes: expected torch.int8 for int8, got torch.uint8", (q.view(torch.uint8), x, p)),
        (TypeError, "codes: expected a torch.Tensor, got list", ([1], x, p)),
        (TypeError, "codes: expected a torch.Tensor, such as torch.from_numpy(codes), got ndarray",
         (q.numpy(), x, p)),
        (TypeError, "x: expected a torch.Tensor, such as torch.from_numpy(x), got ndarray",
         (q, x.numpy(), p)),
        (TypeError, "codes: expected torch.int8 for int8: codes, not floats, got torch.float32",
         (x, x, p)),
        (TypeError, "codes: expected torch.uint8 for int4, got torch.int8", (q, x, p4)),
        (TypeError, "qparams: expected a QuantizationParams, got int", (q, x, 3)),
        (TypeError, "x: expected a torch.Tensor, got list", (q, [1.0], p)),
        (ValueError, "codes: expected shape (4, 6) for x of shape (4, 6) and int8, got (2, 6)",
         (q[:2], x, p)),
        (ValueError, "codes: expected shape (4, 3) for x of shape (4, 6) and int4, got (2, 3)",
         (packed[:2], x, p4)),
        (ValueError, "scale: shape (4, 1) does not fit x of shape (3, 6)", (q[:3], x[:3], p)),
        (RuntimeError, "codes: expected device cpu, that of x, got meta", (q.to("meta"), x, p)),
    ):  # fmt: skip
        with pytest.raises(error) as raised:
            quantkit.explain(*args)
        assert str(raised.value).startswith(text), raised.value


@pytest.mark.filterwarnings("ignore")  # torch will remove the function
def test_codes_of_torchs_quantized_tensors():
    x, p = torch.randn(4, 6), QuantizationParams(0.1, 3, *INT8)
    q = torch.quantize_per_tensor(x, 0.1, 3, torch.qint8)
    with pytest.raises(TypeError) as raised:
        quantkit.explain(q, x, p)
    text = "codes: expected torch.int8 for int8, such as codes.int_repr(), got torch.qint8"
    assert str(raised.value) == text
    assert quantkit.explain(q.int_repr(), x, p).ranking[0][1] == 0
