"""DTensors: the bits of the whole tensor. Ranks are processes; lib.shards has what they run."""

import collections
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from lib.ranks import Ranks

import quantkit

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "distributed.md"
# The whole table takes a quarter of an hour on two ranks or more.
CASES = int(os.environ.get("QUANTKIT_DISTRIBUTED_CASES", "250"))
SEED = int(os.environ["QUANTKIT_SEED"])


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def three():
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def test_the_table_of_placements_and_operators(two):
    found = two.run("table.table", seed=SEED, cases=60)
    print(found)


def test_given_parameters_of_any_granularity_and_place(two):
    two.run("operators.given_parameters")


def test_raw_operators_and_what_is_refused(two):
    out, linear, *learned, plain, divides, eps, packed, mesh = two.run("operators.raw_operators")
    assert (
        out == "quantkit.quantize.out: expected plain tensors, got a DTensor; call it without out="
    )
    assert linear == "linear_w8a8: expected plain tensors, got a DTensor; pass to_local()"
    text = "scale, zero_point: no gradient over a DTensor's shards; pass detached ones"
    assert learned == [text] * 2
    assert plain == "x: expected a DTensor, as scale is one"
    assert divides.startswith("block_size: 4 does not divide 9, the size of dimension 0 of x;")
    assert eps == "eps: expected a number above 0, got -1.0"
    assert packed == (
        "DTensor: shards of 6 elements over 2 ranks do not end with whole bytes of 2 codes; "
        "shard another dimension"
    )
    expected = "DTensors of x's mesh, DeviceMesh((2,), 'cpu', stride=(1,)), got DeviceMesh((dp=2)"
    assert mesh.startswith(f"scale, zero_point, global_scale, seed: expected {expected}")


def test_functions_that_take_plain_tensors(two):
    for name, message in two.run("operators.plain_alone").items():
        expected = "expected plain tensors, got a DTensor; pass full_tensor() or to_local()"
        assert message == f"{name}: {expected}"


def test_shards_that_torch_chunk_would_not_cut(two):
    expected = "DTensor: expected a local shard of shape (5, 16), as torch.chunk cuts, got "
    said = [expected + str(shape) for shape in ((4, 16), (6, 16))]
    assert two.run("operators.other_shards") == said


def test_ranks_outside_of_the_mesh(two):
    two.run("operators.outside")


def test_layouts_of_results_are_those_of_the_whole(two):
    two.run("operators.layouts")


def test_compiled_calls(two):
    two.run("compiled.compiled", backend="aot_eager")


@pytest.mark.full
def test_calls_compiled_by_inductor(two):
    two.run("compiled.compiled", backend="inductor")


