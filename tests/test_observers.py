"""Calibration: the same bits for any order, split, restart and number of ranks; what follows."""

import copy
import math
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.observers import METHODS, MovingAverage, Observer, Stats

ROOT = Path(__file__).resolve().parent.parent
F8 = torch.float8_e4m3fn
FORMS = {
    "tensor": {},
    "channel": {"counts": True},
    "token": {"counts": True},
    "group": {"group_size": 5, "counts": True},
}


def batches(dtype=torch.float32, count=7, rows=3):
    """Numbers of all sizes, with signed zeros."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, rows, 6, 16, generator=generator)
    x = x * torch.logspace(-3, 1, count)[:, None, None, None]
    x[:, 0, :, 3] = 0.0
    x[:, 1, :, 3] = -0.0
    return list(x.to(dtype))


def model():
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 8)
    return torch.nn.Sequential(*layers, torch.nn.Conv1d(6, 2, 1)).eval()


def seen(parts, granularity="tensor", **form):
    observer = Observer(granularity, **form)
    for x in parts:
        observer.update(x)
    return observer


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---- one state, whatever the way there ----------------------------------------------------------------


@pytest.mark.parametrize("granularity", FORMS)
@given(data=st.data())
@settings(deadline=None, max_examples=10)
def test_any_order_and_any_split(granularity, data):
    parts = batches()
    parts[2][0, 0, 0], parts[4][1, 2, 3] = math.nan, -math.inf
    form = FORMS[granularity]
    whole = seen([torch.cat(parts)], granularity, **form)
    order = data.draw(st.permutations(range(len(parts))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(parts)), max_size=3)))
    merged = Observer(granularity, **form)
    for a, b in zip([0, *cuts], [*cuts, len(parts)], strict=True):
        merged.merge(seen([parts[i] for i in order[a:b]], granularity, **form))
    assert equal(merged, whole)


@pytest.mark.parametrize("form", FORMS)
def test_a_restart_from_saved_state(form, tmp_path):
    net, parts = model()[:1], batches()
    options = {"granularity": form, **FORMS[form]}
    with quantkit.observe(net, **options) as whole:
        for x in parts:
            net(x)
    with quantkit.observe(net, **options) as first:
        for x in parts[:3]:
            net(x)
    first.save(tmp_path / "stats.pt")
    save_file(first.state_dict(), tmp_path / "stats.safetensors")
    again = [
        Stats.load(tmp_path / "stats.pt"),
        Stats.from_state_dict(load_file(tmp_path / "stats.safetensors")),
    ]
    for stats in again:
        with quantkit.observe(net, into=stats, **options) as same:
            for x in reversed(parts[3:]):
                net(x)
        assert same is stats and equal(stats, whole)
        assert stats.qparams("mse") == whole.qparams("mse")


def test_batches_within_inference_mode_and_outside():
    parts = batches()
    for first in (0, 1):
        mixed = Observer()
        for number, x in enumerate(parts):
            with torch.inference_mode(number % 2 == first):
                if number == 3:
                    mixed = Observer.from_state_dict(mixed.state_dict())
                if number == 4:
                    mixed = Observer().merge(mixed)
                mixed.update(x * 1)
        assert equal(mixed, seen(parts, "tensor"))


def test_threads_see_everything():
    from concurrent.futures import ThreadPoolExecutor

    net, parts = model(), batches()
    with torch.no_grad(), quantkit.observe(net) as stats, ThreadPoolExecutor(4) as pool:
        list(pool.map(net, parts * 5))
    assert equal(stats["0"], seen(parts * 5))


# ---- what is seen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_counts(dtype):
    parts = batches(dtype)
    observer = seen(parts)
    x = torch.cat(parts).float()
    assert observer.min == x.min() and observer.max == x.max()
    bits = x.numpy().view(np.uint32) >> 16
    expected = np.bincount(bits.ravel(), minlength=65536)  # positive numbers first
    expected = np.concatenate([expected[32768:], expected[:32768]])
    assert (observer.counts[0].numpy() == expected).all()
    assert observer.seen.tolist() == [x.numel(), 0, 0, 0]


def test_float64_is_rounded_and_what_overflows_is_infinite():
    observer = seen([torch.tensor([1 / 3, 1e300, -1e300, 1e-300], dtype=torch.float64)])
    assert observer.seen.tolist() == [2, 0, 1, 1]
    assert observer.max == torch.tensor(1 / 3) and observer.min == 0


def test_nan_and_infinities_are_counted_and_left_out():
    quiet, small = torch.tensor([0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    x = torch.stack([quiet, small, -quiet, *torch.tensor([math.inf, -math.inf, -math.inf, 2, -3])])
    observer = seen([x])
    assert observer.seen.tolist() == [2, 3, 1, 2]
    assert (observer.min, observer.max) == (-3, 2) and observer.counts.sum() == 2
    assert "3 NaN, 3 infinite" in repr(observer)
    for method in METHODS:
        with pytest.raises(ValueError, match="3 NaN and 3 infinite"):
            observer.qparams(method)
        clean = seen([torch.tensor([2.0, -3.0])]).qparams(method)
        assert observer.qparams(method, allow_nonfinite=True) == clean


def test_a_channel_without_a_finite_number():
    x = torch.tensor([[1.0, math.nan], [-2.0, math.inf]])
    observer = seen([x], "channel", counts=True)
    assert observer.min.tolist() == [[-2.0, math.inf]] and observer.max[0, 1] == -math.inf
    for method in METHODS:
        scale = observer.qparams(method, allow_nonfinite=True).scale
        assert scale[0, 1] == torch.tensor(1e-8) and scale[0, 0] > 0.01


def test_signed_zeros_have_an_order():
    zeros = [torch.tensor([0.0]), torch.tensor([-0.0])]
    for parts in (zeros, zeros[::-1], [torch.cat(zeros)]):
        observer = seen(parts)
        assert math.copysign(1, observer.min) == -1 and math.copysign(1, observer.max) == 1


def test_empty_batches_change_nothing():
    observer, untouched = seen(batches()), seen(batches())
    observer.update(torch.empty(0, 16))
    assert equal(observer, untouched)
    empty = seen([torch.empty(3, 0)])
    assert empty.size == 0 and empty.min.shape == (0,)
    with pytest.raises(ValueError, match="no number was seen"):
        empty.qparams()
    assert equal(Observer().merge(observer), observer) and equal(observer.merge(empty), untouched)


def test_any_strides_and_many_chunks(monkeypatch):
    monkeypatch.setattr("quantkit.observers.counts._CHUNK", 50)
    x = torch.randn(16, 9, 4).transpose(0, 2)[:, ::2]
    for form, options in FORMS.items():
        assert equal(seen([x], form, **options), seen(x.contiguous().split(1), form, **options))


# ---- what is chosen ------------------------------------------------------------------------------------

BLOCKS = {"tensor": None, "channel": [-1, -1, 1], "token": [-1, 1, -1], "group": [-1, -1, 5]}


@pytest.mark.parametrize("granularity", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minmax_has_the_bits_of_choosing_from_everything(granularity, dtype):
    observer = seen(batches(dtype), granularity, **FORMS[granularity])
    x = torch.cat(batches(dtype))
    given = {"block_size": BLOCKS[granularity], "compute_dtype": torch.float32}
    for options in (
        {},
        {"dtype": "int4"},
        {"dtype": F8},
        {"scale_rule": "half_range"},
        {"eps": 1.0},
    ):
        p = observer.qparams(**options)
        assert p == quantkit.get_symmetric_qparams(x, **given, **options)
        quantkit.quantize_tensor(x[..., :10] if p.dtype == "int4" else x, p)
    for options in ({}, {"dtype": torch.uint8, "round_first": True}, {"include_zero": False}):
        p = observer.qparams(sym=False, **options)
        assert p == quantkit.get_asymmetric_qparams(x, **{"include_zero": True} | given | options)


def upper(numbers, k):
    """The end, away from -inf, of the bin of the k-th smallest number."""
    bits = int(np.sort(numbers)[k - 1].view(np.uint32))
    bits = bits & 0xFFFF0000 if bits >> 31 else bits | 0xFFFF
    return np.array(bits, np.uint32).view(np.float32)


@pytest.mark.parametrize("percentile", [50, 90.5, 99.9, 100])
def test_percentile_by_numpy(percentile):
    observer = seen(batches())
    x = torch.cat(batches()).numpy().ravel()
    x[x == 0] = 0  # the bins of -0.0 and 0.0 hold one number
    part = Fraction(str(percentile)) / 100
    limit = min(upper(np.abs(x), math.ceil(len(x) * part)), np.abs(x).max())
    low, high = observer.range("percentile", percentile=percentile)
    assert (low, high) == (-limit, limit) and (np.abs(x) <= limit).mean() >= part
    k = math.ceil(len(x) * (1 + part) / 2)
    low, high = observer.range("percentile", percentile=percentile, sym=False)
    assert high == min(upper(x, k), x.max()) and low == max(-upper(-x, k), x.min())
    assert ((x >= low.item()) & (x <= high.item())).mean() >= part


def searched(x, sym):
    """The same search in numpy: one number at a time of each bin, sums of exact fractions."""
    bits, counts = np.unique(x.view(np.uint32) >> 16, return_counts=True)
    middle = np.where(bits & 0x7FFF < 0x80, bits & 0x8000, bits) << 16
    middle |= np.where(bits & 0x7FFF < 0x80, 0, 0x8000).astype(np.uint32)
    v = np.clip(middle.view(np.float32), x.min(), x.max())
    best = None
    for i in range(100):
        low, high = (np.float32(np.float64(t) * (128 - i) / 128) for t in (x.min(), x.max()))
        if sym:
            scale = max(np.float32(max(abs(low), abs(high)) / np.float32(127)), np.float32(1e-8))
            zero = np.float32(0)
        else:
            low, high = min(low, np.float32(0)), max(high, np.float32(0))
            scale = max(np.float32((high - low) / np.float32(255)), np.float32(1e-8))
            zero = np.clip(np.float32(-128) - np.rint(low / scale), -128, 127)
        q = np.clip(np.rint(v / scale + zero), -128, 127)
        e = ((q - zero) * scale).astype(np.float64) - v
        error = math.fsum(e * e * counts)
        if best is None or error < best[0]:
            best = error, scale, zero
    return best[1:]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("shape", ["normal", "outliers", "positive"])
def test_mse_by_numpy(sym, shape):
    torch.manual_seed(3)
    x = torch.randn(20_000)
    if shape == "outliers":
        x[::1000] *= 300
    x = x.abs() + 0.5 if shape == "positive" else x
    p = seen(x.split(777)).qparams("mse", sym=sym)
    scale, zero = searched(x.numpy(), sym)
    assert (p.scale.item(), p.zero_point.item()) == (scale, zero)
    if shape == "outliers":
        plain = seen([x]).qparams(sym=sym)
        assert quantkit.measure(x, p).sqnr_db > quantkit.measure(x, plain).sqnr_db


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", F8, torch.float8_e5m2])
def test_every_format_by_every_method(dtype):
    observer = seen(batches())
    x = torch.cat(batches())
    for method in METHODS:
        for sym in (True, False) if dtype in ("int8", "uint8", "int4") else (True,):
            p = observer.qparams(method, dtype=dtype, sym=sym)
            assert quantkit.fake_quantize(x, p).isfinite().all()


def test_input_scales_have_the_names_of_files():
    net = model()
    with torch.no_grad(), quantkit.observe(net, include=["0", "re:2$"]) as stats:
        for x in batches():
            net(x)
    tensors = stats.input_scales("percentile")
    assert {k: (t.shape, t.dtype) for k, t in tensors.items()} == {
        "0.input_scale": ((1,), torch.float32), "2.input_scale": ((1,), torch.float32),
    }  # fmt: skip
    assert tensors["2.input_scale"] == stats["2"].qparams("percentile").scale
    tensors = stats.input_scales(sym=False, dtype=torch.uint8)
    assert tensors["0.input_zero_point"].dtype == torch.uint8 and len(tensors) == 4
    for dtype, kept in (("int4", torch.int8), ("uint4", torch.uint8), ("int16", torch.int16)):
        tensors = stats.input_scales(sym=False, dtype=dtype)
        p = stats["0"].qparams(sym=False, dtype=dtype)
        assert tensors["0.input_zero_point"].dtype == kept
        assert tensors["0.input_zero_point"] == p.zero_point
    with quantkit.observe(net, granularity="channel") as stats:
        net(batches()[0])
    with pytest.raises(ValueError, match=r"'0': input_scale needs"):
        stats.input_scales()


# ---- hooks ---------------------------------------------------------------------------------------------


def test_which_layers():
    net = torch.nn.ModuleDict({"a": model(), "b": model()})
    linear = ["a.0", "a.2", "b.0", "b.2"]

    def names(**options):
        with quantkit.observe(net, **options) as stats:
            return list(stats)

    assert names() == linear
    assert names(include="a.*") == linear[:2]
    assert names(include="a.*", exclude=["re:.*2"]) == ["a.0"]
    assert names(types=(torch.nn.Conv1d, torch.nn.GELU)) == ["a.1", "a.3", "b.1", "b.3"]
    for options in ({"include": "c*"}, {"exclude": ["a*", "re:0"]}, {"types": torch.nn.ReLU}):
        with pytest.raises(
            ValueError, match=r"matches no layer of types|layers of types ReLU, got none"
        ):
            names(**options)


def test_layers_with_two_names_and_layers_that_do_not_run():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16), "b": torch.nn.Linear(16, 16)})
    net["c"] = net["a"]
    with quantkit.observe(net, include=["b", "c"]) as stats:
        net["c"](batches()[0])
    assert list(stats) == ["b", "c"]
    with pytest.raises(ValueError, match=r"^'b': no number was seen: .*exclude="):
        stats.qparams()
    with quantkit.observe(net, exclude="b") as stats:
        net["c"](batches()[0])
    assert list(stats.qparams()) == ["a"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_own_transformer():
    """It never calls out_proj, and makes nested tensors where a mask names padding."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = torch.nn.TransformerEncoder(layer, 1).eval()
    x, mask = torch.randn(2, 3, 16), torch.tensor([[False] * 3, [False, True, True]])
    for padding, tokens in ((None, 6), (mask, 4)):
        with torch.no_grad(), quantkit.observe(net) as stats:
            net(x, src_key_padding_mask=padding)
        assert {n: int(o.seen[0]) for n, o in stats.items()} == {
            "layers.0.linear1": tokens * 16, "layers.0.linear2": tokens * 32,
        }  # fmt: skip
        assert stats["layers.0.linear1"].rank == 3 and len(stats.qparams("mse")) == 2


