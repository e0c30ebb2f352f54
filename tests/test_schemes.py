"""Named schemes: what they stand for, their options, in compiled and exported programs."""

import pytest
import torch
from lib.cases import assert_same, microscaled, values
from lib.functions import E8M0, F4, F8, F32, MODULES, X
from torch._dynamo.utils import counters

import quantkit
from quantkit import checkpoint
from quantkit.schemes import OF_CHECKPOINTS

pytestmark = pytest.mark.fallback

KEYWORDS = {
    "int8_tensor": {}, "int8_channel": {"per_channel": True}, "int8_token": {"block_size": [1, 1, -1]},
    "uint8_tensor": {"dtype": torch.uint8, "sym": False, "include_zero": True},
    "uint8_token": {"dtype": torch.uint8, "sym": False, "include_zero": True, "block_size": [1, 1, -1]},
    "int4_group128": {"dtype": torch.int4, "block_size": [1, 1, 128]},
    "fp8_tensor": {"dtype": F8}, "fp8_token": {"dtype": F8, "block_size": [1, 1, -1]},
    "fp8_group128": {"dtype": F8, "block_size": [1, 1, 128]},
    "fp8_block128": {"dtype": F8, "block_size": [1, 128, 128]},
    "mxfp8": {"dtype": F8, "block_size": [1, 1, 32], "scale_dtype": E8M0},
    "mxfp4": {"dtype": F4, "block_size": [1, 1, 32], "scale_dtype": E8M0, "scale_rule": "even"},
    "nvfp4": {"dtype": F4, "block_size": [1, 1, 16], "scale_dtype": F8},
}  # fmt: skip


@MODULES
def test_schemes(m):
    x = values((2, 130, 300), torch.bfloat16, 5)
    assert set(quantkit.SCHEMES) == set(KEYWORDS)
    for name, keywords in KEYWORDS.items():
        q, p = m.quantize(x, name)
        if name == "nvfp4":  # max |x| becomes the largest code times the largest scale
            assert_same(p.global_scale, (x.abs().max().float() / 2688))
            keywords = keywords | {"global_scale": p.global_scale}
        expected, expected_p = m.dynamic_quantize(x, compute_dtype=F32, **keywords)
        assert p == expected_p and p.compute_dtype is F32 and p.block_size == expected_p.block_size
        assert_same(q.view(torch.uint8), expected.view(torch.uint8))
        assert_same(m.dequantize(q, p), m.dequantize_tensor(q, p))
        error = (m.dequantize(q, p) - x.float()).norm() / x.float().norm()
        assert error < 0.2 and m.dequantize(q, p, output_dtype=torch.float16).dtype == torch.float16
    with pytest.raises(TypeError):
        quantkit.SCHEMES["int8_tensor"] = ""
    assert all(isinstance(text, str) and "\n" not in text for text in quantkit.SCHEMES.values())


@MODULES
def test_schemes_of_few_dimensions(m):
    number, row = torch.tensor(1.5), torch.randn(256)
    for name in quantkit.SCHEMES:
        if name.endswith("_tensor") or name == "int8_channel":
            q, p = m.quantize(number, name)
            assert q.shape == () and p.scale.shape == ()
        else:
            with pytest.raises(ValueError, match=f"^scheme: .* for {name}"):
                m.quantize(number, name)
        if name == "fp8_block128":
            with pytest.raises(ValueError, match=f"^scheme: .* for {name}"):
                m.quantize(row, name)
        else:
            assert m.quantize(row, name)[1].scale.dim() <= 1


