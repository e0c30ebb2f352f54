"""Whether `out` shares memory: exact beside brute force, decided without sorting, in little memory."""

import contextlib
import itertools
import random
import resource
from pathlib import Path

import pytest
import torch
from lib.cases import STRIDES

from quantkit import _load, _overlap

ops = torch.ops.quantkit
pytestmark = pytest.mark.fallback
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)
GIB = 1 << 30


def bytes_of(t):
    """The address of every byte of every element."""
    found = []
    for index in itertools.product(*map(range, t.shape)):
        steps = sum(i * s for i, s in zip(index, t.stride(), strict=True))
        at = t.data_ptr() + steps * t.element_size()
        found += range(at, at + t.element_size())
    return found


def error_of(q, out):
    """What the operator says of its output, or None."""
    try:
        ops.dequantize.out(q, ONE, ZERO, out=out)
    except RuntimeError as error:
        return str(error)


def compare(q, out, itself, both):
    """Python's functions, the operator (the extension's code, or the fallback's), and the truth."""
    assert _overlap.with_itself(out) == itself
    assert _overlap.between(q, out) == _overlap.between(out, q) == both
    expected = None
    if itself:
        expected = "out: its elements overlap each other in memory"
    elif both:
        expected = "out: overlaps q in memory"
    assert error_of(q, out) == expected, (q.shape, q.stride(), out.stride(), q.data_ptr())


def drawn(rng, memory, dtype, shape):
    whole = memory.view(dtype)
    while True:
        strides = [rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 7, 9, 12, 16)) for _ in shape]
        free = len(whole) - sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) - 1
        if free >= 0:
            return whole.as_strided(shape, strides, rng.randint(0, free))


@pytest.mark.parametrize("steps", [_overlap._STEPS, 2, 0])
def test_small_tensors_beside_brute_force(steps, monkeypatch):
    """Also where every search ends at once, so that Python sorts."""
    monkeypatch.setattr(_overlap, "_STEPS", steps)
    rng, memory = random.Random(steps), torch.zeros(240, dtype=torch.uint8)
    count = 400 if _load.extension is None else 1200
    seen = set()
    for _ in range(count):
        shape = [rng.randint(1, 4) for _ in range(rng.randint(0, 4))]
        q = drawn(rng, memory, rng.choice((torch.int8, torch.int16, torch.float64)), shape)
        out = drawn(rng, memory, torch.float32, shape)
        q_bytes, out_bytes = bytes_of(q), bytes_of(out)
        itself = len(set(out_bytes)) < len(out_bytes)
        both = not set(q_bytes).isdisjoint(out_bytes)
        compare(q, out, itself, both)
        seen.add((itself, both))
    assert len(seen) == 4


def test_usual_layouts_are_decided_without_sorting(monkeypatch):
    def addresses(*_):
        raise AssertionError("sorted")

    monkeypatch.setattr(_overlap, "_addresses", addresses)
    for shape in ((64, 96), (5, 8, 12), (3, 4, 6, 7)):
        x = torch.zeros(shape)
        for name, layout in STRIDES.items():
            assert _overlap.with_itself(layout(x)) == (name == "expanded")
            assert _overlap.between(layout(x.clone()), layout(x.clone())) is False
        memory = torch.zeros(4 * x.numel() + 64)
        whole = memory[: 2 * x.numel()].view(2 * shape[0], *shape[1:])
        wide = memory[: 2 * x.numel()].view(*shape[:-1], 2 * shape[-1])
        half = shape[-1]
        apart = [
            (whole[0::2], whole[1::2]), (wide[..., 0::2], wide[..., 1::2]),
            (wide[..., :half], wide[..., half:]), (whole[0::2].mT, whole[1::2].mT),
            (whole[: shape[0]], whole[shape[0] :]), (wide[..., 3::4], wide[..., 0::2]),
            (memory.view(torch.int8)[0::4], memory.view(torch.int8)[3::4]),
            (memory.view(torch.int8)[0::8], memory[1::2]), (memory[1::6], memory[0::3][::2]),
        ]  # fmt: skip
        meet = [
            (whole[0::2], whole[2::2]), (wide[..., 0::2], wide[..., :half]), (whole.mT, whole),
            (whole[0::2], wide), (memory.view(torch.int8)[3::8], memory[0::2]), (whole[3::2], memory),
        ]  # fmt: skip
        for right, pairs in ((False, apart), (True, meet)):
            for a, b in pairs:
                assert _overlap.between(a, b) == _overlap.between(b, a) == right


@contextlib.contextmanager
def little_memory(more):
    """Allocations of more bytes in all fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """16 GiB, of which the file system holds the pages that are written."""
    file = tmp_path_factory.mktemp("memory") / "sparse"
    with file.open("wb") as f:
        f.truncate(16 * GIB)
    yield torch.from_file(str(file), shared=True, size=16 * GIB, dtype=torch.uint8)
    file.unlink()


def test_doubtful_strides_are_sorted(memory, monkeypatch):
    """So many different strides that no search over them ends in time."""
    addresses, calls = _overlap._addresses, []
    monkeypatch.setattr(_overlap, "_addresses", lambda *a: calls.append(1) or addresses(*a))
    rng, shape = random.Random(3), (2,) * 10
    codes, floats = memory.view(torch.int8), memory.view(torch.float32)
    for turn in range(6):
        out = floats.as_strided(shape, [rng.randrange(1 << 17, 1 << 25) for _ in shape], 1 << 26)
        strides = [rng.randrange(1 << 19, 1 << 27) for _ in shape]
        q = codes.as_strided(shape, strides, 3 << 26)
        if turn % 2:  # one byte in common
            q_bytes, out_bytes = bytes_of(q), bytes_of(out)
            shift = sorted(out_bytes)[len(out_bytes) // 2] - sorted(q_bytes)[len(q_bytes) // 2]
            q = codes.as_strided(shape, strides, (3 << 26) + shift)
        both = not set(bytes_of(q)).isdisjoint(bytes_of(out))
        assert both or turn % 2 == 0
        with little_memory(64 << 20):
            compare(q, out, False, both)
    assert calls


def test_memory_for_the_elements_not_for_the_span(memory):
    codes, floats = memory.view(torch.int8), memory.view(torch.float32)
    shape, far = (2, 2, 3), (3 * GIB, 3 * GIB - 64, 1 << 20)
    q, quarters = codes.as_strided(shape, far), [s // 4 for s in far]
    outs = [floats.as_strided(shape, quarters, first) for first in (1, 1 << 18)]
    for near in (5, 2):
        outs.append(floats.as_strided(shape, (3 * GIB // 4, 3 * GIB // 4 - near, 1), 16))
    outs += [floats.as_strided(shape, strides, 16) for strides in ((2, 1, GIB), (1, 1, GIB + 3))]
    for out in outs:
        error_of(q, out)  # what torch allocates once
    answers = set()
    with little_memory(64 << 20):
        for out in outs:
            out_bytes = bytes_of(out)
            itself = len(set(out_bytes)) < len(out_bytes)
            both = not set(bytes_of(q)).isdisjoint(out_bytes)
            compare(q, out, itself, both)
            answers.add((itself, both))
    assert len(answers) == 3