def test_compiled_models_run_their_hooks():
    net, parts = model()[:3], batches()
    compiled = torch.compile(net, backend="eager")
    part = torch.nn.Sequential(torch.compile(net[0], backend="eager"), *net[1:])
    with quantkit.observe(net) as expected:
        for x in parts:
            net(x)
    for run in (compiled, part):
        for observed in (net, run):
            run(parts[0])
            with quantkit.observe(observed) as stats, quantkit.observe(net) as other:
                for x in parts:
                    run(x)
            assert list(stats) == ["0", "2"] and equal(stats, expected) and equal(other, expected)
            run(parts[0])
            assert equal(stats, expected)


def test_hooks_go_and_keywords_are_read():
    net, x = model(), batches()[0]
    before = net(x)
    with pytest.raises(KeyError), quantkit.observe(net) as stats:
        assert torch.equal(net(x), before)
        net[0](input=x)
        raise KeyError
    assert stats["0"].seen[0] == 2 * x.numel() and not net[0]._forward_pre_hooks
    net(x)
    assert stats["0"].seen[0] == 2 * x.numel()


def test_a_model_that_is_a_layer():
    layer = torch.nn.Linear(16, 2)
    with quantkit.observe(layer) as stats:
        layer(batches()[0])
    again = Stats.from_state_dict(stats.state_dict())
    assert list(again) == [""] and equal(again, stats)
    assert list(stats.input_scales()) == ["input_scale"]


