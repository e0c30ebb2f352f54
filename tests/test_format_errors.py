"""What the reference of .format operators refuses, and that operators say the same."""

import pytest
import torch
from lib.bad import UNKNOWN_RULE
from lib.cases import flat
from lib.formats import (
    CHOOSE,
    DEQUANTIZE,
    E4,
    E4M3,
    E8M0,
    EACH,
    EACH_FLOAT,
    INTEGERS,
    ONE,
    QUANTIZE,
)

from quantkit.formats import FORMATS
from quantkit.operators import overloads

pytestmark = pytest.mark.fallback

GIVEN = {
    "x": torch.ones(4, 10),
    "scale": torch.ones(4, 3),
    "zero_point": None,
    "q_min": -8,
    "q_max": 7,
}
GIVEN |= {"format": "int4", "block_size": [1, 4]}


def say_the_same(operators, arguments, error):
    """The operators, compiled ones too, refuse arguments in the reference's words."""
    for operator in operators:
        with pytest.raises(RuntimeError) as caught:
            overloads(f"{operator}.format")[0](**arguments)
        assert str(caught.value) == str(error)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"scale": torch.ones(4, 2)}, ("scale:", "(4, 2)", "[1, 4]", "(4, 3)")),
        ({"scale": torch.ones(4, 5)}, ("scale:", "(4, 5)")),
        ({"scale": torch.ones(())}, ("scale:", "()")),
        ({"scale": torch.ones(3)}, ("scale:", "(3,)")),
        ({"block_size": [4]}, ("block_size:", "2 sizes", "[4]")),
        ({"block_size": [1, 0]}, ("block_size:", "at least 1")),
        ({"block_size": [1, -2]}, ("block_size:", "at least 1")),
        ({"block_size": None}, ("scale:", "divide")),  # 3 does not divide 10
        ({"zero_point": torch.ones(4, 2)}, ("zero_point:", "(4, 2)", "(4, 3)")),
        ({"zero_point": torch.ones(3)}, ("zero_point:", "(3,)")),
        ({"zero_point": torch.ones(4, 10)}, ("zero_point:", "(4, 10)")),
        ({"format": "int3"}, ("format:", "float8_e5m2", "int3")),
        ({"q_min": -9}, ("q_min", "[-9, 7]", "[-8, 7]", "int4")),
        *((E4M3 | {"q_min": low, "q_max": high}, ("expected -n and n", "e4m3fn", f"[{low}, {high}]"))
          for low, high in ((-447, 448), (-447, 447), (0, 0), (-480, 480))),
        (E4M3 | {"zero_point": ONE}, ("zero_point:", "None")),
        ({"scale": torch.ones(4, 3).to(E8M0), "global_scale": ONE}, ("global_scale:", "e8m0fnu")),
        ({"global_scale": torch.ones(4, 2)}, ("global_scale:", "(4, 2)", "(4, 3)")),
        ({"global_scale": torch.ones(3)}, ("global_scale:", "(3,)", "(4, 3)")),
    ],
    ids=str,
)  # fmt: skip
def test_what_quantize_refuses(changes, texts):
    with pytest.raises(ValueError) as caught:
        QUANTIZE(**(GIVEN | changes))
    assert all(text in str(caught.value) for text in texts), caught.value
    say_the_same(("quantize", "fake_quantize"), GIVEN | changes, caught.value)
    QUANTIZE(**GIVEN)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (E4M3 | {"symmetric": False}, ValueError, "symmetric"),
        ({"symmetric": False, "scale_rule": "half_range"}, ValueError, "scale_rule: only the symmetric"),
        ({"format": "uint4", "q_min": 0, "scale_rule": "half_range"}, ValueError, "scale_rule: .*uint4"),
        (E4M3 | {"scale_rule": "half_range"}, ValueError, "scale_rule: .*e4m3fn"),
        ({"scale_rule": "even"}, ValueError, "scale_rule: even is for float formats, got int4"),
        ({"scale_rule": "up"}, ValueError, UNKNOWN_RULE),
        *(({"scale_rule": rule, "scale_dtype": E4}, ValueError, f"scale_rule: {rule} makes no .*e4m3fn")
          for rule in ("ceil", "floor", "half_range")),
        ({"scale_rule": "half_range", "scale_dtype": E8M0}, ValueError, "scale_rule: .*e8m0fnu"),
        *(({"symmetric": False, "eps": 0.1, key: value}, ValueError, f"{key}: only the symmetric scheme")
          for key, value in (("scale_rule", "ceil"), ("scale_dtype", E8M0), ("scale_dtype", E4),
                             ("global_scale", ONE))),
        *((change | {"global_scale": ONE}, ValueError, "global_scale: scales that are powers of two")
          for change in ({"scale_dtype": E8M0}, {"scale_rule": "ceil"}, {"scale_rule": "floor"})),
        *(({"global_scale": torch.ones(shape)}, ValueError, "global_scale: shape .* scale of shape")
          for shape in ((2,), (3, 1), (4, 8), (1, 4, 2))),
        *(({"global_scale": ONE.to(dtype)}, TypeError, "global_scale: expected a floating dtype")
          for dtype in (torch.int32, E8M0, E4)),
        *(({"scale_dtype": E4, "eps": eps}, ValueError, r"eps: expected a number above 2\*\*-10")
          for eps in (1e-8, 2.0**-10, 2.0**-10 * (1 + 2.0**-30))),
        *(({"scale_dtype": dtype}, TypeError, "scale_dtype: expected None, torch.float32, ")
          for dtype in (torch.float16, torch.float8_e5m2, torch.uint8)),
        ({"symmetric": True, "include_zero": True}, ValueError, "include_zero: "),
        ({"eps": 0.0}, ValueError, "eps: "),
    ],
    ids=str,
)  # fmt: skip
def test_what_choosing_refuses(arguments, kind, text):
    valid = {"x": torch.ones(4, 8), "block_size": [1, 4], "q_min": -8, "q_max": 7, "eps": 1e-8}
    valid |= {"symmetric": True, "format": "int4"}
    with pytest.raises(kind, match=text) as caught:
        CHOOSE(**(valid | arguments))
    choosers = ("choose_qparams", "dynamic_quantize", "quantize_dequantize")
    say_the_same(choosers, valid | arguments, caught.value)
    assert len(flat(CHOOSE(**valid))) == 2
    CHOOSE(**(valid | {"scale_dtype": E4, "eps": 2.0**-10 * (1 + 2.0**-23)}))


