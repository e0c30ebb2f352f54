"""On a real GPU: cases against the reference on the CPU and on the GPU, and what only a device can show.
Skipped, with the reason, where there is none. (test_kernels.py and test_out.py run there too.)"""

import concurrent.futures
import subprocess
import sys

import pytest
import torch
from lib.cases import CODES, FLOATS, LAYOUTS, STRIDES, assert_same, given, invoke, values

import quantkit
from quantkit import reference
from quantkit.operators import OPERATORS, overloads

ops = torch.ops.quantkit


def why_not():
    if not quantkit.backend().cuda_archs:
        return "quantkit was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
CHOSEN = (-128, 127, 1e-8, False)


def on_gpu(t):
    """The same strides on the GPU; among arguments by name too."""
    if isinstance(t, dict):
        return {k: on_gpu(each) for k, each in t.items()}
    if not isinstance(t, torch.Tensor):
        return t
    if 0 in t.stride():
        return t[:1].to("cuda").expand(t.shape) if t.dim() else t.to("cuda")
    far = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
    return far.copy_(t)


def on_cpu(t):
    if isinstance(t, tuple):
        return tuple(on_cpu(each) for each in t)
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)


def check(name, *args):
    """The operator on the GPU, the reference on the CPU, and the reference on the GPU."""
    operator, function = overloads(name)[0], OPERATORS[name].reference
    right = invoke(function, args)
    far = [on_gpu(a) for a in args]
    assert_same(on_cpu(invoke(operator, far)), right)
    assert_same(on_cpu(invoke(function, far)), right)
    return right


def check_all(x, blocks, code, seed):
    low, high = CODES[code]
    scale, zero_point = given(x.shape, blocks, x.dtype, seed, integral=seed % 2 == 0)
    q = check("quantize", x, scale, zero_point, low, high, code)
    check("dequantize", q, scale, zero_point)
    check("fake_quantize", x, scale, zero_point, low, high)
    check("_fake_quantize_backward", x.neg(), x, scale, zero_point, low, high)
    symmetric = seed % 2 == 0
    check("choose_qparams", x, blocks, low, high, 1e-8, symmetric)
    measured = x, scale, zero_point, low, high, str(code).removeprefix("torch.")
    for over in (None, [1, *[-1] * (x.dim() - 1)], [-1] * (x.dim() - 1) + [1]):
        check("measure", *measured, {"over": over})
    check("measure_limbs", *measured, {"over": [200] * x.dim()})
    at_random = {"seed": torch.tensor([seed, -seed]), "index": [seed, *[seed + 1] * x.dim()]}
    check("quantize.format", *measured, at_random)
    check("fake_quantize.format", x, scale, None, -448, 448, "float8_e4m3fn", at_random)
    choose = {"seed": at_random["seed"]}
    check("quantize_dequantize.format", x, blocks, low, high, 1e-8, True, measured[-1], choose)
    check("aminmax", x, blocks)
    check("aminmax", q, None if blocks is None else [3] * x.dim())
    check("dynamic_quantize", x, blocks, low, high, 1e-8, symmetric, code)
    check("quantize_dequantize", x, blocks, low, high, 1e-8, symmetric, code)


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_granularity_and_layout(dtype, code):
    for i, (shape, blocks, name) in enumerate(LAYOUTS):
        x = STRIDES[name](values(shape, dtype, i, special=i % 3 == 0))
        check_all(x, blocks, code, i)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sizes_that_fill_the_device(dtype):
    shapes = [((8192, 4096), [1, -1]), ((8192, 4096), [1, 128]), ((3, 5_000_001), [1, -1])]
    shapes += [((5_000_001, 3), [-1, 1]), ((4096, 4100), None), ((4096, 4096), [128, 128])]
    for i, (shape, blocks) in enumerate(shapes):
        check_all(values(shape, dtype, i, special=True), blocks, torch.int8, i)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_length_and_misaligned_views(dtype):
    whole = values((600,), dtype, 1).cuda()
    one, zero = torch.tensor(0.25, dtype=dtype), torch.tensor(3.0, dtype=dtype)
    for n in range(1, 513):
        x = whole[n % 7 : n % 7 + n]
        out = torch.empty(n + 5, dtype=torch.int8, device="cuda")[n % 5 :][:n]
        ops.quantize.out(x, one, zero, -128, 127, torch.int8, out=out)
        assert_same(out.cpu(), reference.quantize_op(x.cpu(), one, zero, -128, 127, torch.int8))
        made = ops.dynamic_quantize(x, None, *CHOSEN, torch.int8)
        right = reference.dynamic_quantize_op(x.cpu(), None, *CHOSEN, torch.int8)
        assert_same(on_cpu(made), right)