@pytest.mark.full
def test_no_rank_gets_the_graph_of_another(tmp_path):
    """Compiled first, then found on the disk."""
    for _ in range(2):
        ranks = Ranks(2, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        ranks.run("compiled.graphs")
        ranks.close()


def test_training_under_ddp_and_fsdp2(two):
    two.run("training.training")


def test_tensor_parallel_under_fsdp2(two):
    assert two.run("training.parallel") == ["Shard", "_StridedShard"]


def test_models_are_quantized_where_their_shards_are(two, tmp_path):
    two.run("models.quantized_models", folder=str(tmp_path))
    two.run("models.quantized_convolutions")


def test_models_of_codes_are_wrapped(two, tmp_path):
    two.run("models.ddp", schemes=list(quantkit.SCHEMES))
    two.run("models.fsdp2", folder=str(tmp_path), schemes=["int8_channel", "mxfp8"])


@pytest.mark.full
def test_fsdp2_of_codes_of_every_scheme(two, tmp_path):
    two.run("models.fsdp2", folder=str(tmp_path), schemes=list(quantkit.SCHEMES))


def test_models_that_cannot_be_quantized_where_they_are(two, tmp_path):
    *wrapped, plain, int8, spoiled, uneven, hooks = two.run(
        "models.refused_models", folder=str(tmp_path)
    )
    kinds = [("FSDPModule", " in 0"), ("FSDPModule", ""), ("DistributedDataParallel", "")]
    for message, (kind, place) in zip(wrapped, [*kinds, kinds[0]], strict=True):
        assert message == (
            f"model: expected no {kind}, which keeps the layers' parameters, got one{place}; "
            "replace layers first, then wrap or shard"
        )
    assert plain.endswith("expected a plain tensor, got a DTensor; load first, then shard")
    text = "up (Linear): activations: expected None for a weight that is a DTensor, got 'int8'"
    assert int8 == text
    assert spoiled == "up (Linear): weight: expected finite numbers, got NaN or an infinity"
    assert uneven.startswith("0 (Conv2d): Cannot flatten unevenly sharded tensor: dimension 1")
    assert hooks.endswith("without hooks, which would be lost, got forward_hooks")


def test_observers_of_all_ranks(two):
    two.run("observers.observed")
    assert "different layers" in two.run("observers.idle")


def test_observers_count_each_element_once(two):
    cut, average = two.run("observers.observed_shards")
    assert cut == "DTensor: borders of shards cut groups of 5"
    assert average == "update: a DTensor needs all_ranks=True"


def test_distributed_checkpoints(two, three, tmp_path):
    """Saved by two ranks; loaded by two and by three, and on each by one alone."""
    two.run("checkpoints.save_checkpoint", folder=str(tmp_path))
    two.run("checkpoints.load_checkpoint", folder=str(tmp_path))
    three.run("checkpoints.load_checkpoint", folder=str(tmp_path))


def test_bytes_on_the_wire_are_those_of_the_page(two):
    rows = two.run("traffic.traffic")
    print(rows)
    page = PAGE.read_text()
    assert [row for row in rows if f"\n| {' | '.join(row)} | " not in page] == []


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
def test_the_whole_table(world, request):
    """QUANTKIT_DISTRIBUTED_CASES=4000: the table of docs/distributed.md."""
    ranks, found = (
        request.getfixturevalue({2: "two", 4: "four"}[world]),
        collections.Counter(),
    )
    for part in range(0, CASES, 250):
        found += ranks.run("table.table", seed=SEED + part, cases=min(250, CASES - part))
    print(world, "ranks:", dict(found))
    assert found["cases"] == CASES


@pytest.mark.full
def test_four_ranks(four, tmp_path):
    rows = four.run("traffic.traffic", sizes=[2, 2])
    print(rows)
    page = dict(re.findall(r"^\| (`.*?) \| .*? \| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE))
    assert [row for row in rows if page.get(row[0]) != row[1]] == []
    four.run("operators.given_parameters")
    assert four.run("training.parallel") == ["Shard", "_StridedShard"]
    four.run("training.training")
    four.run("observers.observed")
    four.run("observers.idle")
    four.run("observers.observed_shards")
    four.run("models.quantized_models", folder=str(tmp_path / "models"))
    four.run("checkpoints.save_checkpoint", folder=str(tmp_path / "states"))
    four.run("checkpoints.load_checkpoint", folder=str(tmp_path / "states"))


# ---- faults of torch that are gone some day: then docs/distributed.md may lose a line ------------------


def test_torch_leaves_lists_out_of_the_sharding_cache(two):
    """Why operators have rules of their own, and none of register_sharding."""
    assert two.run("faults.sharding_cache") == [[1]], "mended: register_sharding serves int[] now"


def test_gloo_loses_nan_in_a_maximum(two):
    floats, keys = two.run("faults.maximum_of_nan")
    assert keys
    assert not floats, "mended: a maximum of floats keeps NaN"


# ---- without DTensors ---------------------------------------------------------------------------------


def test_nothing_is_imported_without_dtensors(torch_process):
    program = """
import sys, torch, quantkit
q, p = quantkit.quantize(torch.randn(4, 8), "int8_token")
quantkit.fake_quantize(torch.randn(4, 8, requires_grad=True), p).sum().backward()
try:
    quantkit.dynamic_quantize(torch.randn(4), eps=-1.0)
except ValueError:
    pass
assert not {"torch.distributed.tensor", "quantkit.distributed"} & set(sys.modules)
import torch.distributed.tensor
try:
    quantkit.dynamic_quantize(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
except TypeError:
    pass
assert "quantkit.distributed" not in sys.modules
"""
    done = torch_process.run(program, ROOT)
    assert done.returncode == 0, done.stderr


def alone(torch_process, tmp_path, program):
    """Runs a program in a new process, which is the only rank of its group."""
    text = f"""
import torch, quantkit
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
mesh, x = dist.init_device_mesh("cpu", (1,)), torch.randn(4, 8)
d, whole = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(torch.ones(()), mesh, [Replicate()])
{program}
dist.destroy_process_group()
"""
    done = torch_process.run(text, ROOT)
    assert done.returncode == 0, done.stderr


def test_operators_before_their_rules_are_loaded(torch_process, tmp_path):
    program = """
choose = torch.ops.quantkit.choose_qparams
given = [1, -1], -128, 127, 1e-8, False
try:
    choose(d, *given)
except NotImplementedError as error:
    assert "quantkit.choose_qparams.default does not have a sharding strategy" in str(error), error
else:
    raise AssertionError
quantkit.aminmax(d)  # loads them
assert torch.equal(choose(d, *given)[0].to_local(), choose(d.to_local(), *given)[0])
"""
    alone(torch_process, tmp_path, program)


@pytest.mark.parametrize("call, error", [
    ('quantkit.quantize(x, "nvfp4", global_scale=whole)', "expected a DTensor, as global_scale is"),
    ("torch.func.grad(lambda t: quantkit.fake_quantize(t, p).sum())(d)", None),
])  # fmt: skip
def test_first_calls(torch_process, tmp_path, call, error):
    program = f"""
p, said = quantkit.QuantizationParams(0.1, 0.0, -8, 7), "None"
try:
    {call}
except RuntimeError as raised:
    said = str(raised)
assert {str(error)!r} in said, said
"""
    alone(torch_process, tmp_path, program)


def test_a_torch_without_such_rules(torch_process, tmp_path):
    program = """
del torch.library.register_torch_dispatch
for _ in range(2):
    try:
        quantkit.quantize(d, "int8_token")
    except RuntimeError as error:
        assert str(error).endswith("has no rules for DTensors; pass to_local()"), error
    else:
        raise AssertionError
quantkit.quantize(d.to_local(), "int8_token")
"""
    alone(torch_process, tmp_path, program)


# ---- the page -----------------------------------------------------------------------------------------


def test_recipes_run_under_torchrun(tmp_path):
    program = "\n".join(re.findall(r"```python torchrun\n(.*?)```", PAGE.read_text(), re.DOTALL))
    (tmp_path / "recipes.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "recipes.py"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"^# prints (.*)$", program, re.MULTILINE)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
