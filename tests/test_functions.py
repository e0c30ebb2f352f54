"""The functions: which overload each call takes, schemes, block_size, parameters of version 2."""

import dataclasses
import gc
import itertools

import pytest
import torch
from lib.cases import assert_same
from lib.functions import E8M0, F4, F8, F32, MODULES, P, X, of
from torch.utils._python_dispatch import TorchDispatchMode

import quantkit
from quantkit import QuantizationParams, reference
from quantkit.formats import FORMATS

pytestmark = pytest.mark.fallback


class Called(TorchDispatchMode):
    """The names of quantkit's overloads that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "quantkit":
            self.names.append(function.name().removeprefix("quantkit::"))
        return function(*args, **(kwargs or {}))


def called(call):
    with Called() as mode:
        call()
    return mode.names


# ---- which steps -----------------------------------------------------------------------------------

# Of version 1's dtypes: keywords that change nothing, and those that ask for float32 steps.
SAME = [{}, {"eps": 1e-5}, {"block_size": [1, 5]}, {"q_max": 7}, {"dtype": torch.int16}]
SAME += [{"dtype": "uint8"}, {"compute_dtype": None}, {"round_first": False}, {"round_first": 0}]
OTHERS = [{"compute_dtype": F32}, {"round_first": True}, {"round_first": 1}]
OTHERS += [{"dtype": d} for d in (torch.uint16, "uint16", torch.int4, "uint4")]
SYMMETRIC = [
    {"scale_rule": "half_range"},
    {"scale_dtype": F32},
    {"dtype": F8},
    {"dtype": "float8_e5m2"},
    {"dtype": F4},
    {"dtype": torch.int2},
    {"scale_rule": "ceil"},
    {"scale_dtype": E8M0},
    {"scale_dtype": F8},
    {"global_scale": 2},
]
CHOOSERS = {
    "choose_qparams": lambda **k: quantkit.get_symmetric_qparams(X, **k),
    "dynamic_quantize": lambda **k: quantkit.dynamic_quantize(X, **k),
    "quantize_dequantize": lambda **k: quantkit.quantize_dequant(X, **k),
}


@pytest.mark.parametrize("operator", CHOOSERS)
def test_which_overload_choosing_takes(operator):
    function = CHOOSERS[operator]
    for options in SAME:
        assert called(lambda o=options: function(**o)) == [operator]
        p = function(**options)
        p = p if operator == "choose_qparams" else p[-1]
        assert p.compute_dtype is None and p.round_first is False
        assert p.scale.dtype == (F32 if p.dtype == torch.int16 else X.dtype)
    more = [{"output_dtype": F32}] if operator == "quantize_dequantize" else []
    for options in OTHERS + SYMMETRIC + more:
        assert called(lambda o=options: function(**o)) == [f"{operator}.format"]
        p = function(**options)
        p = p if operator == "choose_qparams" else p[-1]
        assert p.compute_dtype is F32 and p.scale.dtype == options.get("scale_dtype", F32)
        assert p.round_first is bool(options.get("round_first", False))
        f = next(f for f in FORMATS if options.get("dtype", torch.int8) in (f.name, f.dtype))
        assert p.dtype is f.dtype and (p.q_min, p.q_max) == (f.low, f.high)


def test_which_overload_the_asymmetric_scheme_takes():
    for options in SAME:
        assert called(lambda o=options: quantkit.get_asymmetric_qparams(X, **o)) == [
            "choose_qparams"
        ]
    for options in OTHERS:
        names = called(lambda o=options: quantkit.get_asymmetric_qparams(X, **o))
        assert names == ["choose_qparams.format"]
    for dtype in (F8, "float8_e5m2"):
        for m in (quantkit, reference):
            with pytest.raises(ValueError, match="symmetric"):
                m.get_asymmetric_qparams(X, dtype=dtype)
            with pytest.raises(ValueError, match="round_first"):
                m.get_symmetric_qparams(X, dtype=dtype, round_first=True)


def test_which_overload_given_parameters_take():
    q = X.to(torch.int8)
    plain = [P, of(dtype=torch.int16), of(block_size=(-1, -1)), of(round_first=False)]
    for p in plain:
        assert called(lambda p=p: quantkit.quantize_tensor(X, p)) == ["quantize"]
        assert called(lambda p=p: quantkit.dequantize_tensor(q, p)) == ["dequantize"]
        assert called(lambda p=p: quantkit.fake_quantize(X, p)) == ["_fake_quantize"]
    others = [of(compute_dtype=F32), of(round_first=True), of(dtype=torch.uint16, q_min=0)]
    others += [of(global_scale=2), *(of(scale=torch.ones(()).to(d)) for d in (E8M0, F8))]
    for p in others:
        assert called(lambda p=p: quantkit.quantize_tensor(X, p)) == ["quantize.format"]
        assert called(lambda p=p: quantkit.dequantize_tensor(q, p)) == ["dequantize.format"]
        assert called(lambda p=p: quantkit.fake_quantize(X, p)) == ["_fake_quantize.format"]
    for dtype in (torch.float16, F32):
        for function in (quantkit.dequantize_tensor, quantkit.dequantize):
            names = called(lambda d=dtype, f=function: f(q, P, output_dtype=d))
            assert names == ["dequantize.format"]


@MODULES
def test_float32_steps_of_half_precision_are_those_of_float32(m):
    for x in (X, X.half()):
        q, x_hat, p = m.quantize_dequant(x, True, sym=False, compute_dtype=F32)
        expected = m.quantize_dequant(x.float(), True, sym=False)
        assert_same(
            (q, x_hat, p.scale, p.zero_point),
            (*expected[:2], expected[2].scale, expected[2].zero_point),
        )
        assert_same(m.quantize_tensor(x, p), q)
        assert_same(m.dequantize_tensor(q, p), x_hat)
        assert_same(m.fake_quantize(x, p), x_hat.to(x.dtype))


@MODULES
def test_defaults_of_eps_and_limits(m):
    x = torch.zeros(4)
    for f in FORMATS:
        p = m.get_symmetric_qparams(x, dtype=f.dtype)
        assert p.scale == torch.tensor(1e-8 if f.has_zero_point else 2.0**-126)
        if not f.has_zero_point:
            n = min(f.high - 2, 96)
            for limits in ({"q_min": -n}, {"q_max": n}, {"q_min": -n, "q_max": n}):
                p = m.get_symmetric_qparams(x + 1, dtype=f.name, **limits)
                assert (p.q_min, p.q_max) == (-n, n) and p.scale == torch.tensor(1.0) / n
            assert p.zero_point.shape == () and p.zero_point.dtype == F32 and p.zero_point == 0


@MODULES
def test_coded_scales_are_chosen_and_used(m):
    """Of one block, of rows, of columns, of short blocks; of a global scale in each form."""
    g = torch.rand(6, 1) + 0.1
    for f, (kind, options) in itertools.product(FORMATS, enumerate((
        {"scale_dtype": E8M0}, {"scale_dtype": E8M0, "scale_rule": "floor"}, {"scale_rule": "ceil"},
        {"scale_dtype": F8}, {"scale_dtype": F8, "global_scale": 0.013},
        {"scale_dtype": F8, "global_scale": g, "block_size": [1, 8]},
        {"global_scale": torch.tensor(3.0, dtype=torch.float64)},
    ))):  # fmt: skip
        blocks = (None, [1, 7], [2, -1], [-1, 1])[(kind + f.bits) % 4]
        options = {"dtype": f.dtype, "block_size": blocks, **options}
        q, x_hat, p = m.quantize_dequant(X, output_dtype=torch.float16, **options)
        assert p == m.get_symmetric_qparams(X, **options) == m.dynamic_quantize(X, **options)[1]
        assert p.scale.dtype == options.get("scale_dtype", F32)
        whole = options.get("global_scale")
        assert whole is None or p.global_scale is whole or p.global_scale.dtype == torch.float64
        assert_same(m.quantize_tensor(X, p), q)
        assert_same(m.dequantize_tensor(q, p, output_dtype=torch.float16), x_hat)
        if f.dtype == F4:
            assert_same(m.dequantize_tensor(q.view(F4), p), m.dequantize_tensor(q, p))
        assert_same(m.fake_quantize(X, p), m.dequantize_tensor(q, p).to(X.dtype))
        # The same numbers as float32 scales have the same codes; so has a number as global scale.
        scale = p.scale.to(F32)
        scale = scale if whole is None else scale * torch.as_tensor(whole).to(F32)
        plain = dataclasses.replace(p, scale=scale, global_scale=None)
        assert_same(m.quantize_tensor(X, plain), q)
        assert_same(m.dequantize_tensor(q, plain), m.dequantize_tensor(q, p))


@MODULES
def test_coded_scales_of_no_elements(m):
    for f in (F8, F4, torch.int2, torch.int8):
        for scale_dtype, shape in itertools.product((E8M0, F8, None), ((0, 4), (3, 0))):
            whole = None if scale_dtype == E8M0 else 2.0
            q, x_hat, p = m.quantize_dequant(
                torch.ones(shape), dtype=f, block_size=[1, 4], scale_dtype=scale_dtype,
                global_scale=whole, compute_dtype=F32,
            )  # fmt: skip
            assert q.numel() == x_hat.numel() == p.scale.numel() == 0 and x_hat.shape == shape
            assert p.scale.dtype == (scale_dtype or F32)
    for name in ("mxfp8", "mxfp4", "nvfp4"):
        q, p = m.quantize(torch.ones(0, 64), name)
        assert q.shape[0] == 0 and m.dequantize(q, p).shape == (0, 64)


@MODULES
def test_float_formats_read_no_zero_point(m):
    q, p = m.dynamic_quantize(X, dtype=F8)
    for zero_point in (p.zero_point, torch.ones(()), torch.ones(7, 7, 7), 3.0, 1):
        other = dataclasses.replace(p, zero_point=zero_point)
        assert torch.equal(m.quantize_tensor(X, other).view(torch.uint8), q.view(torch.uint8))
        assert_same(m.dequantize_tensor(q, other), m.dequantize_tensor(q, p))


# ---- gradients -------------------------------------------------------------------------------------


@MODULES
def test_gradients_of_formats(m):
    """1 where nothing is clipped: at the limits themselves float formats do not round first."""
    x = torch.tensor([-9.0, -8.4, -8.0, 7.0, 7.4, 7.6, float("nan")])
    for dtype, limits, expected in (
        ("int4", (-8, 7), [0, 1, 1, 1, 1, 0, 0]),
        ("float8_e4m3fn", (-8, 8), [0, 0, 1, 1, 1, 1, 0]),
        ("float8_e5m2", (-7, 7), [0, 0, 0, 1, 0, 0, 0]),
    ):
        f = next(f for f in FORMATS if f.name == dtype)
        p = QuantizationParams(torch.ones(()), torch.zeros(()), *limits, dtype=f.dtype)
        leaf = x.clone().requires_grad_()
        m.fake_quantize(leaf, p).backward(torch.arange(1.0, 8.0))
        assert leaf.grad.tolist() == [g * e for g, e in zip(range(1, 8), expected, strict=True)]
        gradient = torch.func.grad(lambda t, p=p: m.fake_quantize(t, p).sum())(x)
        assert gradient.tolist() == expected
        tangent = torch.func.jvp(lambda t, p=p: m.fake_quantize(t, p), (x,), (torch.ones(7),))[1]
        assert tangent.tolist() == expected
    y = torch.tensor([7.5, 6.5])
    for round_first, expected in ((False, [1, 1]), (True, [0, 1])):  # the codes 8, 8 and 9, 7
        p = of(scale=torch.ones(()), zero_point=torch.ones(()), q_min=-8, q_max=8, dtype=torch.int8)
        p = dataclasses.replace(p, round_first=round_first, compute_dtype=F32)
        assert torch.func.grad(lambda t, p=p: m.fake_quantize(t, p).sum())(y).tolist() == expected


@MODULES
def test_gradients_beside_coded_scales(m):
    """Those of the float32 scales that these stand for, for a scale itself none."""
    x = torch.tensor(
        [[-13.0, -12.0, -11.9, 2.0, 12.1, float("nan")], [-16, -15, 14.9, 15, 15.1, 0]]
    )
    for scale, whole, limit in (
        (torch.tensor(2.0).to(E8M0), None, 12), (torch.tensor(1.25).to(F8), 2.0, 15),
        (torch.tensor([[1.0], [1.25]]).to(F8), torch.full((2, 1), 2.0), None),
    ):  # fmt: skip
        p = of(scale=scale, global_scale=whole, q_min=-6, q_max=6, dtype=F4)
        inside = x.abs() <= (limit or torch.tensor([[12.0], [15.0]]))
        leaf = x.clone().requires_grad_()
        m.fake_quantize(leaf, p).backward(x + 100)
        assert_same(leaf.grad, torch.where(inside, x + 100, 0.0))
        gradient = torch.func.grad(lambda t, p=p: m.fake_quantize(t, p).sum())(x)
        assert_same(gradient, inside.float())
        tangent = torch.func.jvp(lambda t, p=p: m.fake_quantize(t, p), (x,), (x + 100,))[1]
        assert_same(tangent, torch.where(inside, x + 100, 0.0))


def test_a_refused_argument_leaves_torch_func_as_it_was():
    """The error holds no frame, and so none of torch's guards, until the collector runs."""
    p = quantkit.get_symmetric_qparams(X)
    gc.disable()
    try:
        with pytest.raises(TypeError, match="scale_dtype"):
            quantkit.get_symmetric_qparams(X, scale_dtype=torch.empty(4, dtype=torch.uint4))
        torch.func.grad(lambda t: quantkit.fake_quantize(t, p).sum())(X)
    finally:
        gc.enable()