def test_errors_name_the_layer_and_the_argument():
    net = model()
    text = r"input of '0': x: expected a tensor of floats"
    with pytest.raises(TypeError, match=text), quantkit.observe(net):
        net[0](torch.ones(2, 16, dtype=torch.int64))
    text, tokens = r"input of '0'.*'token'.*expected 6, got 5", {"granularity": "token"}
    with pytest.raises(ValueError, match=text), quantkit.observe(net, include="0", **tokens):
        net[0](torch.ones(6, 16))
        net[0](torch.ones(5, 16))
    for options in ({"granularity": "row"}, {"granularity": "group"}, {"group_size": 4}):
        with pytest.raises(ValueError, match=r"granularity|group_size"):
            Observer(**options)
    with pytest.raises(ValueError, match="needs dimension"):
        seen([torch.ones(3)], "token")
    observer = seen([torch.ones(3, 2)], "channel")
    for call, match in (
        (lambda: observer.qparams("median"), "method: expected one of minmax"),
        (lambda: observer.qparams("mse"), "needs counts=True"),
        (lambda: seen([torch.ones(3)]).qparams("percentile", percentile=0), "percentile"),
        (lambda: seen([torch.ones(3)]).qparams(sym=False, scale_rule="ceil"), "scale_rule"),
        (lambda: observer.merge(Observer()), "observe differently"),
        (lambda: observer.merge(seen([torch.ones(3, 4)], "channel")), "expected 2, got 4"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    ones = seen([torch.ones(3)])
    for call, match in (
        (lambda: ones.qparams("percentile", percentile=math.nan), "percentile: .*got nan"),
        (lambda: ones.qparams("percentile", percentile=True), "percentile: .*got True"),
        (lambda: ones.qparams(rank=-1), "rank: expected a number of dimensions, got -1"),
        (
            lambda: seen([torch.full((3,), math.nan)]).qparams(allow_nonfinite=True),
            "finite .*: 3 NaN",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    for call, match in (
        (lambda: ones.qparams("percentile", percentile=None), "percentile: .*got NoneType"),
        (lambda: ones.range("mse", bits=3), "range: expected options .*got 'bits'"),
        (lambda: Observer(counts="no"), "counts: expected a bool, got str"),
        (lambda: ones.qparams(sym="no"), "sym: expected a bool, got str"),
        (lambda: ones.qparams(sym=None), "sym: expected a bool, got NoneType"),
        (lambda: ones.range(include_zero=None), "include_zero: .*got NoneType"),
        (lambda: ones.qparams(allow_nonfinite="no"), "allow_nonfinite: expected a bool, got str"),
        (lambda: ones.qparams(rank=1.5), "rank: expected an int, got float"),
        (lambda: Stats({}).merge(3), "other: expected Stats, got 3"),
        (lambda: Stats.from_state_dict([1]), "state: expected that of Stats, got list"),
    ):
        with pytest.raises(TypeError, match=match):
            call()
    assert [t.tolist() for t in ones.range("mse", sym=True)] == [[1.0], [1.0]]
    for options, error, match in (
        ({"model": {}}, TypeError, "model: expected a torch.nn.Module, got dict"),
        (
            {"types": "Linear"},
            TypeError,
            "types: expected a class of layers or a tuple of classes, got 'Linear'",
        ),
        ({"types": (torch.nn.Linear, 3)}, TypeError, "types: expected a class .*, got 3"),
        ({"types": ()}, TypeError, "types: expected a class .*, got tuple"),
        ({"into": {}}, TypeError, "into: expected Stats or None, got dict"),
        ({"include": None}, TypeError, "include: expected a list of patterns, got NoneType"),
        ({"exclude": [1]}, TypeError, "exclude: expected a list of patterns, got 1 among them"),
        ({"include": "re:("}, ValueError, r"include: pattern 're:\('"),
        ({"exclude": "*"}, ValueError, "exclude: expected some layer"),
        (
            {"model": torch.nn.ReLU()},
            ValueError,
            "model: expected layers of types Linear, got none",
        ),
    ):
        with pytest.raises(error, match=match), quantkit.observe(**{"model": net, **options}):
            pass
    with quantkit.observe(net) as stats:
        pass
    for options, match in (
        ({"include": "0"}, "layers differ: '2'"),
        ({"counts": False}, "another"),
    ):
        with pytest.raises(ValueError, match=match), quantkit.observe(net, into=stats, **options):
            pass


def test_spoiled_states_are_errors():
    state = seen(batches()).state_dict()
    for name, value in (
        ("form", torch.tensor([0, 0, -1, 1, 1])),
        ("form", torch.tensor([9, 0, -1, 1, 1, 3])),
        ("form", torch.tensor([0, 0, -1, 1, 0, 3])),
        ("form", torch.tensor([0, 0, -1, 1, 5, 3])),
        ("form", torch.tensor([0, 0, -1, 1, 1, 65])),
        ("extremes", state["extremes"].long()),
        ("counts", state["counts"][:, :7]),
        ("counts", -state["counts"]),
        ("counts", None),
        ("seen", 3),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            Observer.from_state_dict(state | {name: value})
    with pytest.raises(ValueError, match=r"^state of 'a': form: expected"):
        Stats.from_state_dict({"a.weight": torch.ones(3)})


def test_stats_can_be_copied_and_pickled():
    with quantkit.observe(model(), include="0") as stats:
        stats.update("0", batches()[0])
    for other in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert equal(other, stats)
        other.update("0", batches()[1])
        assert not equal(other, stats)


# ---- moving averages -----------------------------------------------------------------------------------


def test_moving_average_by_numpy():
    average = MovingAverage(momentum=0.25)
    parts = batches()
    parts[3][0, 0, 0] = math.nan
    low = high = None
    for x in parts:
        average.update(x)
        y = x[x.isfinite()].numpy()
        step = np.float32(0.25)
        low = y.min() if low is None else low + (y.min() - low) * step
        high = y.max() if high is None else high + (y.max() - high) * step
    assert (average.min.item(), average.max.item()) == (low, high) and average.seen[1] == 1
    assert average.qparams(sym=False, allow_nonfinite=True).scale.dim() == 0
    again = MovingAverage.from_state_dict(average.state_dict(), momentum=0.25)
    assert again.momentum == 0.25 and equal(again, average)
    for call in (lambda: average.merge(again), average.all_reduce):
        with pytest.raises(ValueError, match=r"moving averages|all_ranks"):
            call()
    with pytest.raises(ValueError, match="momentum"):
        MovingAverage(momentum=0)


# ---- import quantkit does not wait for it --------------------------------------------------------------


def test_it_is_imported_when_asked_for(torch_process):
    program = """
import sys, quantkit
assert "observe" in dir(quantkit) and "quantkit.observers" not in sys.modules
assert callable(quantkit.observe) and quantkit.observers.observe is quantkit.observe
assert "observe" in vars(quantkit)
try:
    quantkit.observed
except AttributeError as error:
    assert str(error) == "module 'quantkit' has no attribute 'observed'"
"""
    done = torch_process.run(program, ROOT)
    assert done.returncode == 0, done.stderr