@EACH
def test_dtypes_that_dequantize_does_not_return(f):
    for dtype in (torch.float64, torch.int8, torch.float8_e5m2):
        arguments = {"q": torch.zeros(4).to(f.storage), "scale": ONE, "zero_point": None}
        arguments |= {"format": f.name, "output_dtype": dtype}
        with pytest.raises(TypeError, match=f"output_dtype: expected .*, got {dtype}") as caught:
            DEQUANTIZE(**arguments)
        say_the_same(["dequantize"], arguments, caught.value)


@pytest.mark.parametrize("f", INTEGERS, ids=lambda f: f.name)
def test_what_codes_dequantize_takes(f):
    for q in (torch.ones(4, dtype=torch.int32), torch.ones(4), torch.ones(4, dtype=torch.int8)):
        if f.per_byte == 1:
            assert (DEQUANTIZE(q, ONE, None, f.name) == 1).all()
        else:
            with pytest.raises(TypeError, match=r"q: expected torch\.uint8") as caught:
                DEQUANTIZE(q, ONE, None, f.name)
            arguments = {"q": q, "scale": ONE, "zero_point": None, "format": f.name}
            say_the_same(["dequantize"], arguments, caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        *(({"scale": torch.ones(4, 3).to(dtype)}, f"scale: expected .*, got {dtype}")
          for dtype in (torch.float8_e5m2, torch.uint8, torch.int32)),
        *(({"global_scale": ONE.to(dtype)}, f"global_scale: expected .*, got {dtype}")
          for dtype in (E8M0, E4, torch.int8)),
        *(({name: torch.ones(4, 10).to(dtype)}, f"{name}: expected a real dtype .*, got {dtype}")
          for name in ("x", "zero_point") for dtype in (E8M0, E4)),
    ],
    ids=str,
)  # fmt: skip
def test_dtypes_that_quantize_refuses(changes, text):
    with pytest.raises(TypeError, match=text) as caught:
        QUANTIZE(**(GIVEN | changes))
    say_the_same(("quantize", "fake_quantize"), GIVEN | changes, caught.value)


@pytest.mark.parametrize("f", [f for f in FORMATS if f.per_byte > 1], ids=lambda f: f.name)
def test_rows_of_codes_that_fill_no_byte(f):
    for x in (torch.ones(4, 2 * f.per_byte + 1), ONE):
        arguments = {"x": x, "scale": ONE, "zero_point": None, "q_min": f.low, "q_max": f.high}
        arguments |= {"format": f.name}
        text = f"x: expected a last size that {f.per_byte} divides for {f.name}, got shape"
        with pytest.raises(ValueError, match=text) as caught:
            QUANTIZE(**arguments)
        say_the_same(["quantize"], arguments, caught.value)


@EACH_FLOAT
def test_what_float_codes_dequantize_takes(f):
    for dtype in {torch.uint8, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2} - {f.storage}:
        with pytest.raises(TypeError, match=f"q: expected {f.storage}"):
            DEQUANTIZE(torch.zeros(4).to(dtype), ONE, None, f.name)
