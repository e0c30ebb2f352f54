"""Every error of the contract: exact type from Python functions, same message from operators."""

import dataclasses

import pytest
import torch
from lib.bad import FOREIGN, UNKNOWN_RULE

import quantkit
from quantkit import QuantizationParams, reference
from quantkit.formats import FORMATS, VERSION_1

ops = torch.ops.quantkit
pytestmark = pytest.mark.fallback
X = torch.randn(4, 6)
P = QuantizationParams(torch.tensor(0.1), torch.tensor(0.0), -128, 127)
MODULES = (quantkit, reference)


def raised(kind, call, *texts):
    """call raises exactly kind, with every text in its one-line message; returns the message."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message, message
    return message


def everywhere(kind, function, *texts):
    """function(module) is refused alike by the package and by the reference."""
    messages = {raised(kind, lambda m=module: function(m), *texts) for module in MODULES}
    assert len(messages) == 1, messages


def with_params(**changes):
    return dataclasses.replace(P, **changes)


GIVEN = {
    "quantize": lambda m, x, p: m.quantize_tensor(x, p),
    "dequantize": lambda m, x, p: m.dequantize_tensor(x, p),
    "fake_quantize": lambda m, x, p: m.fake_quantize(x, p),
}
CHOOSING = {
    "symmetric": lambda m, x, **k: m.get_symmetric_qparams(x, **k),
    "asymmetric": lambda m, x, **k: m.get_asymmetric_qparams(x, **k),
    "quantize_dequant": lambda m, x, **k: m.quantize_dequant(x, **k),
    "dynamic_quantize": lambda m, x, **k: m.dynamic_quantize(x, **k),
}
filter_beta = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@filter_beta
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_tensors(kind):
    make, text = FOREIGN[kind]
    value = make()
    for name, call in GIVEN.items():
        first = "q" if name == "dequantize" else "x"
        everywhere(TypeError, lambda m, c=call: c(m, value, P), f"{first}:", text)
        everywhere(TypeError, lambda m, c=call: c(m, X, with_params(scale=value)), "scale:", text)
        everywhere(
            TypeError, lambda m, c=call: c(m, X, with_params(zero_point=value)), "zero_point:", text
        )
    for call in CHOOSING.values():
        everywhere(TypeError, lambda m, c=call: c(m, value), "x:", text)
        everywhere(TypeError, lambda m, c=call: c(m, value, per_channel=True), "x:", text)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_a_scale_must_be_floating(dtype):
    scale = torch.ones((), dtype=dtype)
    for call in GIVEN.values():
        everywhere(
            TypeError, lambda m, c=call: c(m, X, with_params(scale=scale)), "scale:", str(dtype)
        )


def listed(names):
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}"


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.float32, torch.int64, torch.qint8, torch.float8_e5m2fnuz, None]
)
def test_code_dtype(dtype):
    texts = ("dtype:", listed(f.dtype for f in FORMATS), str(dtype))
    for call in CHOOSING.values():
        everywhere(TypeError, lambda m, c=call: c(m, X, dtype=dtype), *texts)
        texts_of_names = ("dtype:", listed(f.name for f in FORMATS), "int9")
        everywhere(ValueError, lambda m, c=call: c(m, X, dtype="int9"), *texts_of_names)
    with pytest.raises(RuntimeError, match=listed(f.dtype for f in VERSION_1)):
        ops.quantize(X, P.scale, P.zero_point, -128, 127, torch.int32)
    if dtype is not None:
        everywhere(TypeError, lambda m: m.quantize_tensor(X, with_params(dtype=dtype)), *texts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("int4", "torch.int4"), ("int9", listed(f.dtype for f in FORMATS)), ("i" * 99, "i" * 40)],
)
def test_parameters_take_no_name_of_a_dtype(name, expected):
    """The error of a format's name says its dtype."""
    texts = (f"dtype: expected {expected}, got {name!r}",)
    if len(name) > 40:
        texts = ("dtype: expected ", f"got {expected!r}")
    everywhere(TypeError, lambda m: m.quantize_tensor(X, with_params(dtype=name)), *texts)