def test_a_short_block_has_its_gradient():
    x = torch.full((2, 5), 3.0, requires_grad=True)
    p = QuantizationParams(
        torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), -8, 7, dtype=torch.int4, block_size=(2, 3)
    )
    quantkit.fake_quantize(x, p).sum().backward()
    assert x.grad.tolist() == [[1, 1, 1, 0, 0]] * 2
    assert torch.ops.quantkit.fake_quantize.format(
        x, p.scale, None, -8, 7, "int4", block_size=[2, 3]
    ).requires_grad


# ---- block_size ------------------------------------------------------------------------------------


@MODULES
def test_block_size_is_kept(m):
    for dtype in (torch.int8, F8):
        for x, options, expected in (
            (X, {}, None), (X, {"per_channel": True}, (1, -1)), (X[0], {"per_channel": True}, (-1,)),
            (X, {"per_channel": True, "channel_dim": -1}, (-1, 1)),
            (X, {"block_size": [2, 5]}, (2, 5)), (X, {"block_size": (6, 20)}, (6, 20)),
            (X[0, 0], {"per_channel": True}, None), (X[0, 0], {"block_size": []}, None),
        ):  # fmt: skip
            q, p = m.dynamic_quantize(x, dtype=dtype, **options)
            assert p.block_size == expected
            assert_same(m.quantize_tensor(x, p).view(torch.uint8), q.view(torch.uint8))


