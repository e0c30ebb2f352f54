"""Hostile and truncated weight files: the main job refuses each in one line, and runs nothing of it."""

import collections
import io
import json
import math
import os
import pickle
import re
import struct
import subprocess
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import quantkit
from benchmarks import real_weights

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
GOOD = save({"w": torch.arange(48.0).view(4, 12), "b": torch.ones(4)})
HEADER = 8 + int.from_bytes(GOOD[:8], "little")


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(path): the job refuses the file in one line that names it, and writes nothing."""

    def check(path, *texts):
        results = tmp_path / "results"
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            code = real_weights.main(["--weights", str(path), "--results", str(results)])
        printed = capsys.readouterr()
        assert code == 2 and not warned, (path, code, warned)
        lines = printed.err.splitlines()
        assert len(lines) == 1 and printed.err.endswith("\n"), printed.err
        assert lines[0].startswith("error: ") and path.name in lines[0], lines
        assert lines[0].isprintable(), ascii(lines[0])
        # torch's own message tells first how to load the file all the same; the line may end within that.
        assert not re.search("still be loaded|Re-running|we changed", lines[0]), lines
        assert all(text in lines[0] for text in texts), lines
        assert not results.exists()
        return lines[0]

    return check


@pytest.fixture
def accepted(tmp_path, capsys):
    """accepted(path): the job takes the file; the names of the tensors used, and what it printed."""

    def check(path):
        results = tmp_path / "results"
        code = real_weights.main(["--weights", str(path), "--results", str(results)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        rows = json.loads((results / "run.json").read_text())["tensors"]
        return {row["name"] for row in rows}, printed.out

    return check


# ---- safetensors ----------------------------------------------------------------------------------


def test_truncated_at_every_byte_of_the_header(tmp_path, refused):
    path = tmp_path / "cut.safetensors"
    ends = [*range(HEADER + 1), HEADER + 1, HEADER + 100, len(GOOD) - 1]
    for end in ends:
        path.write_bytes(GOOD[:end])
        refused(path)
    path.write_bytes(GOOD + b"\0")
    refused(path)


def test_any_byte_of_the_header_changed(tmp_path, capsys):
    """Whatever a changed byte makes of the file, it is read or refused."""
    path, results = tmp_path / "changed.safetensors", tmp_path / "results"
    path.write_bytes(GOOD)
    for i in range(HEADER):
        for flip in (0x01, 0x20, 0xFF):
            path.write_bytes(GOOD[:i] + bytes([GOOD[i] ^ flip]) + GOOD[i + 1 :])
            try:
                real_weights.load_weights(path)
            except real_weights.Refused as error:
                assert str(path) in str(error) and str(error).isprintable()
    assert not results.exists()


def safetensors(header, data=b"\0" * 64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(4, 4), offsets=(0, 64), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def named(name):
    return safetensors({name: entry(), "second": entry()})


ONE = json.dumps({"w": entry()}).encode()
LENGTHS = (0, 1, len(ONE) - 1, len(ONE) + 1, len(ONE) + 64, len(ONE) + 65, 10**8, 10**8 + 1, 2**31)
LENGTHS += (2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)
SAFETENSORS = {
    **{f"length {n}": safetensors(ONE, length=n) for n in LENGTHS},
    "no header": safetensors(b""),
    "garbage": safetensors(b"{]" * 40),
    "not utf-8": safetensors(b'{"\xff\xfe": 1}'),
    "nul bytes": safetensors(b"\0" * 50),
    "a list": safetensors([entry()]),
    "a number": safetensors(b"1e999"),
    "a string": safetensors(b'"weights"'),
    "null": safetensors(b"null"),
    "no tensors": safetensors({}, b""),
    "only metadata": safetensors({"__metadata__": {"a": "b"}}, b""),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "w": entry()}),
    "metadata nested": safetensors({"__metadata__": {"a": {"b": "c"}}, "w": entry()}),
    "deep lists": safetensors(b"[" * 100_000 + b"]" * 100_000),
    "deep objects": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep shape": safetensors(b'{"w": {"dtype": "F32", "shape": ' + b"[" * 5000 + b"]" * 5000 + b"}}"),
    "entry null": safetensors({"w": None}),
    "entry empty": safetensors({"w": {}}),
    "entry list": safetensors({"w": [1, 2]}),
    "no dtype": safetensors({"w": {"shape": [4, 4], "data_offsets": [0, 64]}}),
    "no shape": safetensors({"w": {"dtype": "F32", "data_offsets": [0, 64]}}),
    "no offsets": safetensors({"w": {"dtype": "F32", "shape": [4, 4]}}),
    "dtype unknown": safetensors({"w": entry(dtype="F33")}),
    "dtype lower": safetensors({"w": entry(dtype="f32")}),
    "dtype number": safetensors({"w": entry(dtype=32)}),
    "dtype too wide": safetensors({"w": entry(dtype="F64")}),
    "dtype too narrow": safetensors({"w": entry(dtype="F16")}),
    "shape too large": safetensors({"w": entry((4, 5))}),
    "shape too small": safetensors({"w": entry((4, 3))}),
    "shape empty": safetensors({"w": entry((0, 4))}),
    "shape negative": safetensors({"w": entry((-4, -4))}),
    "shape fraction": safetensors({"w": entry((4.0, 4.5))}),
    "shape strings": safetensors({"w": entry(("4", "4"))}),
    "shape 2**62": safetensors({"w": entry((2**62,))}),
    "shape 2**62 and offsets": safetensors({"w": entry((2**60,), (0, 2**62))}),
    "shape product wraps to 16": safetensors({"w": entry((2**32, 2**32, 16))}),
    "shape bytes wrap to 64": safetensors({"w": entry((2**62 + 16,))}),
    "shape 2**64": safetensors({"w": entry((2**64,))}),
    "shape 10**400": safetensors({"w": entry((10**400,))}),
    "shape of zeros times 2**63": safetensors({"w": entry((0, 2**63, 2**63), (0, 0))}, b""),
    "offsets reversed": safetensors({"w": entry(offsets=(64, 0))}),
    "offsets negative": safetensors({"w": entry(offsets=(-64, 0))}),
    "offsets 2**64": safetensors({"w": entry(offsets=(0, 2**64))}),
    "offsets wrap": safetensors({"w": entry(offsets=(2**64 - 64, 2**64 - 1))}),
    "offsets beyond": safetensors({"w": entry(offsets=(64, 128))}),
    "offsets shifted": safetensors({"w": entry(offsets=(1, 65))}, b"\0" * 65),
    "offsets one": safetensors({"w": entry(offsets=(64,))}),
    "offsets three": safetensors({"w": entry(offsets=(0, 32, 64))}),
    "offsets fraction": safetensors({"w": entry(offsets=(0, 64.5))}),
    "tensors overlap": safetensors({"v": entry(), "w": entry(offsets=(32, 96))}, b"\0" * 96),
    "tensors the same": safetensors({"v": entry(), "w": entry()}),
    "a hole": safetensors({"v": entry(), "w": entry(offsets=(80, 144))}, b"\0" * 144),
    "data too long": safetensors({"w": entry()}, b"\0" * 65),
    "data too short": safetensors({"w": entry()}, b"\0" * 63),
    "no data": safetensors({"w": entry()}, b""),
    "name with newlines": named("a\nerror: b\r\n"),
    "name with colours": named("\x1b[31mred\x1b]0;title\x07\x9b2J"),
    "name of another direction": named("\u202egnp.exe\u2066\u200b"),
    "name of half a character": safetensors(json.dumps({"\ud800": entry()}).encode()),
    "name very long": named("n" * 1_000_000),
    "dtype with colours": safetensors({"w": entry(dtype="\x1b[2J\x1b[31m")}),
    "dtype with newlines": safetensors({"w": entry(dtype="\r\n\x85\u2028error: no\n")}),
    "key with colours": safetensors({"w": entry() | {"\x1b[31m": 1}}, b""),
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "pickle": pickle.dumps({"w": [1.0, 2.0]}),
    "numpy": b"\x93NUMPY\x01\0" + b"\0" * 100,
    "gguf": b"GGUF\x03\0\0\0" + b"\0" * 100,
    "hdf5": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 100,
    "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_that_are_none(name, tmp_path, refused):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(SAFETENSORS[name])
    refused(path)


def test_names_given_twice(tmp_path, refused):
    twice = f'{{"w": {json.dumps(entry())}, "w": {json.dumps(entry(offsets=(64, 128)))}}}'
    path = tmp_path / "twice.safetensors"
    path.write_bytes(safetensors(twice.encode(), b"\0" * 128))
    refused(path)


NAMES = {
    "markup": "[bold red]w[/bold red][/][link=file:///etc/passwd]",
    "newlines": "a\nerror: b\r\nc\u2028d",
    "colours": "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "direction": "\u202egnp.exe",
    "nothing": "",
    "long": "n" * 5000,
    "path": "../../etc/passwd",
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_shown_without_their_control_characters(kind, tmp_path, accepted):
    """Names are the file's own: they reach the report as they are, the terminal only as text."""
    name, empty = NAMES[kind], NAMES[kind] + " empty"
    path = tmp_path / "names.safetensors"
    header = {name: entry(), empty: entry((0, 4), (64, 64))}
    path.write_bytes(safetensors(header))
    used, out = accepted(path)
    assert used == {name}
    assert "left out" in out
    assert all(line.isprintable() for line in out.split("\n")), ascii(out)