def test_texts_are_quoted():
    for call in (CHOOSING["quantize_dequant"], CHOOSING["symmetric"]):
        coded = "None, torch.float32, torch.float8_e8m0fnu or torch.float8_e4m3fn"
        for name, dtypes in (("compute_dtype", "None or torch.float32"), ("scale_dtype", coded)):
            text = f"{name}: expected {dtypes}, got 'float32'"
            everywhere(TypeError, lambda m, c=call, n=name: c(m, X, **{n: "float32"}), text)
        text = "block_size: expected a list of ints or None, got ['1', 2]"
        everywhere(TypeError, lambda m, c=call: c(m, X, block_size=["1", 2]), text)
    everywhere(
        TypeError, lambda m: m.dequantize_tensor(X, P, output_dtype="float32"),
        "output_dtype: expected", "or torch.float32, got 'float32'",
    )  # fmt: skip


def test_limits():
    for call in CHOOSING.values():
        for low, high, code in ((5, 3, torch.int8), (-129, 0, torch.int8), (-1, 9, torch.uint8)):
            everywhere(
                ValueError,
                lambda m, c=call, v=(low, high, code): c(m, X, q_min=v[0], q_max=v[1], dtype=v[2]),
                "q_min", str(low), str(high),
            )  # fmt: skip
        everywhere(ValueError, lambda m, c=call: c(m, X, q_max=128), "[-128, 128]", "torch.int8")
        everywhere(TypeError, lambda m, c=call: c(m, X, q_max=1.5), "q_max:", "float")
    bad = [with_params(q_min=9, q_max=8), with_params(q_min=-40000), with_params(q_max=1 << 40)]
    for p in bad:
        everywhere(ValueError, lambda m, p=p: m.quantize_tensor(X, p), "q_min", str(p.q_min))
        everywhere(ValueError, lambda m, p=p: m.fake_quantize(X, p), "q_min", str(p.q_max))
    everywhere(
        ValueError,
        lambda m: m.quantize_tensor(X, with_params(q_max=200, dtype=torch.int8)),
        "[-128, 200]", "torch.int8",
    )  # fmt: skip
    for call in GIVEN.values():
        everywhere(
            ValueError, lambda m, c=call: c(m, X, with_params(q_min=0, q_max=40000)),
            "dtype: expected torch.uint16 for q_min, q_max of [0, 40000], got None",
        )  # fmt: skip


@pytest.mark.parametrize("eps", [0, 0.0, -1e-8, -1e-4, -1e5, -1.5e300, float("nan"), float("-inf")])
def test_eps(eps):
    for call in CHOOSING.values():
        everywhere(ValueError, lambda m, c=call: c(m, X, eps=eps), "eps:", str(float(eps)))


def test_eps_must_be_a_number():
    for call in CHOOSING.values():
        everywhere(TypeError, lambda m, c=call: c(m, X, eps="tiny"), "eps:", "str")


def test_flags_must_be_bools():
    for name in ("quantize_dequant", "dynamic_quantize"):
        call = CHOOSING[name]
        everywhere(TypeError, lambda m, c=call: c(m, X, sym="yes"), "sym", "bool", "str")
        everywhere(TypeError, lambda m, c=call: c(m, X, include_zero=[]), "include_zero:", "list")


def test_include_zero_needs_the_asymmetric_scheme():
    for name in ("quantize_dequant", "dynamic_quantize"):
        call = CHOOSING[name]
        everywhere(
            ValueError, lambda m, c=call: c(m, X, include_zero=True), "include_zero:", "symmetric"
        )


def test_block_size():
    cases = [([1], "2 sizes"), ([1, 2, 3], "[1, 2, 3]"), ([0, 1], "[0, 1]"), ([-2, 1], "[-2, 1]")]
    cases += [
        ([3, 1], "3 does not divide 4"),
        ([1, 4], "4 does not divide 6"),
        ([8, 1], "8 does not"),
    ]
    for call in CHOOSING.values():
        for blocks, text in cases:
            everywhere(
                ValueError, lambda m, c=call, b=blocks: c(m, X, block_size=b), "block_size:", text
            )
        everywhere(
            ValueError, lambda m, c=call: c(m, X, per_channel=True, block_size=[1, 2]),
            "block_size:", "per_channel",
        )  # fmt: skip
        everywhere(TypeError, lambda m, c=call: c(m, X, block_size=3), "block_size:", "3")
        everywhere(TypeError, lambda m, c=call: c(m, X, block_size=[1.5, 2]), "block_size:", "1.5")