@MODULES
def test_block_size_is_checked(m):
    p = m.get_symmetric_qparams(X, True)
    assert p.block_size == (1, -1)
    for x in (X, X[:, :7]):
        m.quantize_tensor(x, p)
    for call in (m.quantize_tensor, m.fake_quantize, m.dequantize_tensor):
        for x in (X[:3], X[:2], X.repeat(2, 1)):
            x = x.to(torch.int8) if call is m.dequantize_tensor else x
            with pytest.raises(ValueError, match=r"scale: .*block_size"):
                call(x, p)
    # Parameters of another axis are an error, also where their shape divides x's.
    p = m.get_symmetric_qparams(torch.randn(5, 5), True)
    m.quantize_tensor(torch.randn(5, 1), p)
    with pytest.raises(ValueError, match="scale: "):
        m.quantize_tensor(torch.randn(5, 5), dataclasses.replace(p, scale=p.scale.t()))
    # Where ranks differ shapes decide.
    lower = of(scale=torch.ones(20), block_size=(1, -1))
    assert_same(m.quantize_tensor(X, lower), m.quantize_tensor(X, of(scale=torch.ones(20))))


NEEDED = r"block_size: 7 does not divide 20, .*; .*compute_dtype=torch\.float32"


@MODULES
def test_short_blocks_need_float32_steps(m):
    for dtype in ("int8", "uint8", "int16"):
        for function in (m.get_symmetric_qparams, m.dynamic_quantize, m.quantize_dequant):
            with pytest.raises(ValueError, match=NEEDED):
                function(X.float(), dtype=dtype, block_size=[1, 7])
    q, p = m.dynamic_quantize(X, block_size=[1, 7], compute_dtype=F32)
    assert p.scale.shape == (6, 3)
    x_hat = m.dequantize_tensor(q, p)
    assert_same(x_hat, m.quantize_dequant(X, block_size=[1, 7], compute_dtype=F32)[1])
    for call in (m.quantize_tensor, m.dequantize_tensor, m.fake_quantize):
        with pytest.raises(ValueError, match=NEEDED):
            call(q, dataclasses.replace(p, compute_dtype=None))
    # 18 columns make 3 blocks of 7, which without block_size would be 3 of 6.
    with pytest.raises(ValueError, match="compute_dtype"):
        m.quantize_tensor(X[:, :18], dataclasses.replace(p, compute_dtype=None))


@MODULES
def test_packed_codes_are_counted_by_elements(m):
    q, p = m.dynamic_quantize(X, block_size=[1, 8], dtype=torch.int4)
    assert q.shape == (6, 10) and p.scale.shape == (6, 3)
    assert m.dequantize_tensor(q, p).shape == X.shape
    with pytest.raises(ValueError, match=r"scale: .*q of shape \(6, 8\)"):
        m.dequantize_tensor(q[:, :4], p)
