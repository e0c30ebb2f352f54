"""Cases that hypothesis makes: every operator against the reference, on every instruction set.

`make proof` tries a million. What once failed, or nearly was forgotten, stays in KEPT.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from lib.generated import CASES, SEED, Case, Data, check, run_many

HALF, E8M0 = torch.float16, torch.float8_e8m0fnu
HARD = float.fromhex("0x1.f63c0ep-7")  # the divisor for which two multiplications are not enough
KEPT = [
    Case(Data((5000,), magnitude=1), Data((), put=((0, HARD),)), Data((), put=((0, 0.0),))),
    Case(Data((3, 4096), put=((0, HARD * 127),)), block_size=(1, -1)),
    # 1 / scale is infinite, and so is x / scale from a denormal x on.
    Case(Data((9, 7), magnitude=-40), Data((), put=((0, 1e-41),)), Data(())),
    Case(Data((33,), torch.int8, magnitude=2), Data((), put=((0, 1e-41),)), Data(())),
    Case(Data((64,), magnitude=3), Data((), put=((0, 2.0**126),)), Data(())),
    # A zero point that half precision cannot hold, 0-dim beside a scale for each column.
    Case(Data((4, 6), HALF), Data((6,), HALF, round_to=0.125), Data((), put=((0, 2049.0),))),
    # float32 before the first step: half precision cannot hold the limits.
    Case(
        Data((8, 33), HALF, magnitude=3),
        Data((8, 1), HALF, round_to=0.5),
        Data((8, 1), torch.int32, magnitude=2),
        (-32768, 32767),
        torch.int16,
    ),
    # NaN is 0 also where the range does not hold 0.
    Case(Data((40,), put=((3, math.nan), (39, math.nan))), Data(()), Data(()), (3, 100)),
    # Ties of 0.0 and -0.0, whichever comes first, make no scale -0.0.
    Case(Data((2, 2), round_to=100.0, put=((0, -0.0), (3, 0.0))), symmetric=False),
    Case(Data((2, 70000), put=((70000, math.nan),)), block_size=(1, -1), out="strided"),
    Case(Data((0, 5)), Data((), round_to=1.0), Data(())),
    Case(Data((), torch.int16), Data((), HALF), Data((), torch.float64)),
    Case(Data((4, 4), layout="expanded"), Data((2, 4)), Data((1, 4), torch.int8), out="transposed"),
    # Of float64 by a zero point that is an integer, beside a scale without dimensions.
    Case(Data((4, 6), torch.int8), Data((), torch.float64), Data((4, 1), torch.int32)),
    Case(Data((4, 6), HALF), limits=(-300, 400), code=torch.int16),
    # The reference once made two dimensions of each, more than torch has.
    Case(Data((1,) * 40), block_size=(1,) * 40),
    Case(Data((1,) * 63 + (8,)), block_size=(1,) * 63 + (4,), symmetric=False, out="strided"),
    # A short block of one element in each row: packed codes are read in steps.
    Case(Data((2, 5, 8)), Data((1, 1, 2)), limits=(0, 15), format="uint4", block_size=(5, -1, 7)),
    # One byte a row, whose stride leads nowhere.
    Case(Data((8, 2), layout="transposed"), Data(()), limits=(-8, 7), format="int4"),
    # The mask judges the sum, the code rounds it.
    Case(
        Data((3, 8)),
        Data(()),
        Data((), put=((0, 0.5),)),
        (0, 65535),
        format="uint16",
        round_first=True,
    ),
    # No elements, and no strides of an expanded scale.
    Case(Data((0, 1, 0)), Data((1, 1, 0)), limits=(-8, 7), format="int4", block_size=(-1, 32, 2)),
    # A power of two for m = inf and m = NaN, and a scale of e4m3 that saturates.
    Case(
        Data((3, 64), put=((5, math.inf), (70, math.nan))),
        limits=(-6, 6),
        format="float4_e2m1fn",
        block_size=(1, 32),
        scale_rule="even",
        scale_dtype=E8M0,
    ),
    Case(
        Data((3, 64), magnitude=15, put=((5, math.nan), (99, -0.0))),
        limits=(-4, 4),
        format="float4_e2m1fn",
        block_size=(1, 16),
        eps=0.5,
        scale_dtype=torch.float8_e4m3fn,
        global_scale=Data((3, 2)),
        out="strided",
    ),
    # A half for y, which vectors of float do not make.
    Case(Data((5, 64)), limits=(3, 15), format="uint4", block_size=(-1, 4), output_dtype=HALF),
]


@pytest.mark.parametrize("case", KEPT, ids=range(len(KEPT)))
def test_kept_cases(case):
    calls, results = check(case)
    assert results == calls >= 3


@seed(SEED)
@settings(
    max_examples=1500,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(CASES)
def test_generated_cases(case):
    check(case)


def test_generated_cases_give_results_not_refusals():
    _, calls, results = run_many(200, 0)
    assert results > 0.8 * calls