@filter_beta
def test_extremes():
    cases = [
        (ValueError, {"block_size": [1]}, "2 sizes"),
        (ValueError, {"block_size": [0, 1]}, "[0, 1]"),
    ]
    cases += [(TypeError, {"block_size": 3}, "3"), (TypeError, {"block_size": [1.5, 2]}, "1.5")]
    cases += [(ValueError, {"block_size": [1, 1], "per_channel": True}, "per_channel")]
    for kind, options, text in cases:
        everywhere(kind, lambda m, o=options: m.aminmax(X, **o), "block_size:", text)
    everywhere(TypeError, lambda m: m.aminmax(X, torch.int8), "per_channel:", "dtype")
    everywhere(IndexError, lambda m: m.aminmax(X, True, 2), "channel_dim:", "[-2, 1]")
    everywhere(ValueError, lambda m: m.aminmax(X[:0]), "x:", "empty", "(0, 6)")
    for make, text in FOREIGN.values():
        value = make()
        everywhere(TypeError, lambda m, v=value: m.aminmax(v), "x:", text)


E8M0, E4M3, F4 = torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.float4_e2m1fn_x2
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (TypeError, {"scale_dtype": torch.float8_e5m2}, "scale_dtype: expected None, torch.float32, "),
        (ValueError, {"scale_rule": "up"}, UNKNOWN_RULE),
        (ValueError, {"scale_rule": "even"}, "scale_rule: even is for float formats, got int8"),
        (ValueError, {"scale_rule": "half_range", "dtype": F4}, "half_range is for signed integer"),
        (ValueError, {"scale_rule": "half_range", "dtype": "uint2"}, "half_range is for signed integer"),
        *((ValueError, {"scale_rule": r, "scale_dtype": E4M3}, f"{r} makes no scales of {E4M3}")
          for r in ("half_range", "ceil", "floor")),
        (ValueError, {"scale_rule": "half_range", "scale_dtype": E8M0}, f"makes no scales of {E8M0}"),
        *((ValueError, o | {"global_scale": g}, "global_scale: scales that are powers of two take none")
          for o in ({"scale_dtype": E8M0}, {"scale_rule": "ceil"}) for g in (2.0, ONE)),
        (ValueError, {"global_scale": torch.ones(4)}, "global_scale: shape (4,) does not fit scale of"),
        (ValueError, {"global_scale": torch.ones(3, 1), "block_size": [1, -1]}, "does not fit scale"),
        (TypeError, {"global_scale": ONE.int()}, "global_scale: expected a floating dtype"),
        (TypeError, {"global_scale": "2"}, "global_scale: expected a torch.Tensor or a number, got str"),
        (ValueError, {"scale_dtype": E4M3, "eps": 2.0**-10}, "eps: expected a number above 2**-10"),
        (ValueError, {"dtype": F4, "q_max": 5}, "that is a number of torch.float4_e2m1fn_x2 up to 6"),
        (ValueError, {"dtype": F4, "compute_dtype": torch.float32, "round_first": True}, "round_first:"),
    ],
    ids=str,
)  # fmt: skip
def test_scales_that_no_format_has(kind, options, text):
    for name in ("symmetric", "quantize_dequant", "dynamic_quantize"):
        everywhere(kind, lambda m, c=CHOOSING[name]: c(m, X, **options), text)


def test_scales_that_only_the_symmetric_scheme_has():
    values = {"scale_rule": "ceil", "scale_dtype": E8M0, "global_scale": 2.0}
    for name in ("quantize_dequant", "dynamic_quantize"):
        for option, value in values.items():
            text = f"{option}: only the symmetric scheme takes one"
            options = {"sym": False, option: value}
            everywhere(ValueError, lambda m, c=CHOOSING[name], o=options: c(m, X, **o), text)
        call, text = CHOOSING[name], "symmetric (sym): expected True for float4_e2m1fn"
        everywhere(ValueError, lambda m, c=call: c(m, X, sym=False, dtype=F4), text)


