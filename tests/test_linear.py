"""linear_w8a8: exact sums of products of int8, then float32 steps (docs/numerics.md)."""

import functools
from pathlib import Path

import pytest
import torch
from lib.bad import arguments_of, bad_of, described, refused
from lib.cases import FLOATS, STRIDES, assert_same, values

import quantkit
from quantkit import reference

ops = torch.ops.quantkit
pytestmark = pytest.mark.fallback
ROOT = Path(__file__).resolve().parent.parent


def codes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def layer(x, q, scale, bias=None):
    """By integers of Python's size, and one float32 step after the other."""
    xq, p = quantkit.quantize(x, "int8_token")
    sums = xq.to(torch.int64).unsqueeze(-2) * q.to(torch.int64)
    y = sums.sum(-1).to(torch.float64).to(torch.float32) * p.scale
    y = y * (scale if scale.dim() == 0 else scale[:, 0])
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


# Tokens, columns, outputs: around the sizes of blocks, tasks and vectors.
SHAPES = [
    (1, 1, 1), (1, 64, 4), (2, 63, 5), (3, 130, 64), (4, 65, 63), (5, 16, 66), (17, 4097, 9),
    (65, 40, 131), (70, 2049, 6), (2, 9000, 3), (5, 4100, 6),
]  # fmt: skip


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_shape(dtype):
    for i, (tokens, columns, outputs) in enumerate(SHAPES):
        x, q = values((tokens, columns), dtype, i), codes(outputs, columns, seed=i)
        scale = torch.rand(outputs, 1) if i % 2 else torch.tensor(0.03)
        bias = (None, values((outputs,), torch.float32), values((outputs,), dtype))[i % 3]
        assert_same(quantkit.linear_w8a8(x, q, scale, bias), layer(x, q, scale, bias))


@pytest.mark.usefixtures("backend")
def test_sums_of_the_largest_products():
    """131,071 products of -128 by -128 are nearly 2^31."""
    for columns in (4096, 4100, 131_071):
        x = torch.full((3, columns), -127.0)
        x[0, 1::2] = 127
        q = torch.full((5, columns), -128, dtype=torch.int8)
        q[1] = 127
        scale = torch.ones(())
        assert_same(quantkit.linear_w8a8(x, q, scale), layer(x, q, scale))


def test_the_reference_is_the_formula():
    x, q, scale, bias = (
        values((3, 50), torch.float32),
        codes(7, 50),
        torch.rand(7, 1),
        torch.rand(7),
    )
    assert_same(reference.linear_w8a8(x, q, scale, bias), layer(x, q, scale, bias))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_layout(dtype):
    q, scale = codes(12, 8).t(), torch.rand(8, 1)
    for layout in STRIDES.values():
        x = layout(values((6, 12), dtype))
        expected = layer(x.contiguous(), q.contiguous(), scale)
        assert_same(quantkit.linear_w8a8(x, q, scale), expected)
    part = codes(20, 12, seed=3)[7:15]  # with an offset
    bias = values((16,), torch.float32)[::2]
    assert_same(
        quantkit.linear_w8a8(x, part, scale, bias), layer(x.contiguous(), part, scale, bias)
    )
    deep = values((2, 3, 4, 12), dtype).transpose(0, 2)
    assert_same(quantkit.linear_w8a8(deep, part, scale), layer(deep, part, scale).contiguous())
    vector = values((12,), dtype)
    assert_same(quantkit.linear_w8a8(vector, part, scale), layer(vector, part, scale))


@pytest.mark.usefixtures("backend")
def test_numbers_that_are_not_finite():
    x = values((5, 8), torch.float32)
    x[1, 2], x[2, 3], x[3] = float("nan"), float("inf"), 0
    q, scale = codes(3, 8), torch.tensor([[1.0], [float("inf")], [float("nan")]])
    assert_same(quantkit.linear_w8a8(x, q, scale), layer(x, q, scale))
    assert_same(quantkit.linear_w8a8(x * 1e30, q, scale * 1e30), layer(x * 1e30, q, scale * 1e30))


@pytest.mark.usefixtures("backend")
def test_memory_that_is_not_cleared():
    """What lay where numbers are padded must not count."""
    x, q, scale = values((3, 13), torch.float32), codes(5, 13), torch.ones(())
    expected = layer(x, q, scale)
    for _ in range(20):
        for size in (256, 512):  # bytes of padded codes
            left = [torch.full((size,), 111, dtype=torch.int8) for _ in range(50)]
            del left
        assert_same(quantkit.linear_w8a8(x, q, scale), expected)