def test_special_values_are_weights(tmp_path, accepted):
    path = tmp_path / "values.safetensors"
    path.write_bytes(save({"w": torch.tensor([math.nan, math.inf, -math.inf, 0.0, 3e38, 1e-45])}))
    assert accepted(path)[0] == {"w"}


# ---- pickles --------------------------------------------------------------------------------------


class Runs:
    """Unpickling it would call function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def zipped(state, **arguments):
    file = io.BytesIO()
    torch.save(state, file, **arguments)
    return file.getvalue()


def repacked(replace):
    """A good file whose members pass through replace(name, content); None leaves one out."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = replace(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return file.getvalue()


def with_pickle(content):
    return repacked(lambda name, old: content if name.endswith("data.pkl") else old)


WHOLE = zipped({"w": torch.arange(48.0).view(4, 12)})
LEGACY = zipped({"w": torch.arange(48.0)}, _use_new_zipfile_serialization=False)


def nest(value, depth, kind):
    for _ in range(depth):
        value = kind(value)
    return value


# 100,000 levels, which Python's own pickler would refuse to write.
DEEP = {
    list: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    dict: b"\x80\x02" + b"}X\1\0\0\0a" * 100_000 + b"N" + b"s" * 100_000 + b".",
}


def looped():
    state = {}
    state["itself"] = state
    return state