def test_coded_scales_that_parameters_do_not_have():
    eight = ONE.to(E8M0)
    for call in GIVEN.values():
        for scale in (ONE.to(torch.float8_e5m2), eight.view(torch.uint8)):
            text = f"scale: expected a floating dtype of at least 16 bits, {E8M0} or {E4M3}"
            text = text if scale.dtype != torch.uint8 else "scale: expected a floating dtype"
            p = with_params(scale=scale, compute_dtype=torch.float32)
            everywhere(TypeError, lambda m, c=call, p=p: c(m, X, p), text, str(scale.dtype))
        p = with_params(scale=eight, global_scale=2.0)
        text = "global_scale: torch.float8_e8m0fnu scales take none"
        everywhere(ValueError, lambda m, c=call, p=p: c(m, X, p), text)
        p = with_params(global_scale=torch.ones(4, 1))
        everywhere(
            ValueError, lambda m, c=call, p=p: c(m, X, p), "(4, 1) does not fit scale of shape ()"
        )


def test_channel_dim():
    for call in CHOOSING.values():
        for dim in (2, -3, 100):
            everywhere(
                IndexError, lambda m, c=call, d=dim: c(m, X, per_channel=True, channel_dim=d),
                "channel_dim:", "[-2, 1]", str(dim),
            )  # fmt: skip
        everywhere(
            IndexError,
            lambda m, c=call: c(m, X[0], per_channel=True, channel_dim=1),
            "channel_dim:",
        )
        for dim in ("0", 1.0):
            everywhere(
                TypeError,
                lambda m, c=call, d=dim: c(m, X, per_channel=True, channel_dim=d),
                "channel_dim:", type(dim).__name__,
            )  # fmt: skip
        call(quantkit, torch.tensor(1.0), per_channel=True, channel_dim=7)  # 0-dim: per tensor


def test_empty_tensors_have_no_parameters():
    for shape in ((0,), (3, 0), (2, 0, 2)):
        for call in CHOOSING.values():
            for arguments in ({}, {"per_channel": True}):
                everywhere(
                    ValueError, lambda m, c=call, s=shape, a=arguments: c(m, torch.empty(s), **a),
                    "x:", "empty", str(shape),
                )  # fmt: skip


@pytest.mark.parametrize(
    "shape", [(3, 1), (5,), (4,), (1, 4), (8, 1), (1, 1, 1), (1, 4, 6), (0, 1)]
)
def test_parameters_that_fit_no_rule(shape):
    for call in GIVEN.values():
        for name in ("scale", "zero_point"):
            p = with_params(**{name: torch.ones(shape)})
            everywhere(
                ValueError, lambda m, c=call, p=p: c(m, X, p), f"{name}:", str(shape), "(4, 6)"
            )


def test_parameters_that_do_not_broadcast_with_each_other():
    p = with_params(scale=torch.ones(4, 1), zero_point=torch.ones(2, 1))
    for call in GIVEN.values():
        everywhere(ValueError, lambda m, c=call: c(m, X, p), "(4, 1)", "(2, 1)", "broadcast")


def test_devices():
    p = with_params(scale=torch.ones(4, 1, device="meta"))
    for call in GIVEN.values():
        everywhere(RuntimeError, lambda m, c=call: c(m, X, p), "scale:", "cpu", "meta")


def test_what_are_no_parameters():
    for value in (None, 3, (torch.tensor(1.0), torch.tensor(0.0), -128, 127)):
        for call in GIVEN.values():
            everywhere(
                TypeError, lambda m, c=call, v=value: c(m, X, v),
                "qparams:", "QuantizationParams", type(value).__name__,
            )  # fmt: skip


def test_numbers_are_taken_as_parameters():
    numbers = QuantizationParams(0.1, 3, -128, 127)
    tensors = QuantizationParams(
        *(torch.tensor(v, dtype=torch.float64) for v in (0.1, 3)), -128, 127
    )
    for module in MODULES:
        for call in GIVEN.values():
            a, b = call(module, X, numbers), call(module, X, tensors)
            assert torch.equal(a, b) and a.dtype == b.dtype


def test_range_decides_the_dtype_of_codes():
    for low, high, dtype in (
        (-128, 127, torch.int8),
        (0, 200, torch.uint8),
        (-1, 128, torch.int16),
    ):
        q = quantkit.quantize_tensor(X, with_params(q_min=low, q_max=high))
        assert q.dtype == dtype