@MODULES
def test_options_and_mappings(m):
    q, p = m.quantize(X, "int8_token", q_max=7, q_min=-7)
    assert (p.q_min, p.q_max, q.abs().max()) == (-7, 7, 7)
    own = {"dtype": torch.int4, "block_size": (4,)}
    assert m.quantize(X, own)[1] == m.dynamic_quantize(X, dtype="int4", block_size=[1, 4])[1]
    assert m.quantize(X, own, block_size=[2, 4])[1].scale.shape == (3, 5)
    assert m.quantize(X, {})[1] == m.dynamic_quantize(X)[1]  # a mapping says its steps itself
    assert m.quantize(X, own, dtype="uint4")[1].dtype == torch.uint4 and own["dtype"] == torch.int4
    x = X.float().repeat(1, 4)
    assert m.quantize(x, "mxfp8", scale_rule="even")[1].scale.dtype == E8M0
    assert m.quantize(x, "mxfp4", scale_rule=None)[1] != m.quantize(x, "mxfp4")[1]
    assert m.quantize(x, "nvfp4", global_scale=0.5)[1].global_scale == 0.5
    assert m.quantize(x * 0, "nvfp4")[1].global_scale == 2.0**-126
    assert m.quantize(x * 0, "nvfp4", eps=0.25)[1].scale.float().max() == 0.25  # the blocks'
    bad = m.quantize(torch.where(x == x.max(), float("nan"), x), "nvfp4")[1]
    assert bad.global_scale.isnan() and bad.scale.float().isnan().all()
    with pytest.raises(ValueError, match=r"scheme: expected one of int8_tensor.*got 'mxfp6'"):
        m.quantize(X, "mxfp6")
    with pytest.raises(TypeError, match="scheme: expected a str or a mapping, got int"):
        m.quantize(X, 3)
    with pytest.raises(TypeError, match="other"):
        m.quantize(X, "int8_token", other=1)


@MODULES
def test_names_that_the_checkpoint_command_has_for_the_same_codes(m):
    assert set(OF_CHECKPOINTS) == set(checkpoint.SCHEMES) - set(quantkit.SCHEMES)
    x = values((130, 256), F32, 6)
    for name, own in OF_CHECKPOINTS.items():
        q, expected = m.quantize(x, own)[0], checkpoint.SCHEMES[name].quantize(x)[0]
        assert_same(q.view(torch.uint8), expected.view(torch.uint8))
        with pytest.raises(ValueError, match=f", got '{name}', the checkpoint .* name of {own}$"):
            m.quantize(x, name)


@MODULES
@pytest.mark.parametrize(
    ("scheme", "options", "text"),
    [
        ("int4_group128", {"per_channel": True},
         "per_channel: scheme int4_group128 has block_size [128]; pass block_size=None as well"),
        ("int8_channel", {"block_size": (1, 4)},
         "block_size: scheme int8_channel has per_channel=True; pass per_channel=False as well"),
        ({"block_size": [4]}, {"per_channel": True}, "per_channel: the scheme has block_size [4]"),
        ({"per_channel": 1}, {"block_size": [4]}, "block_size: the scheme has per_channel=True"),
        ({"block_size": [4], "per_channel": True}, {}, "block_size: cannot be given together with"),
        ({}, {"block_size": [4], "per_channel": True}, "block_size: cannot be given together with"),
        ({"dtype": torch.int4, "block_size": []}, {}, "block_size: expected at least one size"),
        ("int8_token", {"block_size": ()}, "block_size: expected at least one size for x of shape (6,"),
        ({"block_size": [1, 1, 4]}, {}, "block_size: expected 2 sizes"),
    ],
    ids=str,
)  # fmt: skip
def test_granularities_that_exclude_each_other(m, scheme, options, text):
    with pytest.raises(ValueError) as caught:
        m.quantize(X, scheme, **options)
    assert str(caught.value).startswith(text), caught.value


@MODULES
def test_options_that_replace_the_granularity_of_a_scheme(m):
    _, p = m.quantize(X, "int4_group128", per_channel=True, block_size=None)
    assert p == m.dynamic_quantize(X, True, dtype="int4")[1]
    _, p = m.quantize(X, "int8_channel", per_channel=False, block_size=[4])
    assert p == m.dynamic_quantize(X, block_size=[1, 4], compute_dtype=F32)[1]
    assert m.quantize(X[0, 0], {"block_size": []})[1].scale.shape == ()  # a size for each dimension