def test_scalar_parameters_of_the_cpu_need_no_synchronisation():
    x = values((300, 500), torch.float32).cuda()
    scale, zero_point = torch.tensor(0.1), torch.tensor(3)
    far = scale.cuda(), zero_point.cuda()
    out = torch.empty(300, 500, dtype=torch.int8, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        q = ops.quantize(x, scale, zero_point, -128, 127, torch.int8)
        ops.quantize.out(x, *far, -128, 127, torch.int8, out=out)
        for blocks in (None, [1, -1], [-1, 1], [1, 100]):
            ops.quantize_dequantize(x, blocks, *CHOSEN, torch.int8)
        ops.fake_quantize(x, scale, zero_point, -128, 127)
        ops.dequantize(q, scale, zero_point)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert_same(q.cpu(), out.cpu())


@pytest.mark.parametrize("blocks", [None, [1, -1], [-1, 1], [128, 128]], ids=str)
def test_work_goes_to_the_current_stream(blocks):
    x = values((4096, 4096), torch.float32).cuda()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.mul_(2)
        made = ops.dynamic_quantize(x, blocks, *CHOSEN, torch.int8)
    stream.synchronize()
    right = reference.dynamic_quantize_op(x.cpu(), blocks, *CHOSEN, torch.int8)
    assert_same(on_cpu(made), right)


FIRST_CALL = """
import torch, quantkit
x = torch.randn(64, 512).bfloat16()
args = {blocks}, -128, 127, 1e-3, False, torch.int8
right = quantkit.reference.quantize_dequantize_op(x, *args)
names = ("q", "x_hat", "scale", "zero_point")
far, outs = x.cuda(), {{k: torch.empty_like(t, device="cuda") for k, t in zip(names, right)}}
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    torch.ops.quantkit.quantize_dequantize.out(far, *args, **outs)
graph.replay()
torch.cuda.synchronize()
assert all(torch.equal(outs[k].cpu(), t) for k, t in zip(outs, right))
"""


@pytest.mark.parametrize("blocks", [None, [1, -1], [-1, 1]], ids=str)
def test_the_first_call_of_a_process_can_be_captured(blocks):
    program = FIRST_CALL.format(blocks=blocks)
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_a_device_that_is_not_the_current_one():
    x = values((40, 50), torch.float32)
    far = x.to("cuda:1")
    made = ops.dynamic_quantize(far, [1, -1], *CHOSEN, torch.int8)
    assert made[0].device == far.device and torch.cuda.current_device() == 0
    assert_same(on_cpu(made), reference.dynamic_quantize_op(x, [1, -1], *CHOSEN, torch.int8))
    with pytest.raises(RuntimeError, match=r"scale: expected device cuda:1.*got cuda:0"):
        ops.quantize(far, made[1].to("cuda:0"), made[2], -128, 127, torch.int8)
    with concurrent.futures.ThreadPoolExecutor(
        1
    ) as fresh:  # a thread that has no current device yet
        again = fresh.submit(ops.dynamic_quantize, far, [1, -1], *CHOSEN, torch.int8).result()
    assert_same(on_cpu(again), on_cpu(made))


def test_refusals():
    x, p = values((40, 50), torch.float32).cuda(), torch.ones(())
    with pytest.raises(RuntimeError, match=r"scale: expected device cuda:0.*got cpu"):
        ops.quantize(x, torch.ones(40, 1), p, -128, 127, torch.int8)
    out = torch.ones(40, 50, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="out: expected device cuda:0, got cpu"):
        ops.quantize.out(x, p, p, -128, 127, torch.int8, out=out)
    with pytest.raises(RuntimeError, match="out: overlaps x"):
        ops.quantize.out(x, p, p, -128, 127, torch.int8, out=x.view(torch.int8)[:, :50])
    assert (out == 1).all()
    torch.cuda.synchronize()


@pytest.mark.parametrize("blocks", [None, [1, -1], [-1, 1], [1, 64]], ids=str)
def test_a_captured_graph_replays_on_new_data(blocks):
    x = values((256, 512), torch.bfloat16).cuda()
    args = (blocks, -128, 127, 1e-3, False, torch.int8)
    outs = {
        k: torch.empty_like(t)
        for k, t in zip(
            ("q", "x_hat", "scale", "zero_point"), ops.quantize_dequantize(x, *args), strict=True
        )
    }
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.quantize_dequantize.out(x, *args, **outs)
    for seed in (1, 2):
        x.copy_(values((256, 512), torch.bfloat16, seed))
        graph.replay()
        torch.cuda.synchronize()
        right = reference.quantize_dequantize_op(x.cpu(), *args)
        assert_same(on_cpu(tuple(outs.values())), right)


def test_a_captured_graph_takes_new_seeds():
    """Of the device's memory; a seed of the CPU stays that of the capture."""
    x, scale = values((256, 512), torch.bfloat16).cuda(), torch.tensor(0.1).cuda()
    seed, out = torch.tensor([1, 2]).cuda(), torch.empty(256, 512, dtype=torch.int8, device="cuda")
    args = (x, scale, None, -128, 127, "int8")
    ops.quantize.format(*args, seed=seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.quantize.format_out(*args, seed=seed, out=out)
    for words in ([3, 4], [-1, 2**40]):
        seed.copy_(torch.tensor(words))
        graph.replay()
        torch.cuda.synchronize()
        near = torch.tensor(words)
        right = reference.quantize_format_op(x.cpu(), scale.cpu(), *args[2:], seed=near)
        assert_same(out.cpu(), right)


def test_more_elements_than_32_bits_count():
    n = 2**31 + 40
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 10 GiB of the device's memory")
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-3], x[2**31 - 1], x[5] = 3.0, -7.0, 1.0
    q, scale, _ = ops.dynamic_quantize(x, None, -128, 127, 1e-3, True, torch.int8)
    assert scale.item() == (torch.tensor(7.0) / 127).to(torch.bfloat16).item()
    few = torch.tensor([3.0, -7.0, 1.0], dtype=torch.bfloat16)
    right = reference.quantize_op(
        few, scale.cpu(), torch.zeros((), dtype=few.dtype), -128, 127, torch.int8
    )
    assert q[[n - 3, 2**31 - 1, 5]].tolist() == right.tolist() and int((q != 0).sum()) == 3


def test_no_elements_and_no_launch():
    x = torch.empty(0, 3, device="cuda")
    assert ops.quantize(x, torch.tensor(1.0), torch.tensor(0.0), -128, 127, torch.int8).shape == (
        0,
        3,
    )
    with pytest.raises(RuntimeError, match="at least one element"):
        ops.choose_qparams(x, None, *CHOSEN)
    torch.cuda.synchronize()


def test_compiled_calls_give_the_same_bits():
    def function(x):
        q, x_hat, p = quantkit.quantize_dequant(x, True)
        return q, x_hat, quantkit.fake_quantize(x, p)

    x = values((128, 256), torch.bfloat16).cuda()
    with torch.no_grad():
        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(function, fullgraph=True, mode=mode)
            for _ in range(3):
                assert_same(on_cpu(compiled(x)), on_cpu(function(x)))