OPERATOR_CALLS = [
    (RuntimeError, lambda: ops.quantize(X, torch.ones(3, 1), P.zero_point, -128, 127, torch.int8),
     lambda: reference.quantize_tensor(X, with_params(scale=torch.ones(3, 1)))),
    (RuntimeError, lambda: ops.quantize(X, P.scale, P.zero_point, 5, 3, torch.int8),
     lambda: reference.quantize_tensor(X, with_params(q_min=5, q_max=3, dtype=torch.int8))),
    (RuntimeError, lambda: ops.quantize(X, P.scale, P.zero_point, -1, 3, torch.int32),
     lambda: reference.quantize_op(X, P.scale, P.zero_point, -1, 3, torch.int32)),
    (RuntimeError, lambda: ops.dequantize(X.to(torch.complex64), P.scale, P.zero_point),
     lambda: reference.dequantize_tensor(X.to(torch.complex64), P)),
    (RuntimeError, lambda: ops.fake_quantize(X, P.scale.int(), P.zero_point, -1, 3),
     lambda: reference.fake_quantize(X, with_params(scale=P.scale.int()))),
    (RuntimeError, lambda: ops.choose_qparams(X, None, -128, 127, -0.5, True),
     lambda: reference.get_symmetric_qparams(X, eps=-0.5)),
    (RuntimeError, lambda: ops.choose_qparams(X, [1, 4], -128, 127, 1e-8, True),
     lambda: reference.get_symmetric_qparams(X, block_size=[1, 4])),
    (RuntimeError, lambda: ops.dynamic_quantize(X, None, -128, 127, 1e-8, True, torch.int8, True),
     lambda: reference.dynamic_quantize(X, include_zero=True)),
    (RuntimeError, lambda: ops.quantize_dequantize(X[:0], None, -128, 127, 1e-8, True, torch.int8),
     lambda: reference.quantize_dequant(X[:0])),
    (RuntimeError, lambda: ops._fake_quantize_backward(X.double(), X, P.scale, P.zero_point, -1, 3),
     lambda: reference.fake_quantize_backward_op(X.double(), X, P.scale, P.zero_point, -1, 3)),
    (RuntimeError, lambda: ops._fake_quantize_backward(X[:2], X, P.scale, P.zero_point, -1, 3),
     lambda: reference.fake_quantize_backward_op(X[:2], X, P.scale, P.zero_point, -1, 3)),
    *((RuntimeError, lambda v=v: ops._masked_gradient(*v), lambda v=v: reference.masked_gradient_op(*v))
      for v in ((X.int(), X > 0), (X, X), (X[:2], X > 0), (X, (X > 0).to("meta")))),
    *((RuntimeError, lambda v=v: ops.quantize(X, P.scale, P.zero_point, *v),
       lambda v=v: reference.quantize_op(X, P.scale, P.zero_point, *v))
      for v in ((-129, 0, torch.int8), (0, 128, torch.int8), (-1, 9, torch.uint8))),
    *((RuntimeError, lambda v=v: ops.choose_qparams(X, v, -128, 127, 1e-8, True),
       lambda v=v: reference.choose_qparams_op(X, v, -128, 127, 1e-8, True))
      for v in ([1], [1, 2, 3], [0, 1], [-2, 1], [3, 1])),
    *((RuntimeError, lambda v=v: ops.aminmax(*v), lambda v=v: reference.aminmax_op(*v))
      for v in ((X, [1]), (X, [1, 2, 3]), (X, [0, 1]), (X, [1, -2]), (X[:0], None), (X[:0], [-1, 1]),
                (X.to(torch.complex64), None))),
    *((RuntimeError, lambda n=n, a=a, o=o: getattr(ops, n)(*a, **o),
       lambda n=n, a=a, o=o: getattr(reference, f"{n}_op")(*a, **o))
      for n in ("measure", "measure_limbs") for a, o in (
          *(((X, P.scale, None, -8, 7, "int4"), {"over": v}) for v in ([1], [], [0, 1], [1, -2])),
          ((X, P.scale, None, -8, 8, "int4"), {}), ((X, P.scale, ONE, -6, 6, "float4_e2m1fn"), {}),
          ((X, P.scale, None, -8, 7, "int4"), {"block_size": [2, 2]}),
          ((X, P.scale, None, -6, 6, "float4_e2m1fn"), {"round_first": True}),
          ((X.to(torch.complex64), P.scale, None, -8, 7, "int4"), {}))),
    *((RuntimeError, lambda v=v: ops.quantize.format(X, P.scale, None, -8, 7, v),
       lambda v=v: reference.quantize_format_op(X, P.scale, None, -8, 7, v))
      for v in ("int9", "int4\0", "a\tb\\\n\r\x7f", "", "é" * 99, "aé" * 99,
                "a" * 39 + "\U0001f600" * 2)),
    (RuntimeError,
     lambda: ops.choose_qparams.format(X, None, -8, 7, 1.0, True, "int4", scale_rule="a" + "é" * 99),
     lambda: reference.choose_qparams_format_op(X, None, -8, 7, 1.0, True, "int4",
                                                scale_rule="a" + "é" * 99)),
    *((RuntimeError, lambda v=v: ops.choose_qparams(X, None, -128, 127, v, True),
       lambda v=v: reference.choose_qparams_op(X, None, -128, 127, v, True))
      for v in (0.0, float("nan"))),
    *((RuntimeError, lambda v=v: ops.dequantize(X, *v), lambda v=v: reference.dequantize_op(X, *v))
      for v in ((P.scale, torch.ones(3, 1)), (torch.ones(1, 5), P.zero_point),
                (torch.ones(1, 4, 6), P.zero_point), (torch.ones(4, 1), torch.ones(2, 1)))),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(OPERATOR_CALLS)))