# ---- compiled --------------------------------------------------------------------------------------


def everything(x):
    q, p = quantkit.quantize(x, "int4_group128")
    q8, p8 = quantkit.quantize(x, "fp8_block128")
    y = quantkit.dequantize(q8, p8, output_dtype=torch.bfloat16)
    own, own_p = quantkit.dynamic_quantize(x, block_size=[1, x.shape[1]], dtype="float8_e5m2")
    short = quantkit.dynamic_quantize(x, block_size=[1, 7], compute_dtype=F32)[0]
    z = quantkit.fake_quantize(x, own_p)
    return (
        q,
        p.scale,
        quantkit.dequantize(q, p),
        y,
        own.view(torch.uint8) + 0,
        own_p.scale,
        short,
        z,
    )


@pytest.mark.parametrize(
    ("function", "backend"),
    [(everything, "aot_eager"), (microscaled, "aot_eager"),
     pytest.param(microscaled, "inductor", marks=pytest.mark.full)],
)  # fmt: skip
def test_one_graph_serves_shapes_and_blocks_of_their_size(function, backend):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((300, 270), (290, 400), (400, 512)):
        x = values(shape, torch.bfloat16, shape[0])
        assert_same(compiled(x), function(x))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_block_size_in_a_graph_holds_ints():
    torch._dynamo.reset()
    kept = {}

    def function(x):
        for name, blocks in (("whole", [1, x.shape[1]]), ("five", [1, 5]), ("all", [1, -1])):
            kept[name] = quantkit.get_symmetric_qparams(x, dtype=F8, block_size=blocks)
        return kept["whole"], kept["five"], kept["all"]

    found = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)(
        torch.randn(4, 20)
    )
    assert [p.block_size for p in found] == [(1, -1), (1, 5), (1, -1)]
    assert all(type(b) is int for p in found for b in p.block_size)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_coded_scales_under_vmap():
    x = values((3, 4, 32), torch.float32, 4)
    for scheme in ("mxfp8", "mxfp4", "nvfp4"):

        def each(t, scheme=scheme):
            q, p = quantkit.quantize(t, scheme)
            return (
                quantkit.dequantize(q, p),
                quantkit.fake_quantize(t, p),
                p.scale.view(torch.uint8),
            )

        expected = zip(*map(each, x), strict=True)
        assert_same(torch.vmap(each)(x), tuple(map(torch.stack, expected)))


class Crossing(torch.nn.Module):
    def forward(self, x, p):
        _, chosen = quantkit.quantize(x, "fp8_group128")
        q, mx = quantkit.quantize(x, "mxfp4")
        nv = quantkit.quantize(x, "nvfp4")[1]
        made = quantkit.fake_quantize(x, p), quantkit.quantize_tensor(x, p)
        return *made, quantkit.dequantize(q, mx), q, chosen, mx, nv


@pytest.mark.filterwarnings("ignore")
def test_parameters_cross_the_border_of_exported_programs(tmp_path):
    x = values((300, 520), torch.bfloat16, 3)
    p = quantkit.get_symmetric_qparams(x, dtype=torch.int4)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Crossing(), (x, p), dynamic_shapes=(free, [None, None]))
    torch.export.save(program, tmp_path / "program.pt2")
    for module in (program.module(), torch.export.load(tmp_path / "program.pt2").module()):
        for rows, columns in ((300, 520), (271, 300)):
            expected, found = Crossing()(x[:rows, :columns], p), module(x[:rows, :columns], p)
            assert_same(found[:4], expected[:4])
            assert found[4:] == expected[4:] and found[4].block_size == (1, 128)
            assert found[5].scale.dtype == E8M0 and found[6].global_scale.dtype == F32