@pytest.mark.usefixtures("backend")
def test_nothing_to_do():
    scale = torch.ones(())
    for tokens, outputs in (((0,), 3), ((2, 0), 3), ((2,), 0)):
        x = torch.zeros(*tokens, 4, dtype=torch.bfloat16)
        y = quantkit.linear_w8a8(x, torch.zeros(outputs, 4, dtype=torch.int8), scale)
        assert_same(y, torch.zeros(*tokens, outputs, dtype=torch.bfloat16))


def test_threads_do_not_matter(threads):
    x, q, scale = values((90, 256), torch.float32), codes(130, 256), torch.rand(130, 1)
    expected = layer(x, q, scale)
    for n in (1, 2, 3, 7):
        threads(n)
        assert_same(quantkit.linear_w8a8(x, q, scale), expected)


@pytest.mark.parametrize("capped", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_caps_of_other_libraries_do_not_matter(capped, torch_process):
    """oneDNN's int8 products saturate where its instruction set is capped; these are not oneDNN's."""
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import torch, quantkit, test_linear\n"
        "x, q = torch.full((8, 256), -127.0), torch.full((8, 256), -128, dtype=torch.int8)\n"
        "scale = torch.ones(())\n"
        "y = quantkit.linear_w8a8(x, q, scale)\n"
        "assert torch.equal(y, test_linear.layer(x, q, scale)) and y[0, 0] == 127 * 128 * 256\n"
    )
    done = torch_process.run(program, ROOT, ONEDNN_MAX_CPU_ISA=capped)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "function", [quantkit.linear_w8a8, reference.linear_w8a8, ops.linear_w8a8.default]
)
def test_there_is_no_gradient(function):
    q, scale = codes(3, 8), torch.ones(())
    for which in (0, 2, 3):
        given = [values((2, 8), torch.float32), q, scale.clone(), torch.ones(3)]
        given[which].requires_grad_()
        y = function(*given)
        assert y.requires_grad
        with pytest.raises(RuntimeError, match="no gradient"):
            y.sum().backward()
        with torch.no_grad():
            assert not function(*given).requires_grad
    assert not function(values((2, 8), torch.float32), q, scale).requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("module", [quantkit, reference])
def test_a_compiled_forward_has_no_gradient_either(module, backend):
    q, scale, bias = codes(3, 8), torch.rand(3, 1), torch.ones(3, requires_grad=True)
    compiled = torch.compile(
        lambda x: module.linear_w8a8(x * 2, q, scale, bias), backend=backend, dynamic=True
    )
    for tokens in (2, 5):
        x = values((tokens, 8), torch.float32).requires_grad_()
        y = compiled(x)
        assert y.requires_grad
        assert_same(y.detach(), layer(x.detach() * 2, q, scale, bias.detach()))
        with pytest.raises(RuntimeError, match="linear_w8a8: it has no gradient"):
            y.sum().backward()


def test_tangents_are_an_error():
    x, q, scale = values((2, 8), torch.float32), codes(3, 8), torch.ones(())
    with pytest.raises(RuntimeError, match="linear_w8a8: it has no gradient"):
        torch.func.jvp(lambda x: quantkit.linear_w8a8(x, q, scale), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        assert_same(quantkit.linear_w8a8(x, q, scale), layer(x, q, scale))
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="linear_w8a8: it has no gradient"):
            quantkit.linear_w8a8(dual, q, scale)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("module", [quantkit, reference])
def test_sums_of_one_column_have_no_negative_zero(module):
    x, q = torch.tensor([[0.0], [-0.0], [1.0]]), torch.tensor([[-5], [0], [5]], dtype=torch.int8)
    y = module.linear_w8a8(x, q, torch.tensor(1.0))
    assert_same(y, layer(x, q, torch.tensor(1.0)))
    assert not y.signbit()[:2].any()


@pytest.mark.parametrize("module", [quantkit, reference])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_arguments(module):
    for argument in arguments_of("linear_w8a8"):
        for label, b in bad_of("linear_w8a8", argument).items():
            arguments = arguments_of("linear_w8a8") | {argument: b.make()}
            call = functools.partial(module.linear_w8a8, **arguments)
            with described(argument, label):
                refused((b.kind,), (argument,), call, arguments.values())


def test_compiled_with_any_number_of_tokens():
    q, scale, bias = codes(5, 8), torch.rand(5, 1), torch.rand(5)
    compiled = torch.compile(
        lambda x: quantkit.linear_w8a8(x, q, scale, bias) * 2, fullgraph=True, dynamic=True
    )
    for tokens in (1, 2, 9):
        x = values((tokens, 8), torch.bfloat16)
        assert_same(compiled(x), layer(x, q, scale, bias) * 2)