def test_operators_say_what_the_reference_says(case):
    kind, operator, function = OPERATOR_CALLS[case]
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        function()
    raised(kind, operator, str(caught.value))


def test_layouts_without_a_kernel_are_torchs_own_error():
    kind = NotImplementedError if quantkit.backend().extension else RuntimeError
    with pytest.raises(kind):
        ops.quantize(X.to_sparse(), P.scale, P.zero_point, -128, 127, torch.int8)


@pytest.mark.parametrize("wrong", [torch.int8, "s", [1], None, 1.0, torch.ones(())], ids=str)
def test_per_channel_that_is_no_bool(wrong):
    """Such as a dtype in its place."""
    for function in (quantkit.dynamic_quantize, quantkit.reference.dynamic_quantize):
        with pytest.raises(TypeError, match="per_channel: expected a bool, got"):
            function(torch.randn(3, 4), wrong)


@pytest.mark.parametrize("value", ["1", [1.0], (2,), 1j], ids=str)
def test_what_is_no_tensor_and_no_number(value):
    texts = f"expected a torch.Tensor or a number, got {type(value).__name__}"
    for call in GIVEN.values():
        for name in ("scale", "zero_point", "global_scale"):
            everywhere(
                TypeError,
                lambda m, c=call, n=name: c(m, X, with_params(**{n: value})),
                f"{name}: {texts}",
            )
    for name in ("symmetric", "quantize_dequant", "dynamic_quantize"):
        everywhere(
            TypeError,
            lambda m, c=CHOOSING[name]: c(m, X, global_scale=value),
            f"global_scale: {texts}",
        )


def test_keywords_that_dynamic_quantize_lacks():
    valid = "keys among per_channel, channel_dim, dtype, sym, block_size, "
    for key in ("dtpye", "x", 1):
        texts = (f"scheme: expected {valid}", f"index, got {key!r}")
        everywhere(TypeError, lambda m, k=key: m.quantize(X, {k: 8}), *texts)
    text = f"options: expected {valid}"
    everywhere(TypeError, lambda m: m.quantize(X, "int8_token", dtpye=8), text, "got 'dtpye'")


@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.complex64, torch.float8_e8m0fnu])
def test_an_out_of_any_other_dtype(dtype):
    out = torch.empty(4, 3, dtype=torch.int8 if dtype.itemsize == 1 else dtype).view(dtype)
    text = f"out: expected dtype torch.uint8, got {dtype}"
    arguments = (X, P.scale, None, -6, 6, "float4_e2m1fn")
    raised(RuntimeError, lambda: ops.quantize.format_out(*arguments, out=out), text)