# ('builtins', 'eval') and the like, spelled by hand: GLOBAL, its argument, REDUCE.
GLOBALS = {
    name: f'c{module}\n{function}\n(S\'open("{{trace}}", "w")\'\ntR.'.encode()
    for name, module, function in (
        ("eval", "builtins", "eval"),
        ("exec", "builtins", "exec"),
        ("system", "os", "system"),
        ("posix", "posix", "system"),
        ("popen", "subprocess", "Popen"),
        ("load", "torch", "load"),
        ("jit", "torch.jit", "load"),
        ("hub", "torch.hub", "load_state_dict_from_url"),
        ("getattr", "builtins", "getattr"),
        ("missing", "no_such_module", "f"),
    )
}


def test_pickles_run_nothing(tmp_path, refused):
    trace = tmp_path / "trace"
    path = tmp_path / "hostile.pt"
    touch = f"touch {trace}"
    states = [
        Runs(os.system, touch),
        {"w": torch.ones(3), "x": Runs(os.system, touch)},
        {Runs(os.system, touch): torch.ones(3)},
        [Runs(subprocess.getoutput, touch)],
        Runs(Path.touch, trace),
        Runs(exec, f"open({str(trace)!r}, 'w')"),
        Runs(eval, f"open({str(trace)!r}, 'w')"),
        collections.OrderedDict(w=Runs(os.mkdir, str(trace))),
    ]
    for state in states:
        for content in (
            pickle.dumps(state),
            pickle.dumps(state, protocol=2),
            zipped(state),
            zipped(state, _use_new_zipfile_serialization=False),
        ):
            path.write_bytes(content)
            refused(path)
    for content in GLOBALS.values():
        spelled = content.replace(b"{trace}", str(trace).encode())
        for written in (spelled, with_pickle(spelled)):
            path.write_bytes(written)
            refused(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(states[0]))  # the weapon works: only the loader holds it back
    assert trace.exists()


