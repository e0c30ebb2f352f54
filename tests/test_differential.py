"""Random inputs of every kind: operators against the reference.

QUANTKIT_DIFFERENTIAL_SECONDS=60 looks for that long on each instruction set, with a new seed each time.
"""

import math
import os
import random
import time

import pytest
import torch
from cases import CODES, FLOATS, SPECIAL, STRIDES, assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit import reference

ops = torch.ops.quantkit
SECONDS = float(os.environ.get("QUANTKIT_DIFFERENTIAL_SECONDS", "0"))


def random_tensor(rng, shape, dtype):
    x = torch.randn(shape, dtype=torch.float64) * 10 ** rng.uniform(-4, 4)
    if rng.random() < 0.2:
        x = torch.randint(-300, 300, shape, dtype=torch.float64) / 2
    if rng.random() < 0.3 and x.numel():
        for _ in range(rng.randint(1, 4)):
            x.view(-1)[rng.randrange(x.numel())] = rng.choice(SPECIAL)
    if dtype in FLOATS:
        x = x.to(torch.float32).to(dtype) if dtype in FLOATS[2:] else x.to(dtype)
    else:
        x = x.nan_to_num().clamp(-100, 100).to(dtype)
    usable = [n for n in STRIDES if x.dim() > 0 and (n != "expanded" or x.shape[0] > 0)]
    return STRIDES[rng.choice(usable)](x) if usable and rng.random() < 0.7 else x


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0] if n else [1]


def random_parameters(rng, shape):
    """A shape that fits x's by one of the rules."""
    kind = rng.random()
    if kind < 0.25 or not shape:
        return ()
    if kind < 0.35:
        return tuple(rng.choice([1, n]) for n in shape[rng.randrange(len(shape)) :])
    return tuple(rng.choice(divisors(n)) for n in shape)


def outcome(call):
    """The result, or the message of the refusal."""
    try:
        return call()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)


def agree(operator, function, *args):
    actual, expected = outcome(lambda: operator(*args)), outcome(lambda: function(*args))
    if isinstance(actual, str) or isinstance(expected, str):
        assert actual == expected
        return False
    assert_same(actual, expected)
    return True


def check(seed):
    """One random case through every operator; how many gave results."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [0, 1, 2, 3, 4, 8, 12, 16, 33, 64, 128, 257]
    shape = tuple(rng.choice(sizes) for _ in range(rng.randint(0, 4)))
    if math.prod(shape) > 200_000:
        shape = shape[:2]
    x = random_tensor(rng, shape, rng.choice([*FLOATS, *FLOATS, torch.int8, torch.int64]))
    shape = tuple(x.shape)
    code = rng.choice(list(CODES))
    low, high = CODES[code]
    if rng.random() < 0.4:
        low, high = sorted(rng.randint(low, high) for _ in range(2))

    s_shape = random_parameters(rng, shape)
    z_shape = s_shape if rng.random() < 0.6 else random_parameters(rng, shape)
    s_dtype = rng.choice([x.dtype if x.dtype in FLOATS else torch.float32, *FLOATS])
    z_dtype = rng.choice([s_dtype, s_dtype, *FLOATS, torch.int32, torch.int8])
    scale = (torch.rand(s_shape) * 10 ** rng.uniform(-3, 2)).to(s_dtype)
    zero_point = torch.randint(-120, 120, z_shape) + rng.choice([0, 0, 0.3])
    zero_point = zero_point.to(torch.float32).to(z_dtype)
    args = (x, scale, zero_point, low, high)
    done = agree(ops.quantize, reference.quantize_op, *args, code)
    done += agree(ops.fake_quantize, reference.fake_quantize_op, *args)
    if x.is_floating_point():
        grad = torch.randn(shape).to(x.dtype)
        backward = reference.fake_quantize_backward_op
        done += agree(ops._fake_quantize_backward, backward, grad, *args)
    q = random_tensor(
        rng, shape, rng.choice([torch.int8, torch.uint8, torch.int16, torch.int32, x.dtype])
    )
    done += agree(ops.dequantize, reference.dequantize_op, q, scale, zero_point)

    blocks = None if rng.random() < 0.3 else [rng.choice([-1, *divisors(n)]) for n in shape]
    symmetric = rng.random() < 0.5
    zero = not symmetric and rng.random() < 0.4
    args = (x, blocks, low, high, rng.choice([1e-8, 1e-8, 1e-5, 1e-45, 2.0]), symmetric)
    done += agree(ops.choose_qparams, reference.choose_qparams_op, *args, zero)
    done += agree(ops.dynamic_quantize, reference.dynamic_quantize_op, *args, code, zero)
    done += agree(ops.quantize_dequantize, reference.quantize_dequantize_op, *args, code, zero)
    return done


@given(seed=st.integers(0, 2**32 - 1))
@settings(
    max_examples=400,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_cases(backend, seed):
    check(seed)


def test_random_cases_give_results_not_refusals(backend):
    assert sum(check(seed) for seed in range(100)) > 400


@pytest.mark.skipif(SECONDS == 0, reason="QUANTKIT_DIFFERENTIAL_SECONDS is not set")
def test_random_cases_for_a_while(backend):
    seed = random.SystemRandom().randrange(2**62)
    start, count, results = time.monotonic(), 0, 0
    while time.monotonic() - start < SECONDS:
        try:
            results += check(seed + count)
        except AssertionError:
            print(f"seed {seed + count}")
            raise
        count += 1
    print(f"{backend}: {count} cases, {results} results equal, first seed {seed}")