def scripted(module):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    return file.getvalue()


PICKLES = {
    **{f"zip cut at {i} of 16": WHOLE[: len(WHOLE) * i // 16] for i in range(16)},
    "zip without its last byte": WHOLE[:-1],
    **{f"legacy cut at {i} of 16": LEGACY[: len(LEGACY) * i // 16] for i in range(16)},
    "legacy without its last byte": LEGACY[:-1],
    "random": bytes((i * 7919 + i // 3) % 256 for i in range(4000)),
    "zeros": bytes(4000),
    "text": b"weights\n" * 100,
    "safetensors": GOOD,
    "plain pickle of numbers": pickle.dumps({"w": [1.0, 2.0]}),
    "zip without data.pkl": repacked(lambda n, c: None if n.endswith("data.pkl") else c),
    "zip without the data": repacked(lambda n, c: None if n.endswith("data/0") else c),
    "zip with short data": repacked(lambda n, c: c[:100] if n.endswith("data/0") else c),
    "zip with no bytes": repacked(lambda n, c: b"" if n.endswith("data/0") else c),
    "zip of nothing": b"PK\x05\x06" + bytes(18),
    "zip of another kind": repacked(lambda n, c: None if "version" not in n else c),
    "zip with garbage pickle": with_pickle(b"\x80\x02garbage."),
    "zip with empty pickle": with_pickle(b""),
    "zip with endless pickle": with_pickle(b"\x80\x02" + b"(" * 100_000),
    "pickle asks for 2**62 bytes": with_pickle(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"."),
    "pickle pops from nothing": with_pickle(b"\x80\x020000."),
    "pickle of an extension": with_pickle(b"\x80\x02\x82\x01."),
    "pickle of a persistent id": with_pickle(b"\x80\x02X\x01\0\0\0aQ."),
    "list": zipped([1, 2, 3]),
    "int": zipped(5),
    "none": zipped(None),
    "string": zipped("weights"),
    "no tensors": zipped({"a": 1, "b": "c", "d": [None, {"e": (1, 2)}]}),
    "empty dict": zipped({}),
    "only integers": zipped({"a": torch.arange(3), "b": torch.ones(2, dtype=torch.bool)}),
    "only complex": zipped({"a": torch.ones(2, dtype=torch.complex64)}),
    "only quantized": zipped({"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}),
    "only sparse": zipped({"a": torch.eye(3).to_sparse(), "b": torch.eye(3).to_sparse_csr()}),
    "only meta": zipped({"a": torch.ones(3, device="meta")}),
    "only empty": zipped({"a": torch.ones(0, 3)}),
    "nested tensors": zipped({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
    "loop": zipped(looped()),
    "module": zipped(torch.nn.Linear(2, 2)),
    "scripted module": scripted(torch.nn.Linear(2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_are_no_weights(name, suffix, tmp_path, refused):
    path = tmp_path / f"hostile{suffix}"
    path.write_bytes(PICKLES[name])
    refused(path)


def rebuilt(size, stride, offset=0):
    """A good file whose tensor claims another size, stride or offset in its 48 elements."""

    class Claims:
        def __reduce__(self):
            storage = torch.arange(48.0).untyped_storage()
            typed = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=torch.float32, _internal=True
            )
            arguments = (typed, offset, size, stride, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    return zipped({"w": Claims()})


CLAIMS = {
    "larger": ((49,), (1,)),
    "much larger": ((2**40,), (1,)),
    "2**62": ((2**62,), (1,)),
    "wrapping": ((2**32, 2**32), (2**32, 1)),
    "far stride": ((2, 2), (2**40, 1)),
    "wrapping stride": ((2, 2), (2**62, 2**62)),
    "negative stride": ((2, 2), (-1, 1)),
    "negative size": ((-4, 2), (2, 1)),
    "behind": ((48,), (1,), 1),
    "before": ((4,), (1,), -4),
    "far behind": ((1,), (1,), 2**62),
    "ranks": ((4, 2), (1,)),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_tensors_that_claim_more_than_they_have(name, tmp_path, refused):
    path = tmp_path / "claims.pt"
    path.write_bytes(rebuilt(*CLAIMS[name]))
    refused(path)


def test_expanded_tensors_larger_than_memory(tmp_path, refused):
    path = tmp_path / "expanded.pt"
    path.write_bytes(rebuilt((2**45,), (0,)))
    refused(path)


def test_usable_tensors_among_others(tmp_path, accepted):
    state = {
        "ok": torch.ones(3),
        7: torch.ones(2),
        "name": "text",
        "optimizer": {"step": 3, "state": [torch.ones(4), None, {"exp": (torch.ones(5), 1.0)}]},
        "integers": torch.arange(3),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "ordered": collections.OrderedDict(a=torch.ones(1)),
        "qparams": quantkit.get_symmetric_qparams(torch.ones(3)),
    }
    path = tmp_path / "mixed.pt"
    for arguments in ({}, {"_use_new_zipfile_serialization": False}):
        path.write_bytes(zipped(state, **arguments))
        used, out = accepted(path)
        assert used == {
            "ok",
            "7",
            "optimizer.state.0",
            "optimizer.state.2.exp.0",
            "parameter",
            "ordered.a",
        }
        assert "left out sparse: layout torch.sparse_coo" in out


@pytest.mark.parametrize("kind", [lambda v: [v], lambda v: {"a": v}], ids=["lists", "dicts"])
def test_deep_nesting(kind, tmp_path, accepted, refused):
    path = tmp_path / "deep.pt"
    path.write_bytes(zipped(nest(torch.ones(2), 100, kind)))
    assert len(accepted(path)[0]) == 1
    (tmp_path / "results" / "run.json").unlink()
    (tmp_path / "results" / "run.png").unlink()
    (tmp_path / "results").rmdir()
    path.write_bytes(with_pickle(DEEP[kind(0).__class__]))
    refused(path)


def test_lists_in_many_places_are_looked_at_once(tmp_path, accepted):
    path = tmp_path / "shared.pt"
    value = [torch.ones(2)]
    for depth in range(40):  # in the end 2**40 paths to one tensor
        value = [value, value]
        if depth in (9, 39):
            path.write_bytes(zipped({"w": value}))
            used, _ = accepted(path)
            assert used == {"w" + (depth + 2) * ".0"}


# ---- what is no regular file ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ""])
def test_paths_without_a_file(suffix, tmp_path, refused):
    for make in (
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.write_bytes(b""),
    ):
        path = tmp_path / f"path{suffix}"
        make(path)
        refused(path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_names_of_files_are_shown_without_their_control_characters(tmp_path, capsys):
    for name in ("a\nb", "\x1b[31mred", "\u202egnp", "n" * 300, "\udcff"):
        path = tmp_path / f"{name}.safetensors"
        assert real_weights.main(["--weights", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.endswith("\n") and error[:-1].isprintable()
