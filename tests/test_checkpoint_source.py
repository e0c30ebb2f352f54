"""Sources of checkpoints: every kind is read, every malicious one is an error of one line."""

import copy
import json
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from lib.sources import entry, folder, header, index, sparse, tensors
from safetensors.torch import save, save_file

from quantkit import checkpoint
from quantkit.checkpoint.files import DTYPES, Buffer, CheckpointError, shown
from quantkit.checkpoint.source import Source

GOOD = {"w": entry("F32", [4, 8])}


def read_all(path):
    with Source(path) as source:
        buffer = {name: Buffer(region.nbytes) for name, region in source.tensors.items()}
        return {name: source.read(r, buffer[name]) for name, r in source.tensors.items()}


def same(a, b):
    """Also of dtypes that torch.equal does not take."""
    assert a.dtype == b.dtype and a.shape == b.shape
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def refused(path, text):
    with pytest.raises(CheckpointError) as error, Source(path):
        pass
    line = str(error.value)
    assert text in line and line.isprintable() and len(line) < 500, line


# ---- what is read ---------------------------------------------------------------------------------


def test_folder_with_an_index(tmp_path):
    path = folder(tmp_path / "src")
    found = read_all(path)
    expected = {name: t for shard in tensors() for name, t in shard.items()}
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
    with Source(path) as source:
        assert source.others == ["config.json", "tokenizer.json", "1_Pooling/config.json"]
        assert source.left_out.keys() == {".git/", "pytorch_model.bin"}
        assert source.config["vocab_size"] == 128


def test_cache_of_links(tmp_path, without_pictures):
    """The layout of Hugging Face's cache: links to files that are called by their hashes."""
    path = tmp_path / "models--a--b" / "snapshots" / "0123"
    folder(path)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(path.glob("*.*"))):
        if file.is_file():
            file.rename(blobs / str(i))
            file.symlink_to(f"../../blobs/{i}")
    refused(blobs.parent, "has no weights: expected a folder of its snapshots: 0123")
    checkpoint.quantize(path, tmp_path / "dst")
    assert not any(p.is_symlink() for p in (tmp_path / "dst").rglob("*"))
    assert (tmp_path / "dst" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_which_files_of_a_folder_are_read(tmp_path):
    """An index before one file, safetensors before .bin, the usual name before others."""

    def files():
        with Source(tmp_path) as source:
            return [file.name for file in source.files]

    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "two.bin")
    said = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(said))
    assert files() == ["one.bin", "two.bin"]
    for name in ("other.safetensors", "model.safetensors"):
        save_file({"c": torch.ones(2)}, tmp_path / name)
        assert files() == [name]
    index(tmp_path, {"c": "other.safetensors"})
    assert files() == ["other.safetensors"]


def test_every_dtype_is_copied(tmp_path):

    made = {name: torch.arange(64, dtype=torch.uint8).view(dtype) for name, dtype in DTYPES.items()}
    made["BOOL"] = torch.tensor([True, False])
    made |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3)}
    save_file(made, tmp_path / "x.safetensors")
    found = read_all(tmp_path / "x.safetensors")
    assert all(same(found[name], made[name]) for name in made)


def test_pickled_tensors_of_all_strides(tmp_path):
    """Also nested, tied and expanded ones; bytes come from their places in the file."""
    big = torch.randn(3000, 700)
    e = torch.randn(300, 64)
    state = {
        "t": big.t(), "steps": big[::3, 100:400], "cube": torch.randn(5, 300, 128).transpose(1, 2),
        "far": torch.randn(70_000, 40)[::9999, ::13], "expanded": torch.randn(1, 50).expand(30, 50),
        "e": e, "tied": e, "part": e[10:20], "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "scalar": torch.tensor(7), "empty": torch.zeros(0, 4), "half": torch.randn(9, 9).half(),
    }  # fmt: skip
    for path, said in ("m.pt", {"state_dict": {**state, "n": 3}, "epoch": 1}), ("m.bin", state):
        torch.save(said, tmp_path / path)
        found = read_all(tmp_path / path)
        assert found.keys() == state.keys()
        assert all(same(found[name], state[name].detach()) for name in state)
        with Source(tmp_path / path) as source:
            assert source.shared == {"t", "steps", "e", "tied", "part"}


def test_tiles_cover_a_strided_tensor(tmp_path):
    cube = torch.randn(6, 40, 30).permute(1, 2, 0)
    torch.save({"cube": cube, "flat": cube.contiguous()}, tmp_path / "m.pt")
    with Source(tmp_path / "m.pt") as source:  # of sizes that no tile divides
        for name in ("cube", "flat"):
            for limit in (100, 1000, 10**6):
                out = torch.empty(cube.numel() * 4, dtype=torch.uint8)
                for place, region in source.tensors[name].tiles(limit):
                    tile = source.read(region, Buffer(limit)).view(-1).view(torch.uint8)
                    assert len(tile) <= max(limit, 4)
                    out[place : place + len(tile)] = tile
                assert torch.equal(out.view(torch.float32).view(cube.shape), cube)


# ---- what is refused ------------------------------------------------------------------------------

HEADERS = {
    "too few for its header": [b"", b"1234567", header(GOOD)[:20], (10**15).to_bytes(8, "little")],
    "no JSON": [header(b"{"), header(b"\xff{}"), header(b'{"a":' * 9999), header(b"")],
    "expected a JSON object": [header(b"[]"), header(b"3")],
    "comes twice": [header(b'{"a": {}, "a": {}}'), header(b'{"a": {"x": 1, "x": 2}}')],
    "expected dtype, shape": [header({"w": 3}), header({"w": {"dtype": "F32"}})],
    "is not known": [header({"w": {**GOOD["w"], "dtype": d}}, 128) for d in ("F31", 3, None, [])],
    "sizes and offsets of 0": [
        header({"w": {**GOOD["w"], "shape": s}}, 128) for s in (3, [4, -8], [4, 8.0], ["4"], [True])
    ],
    "no int64": [header({"w": {**GOOD["w"], "shape": s}}, 128) for s in ([2**63], [1] * 65)],
    "its data_offsets are": [
        header({"w": {**GOOD["w"], "data_offsets": o}}, 128)
        for o in ([0, 127], [128, 0], [0], [0, 128, 9], [0, 2**62])
    ],
    "overlaps": [header({"a": entry("F32", [8]), "b": entry("F32", [8], 16)}, 48)],
    "after a gap": [
        header({"a": entry("F32", [8], 4)}, 36),
        header({"a": entry("F32", [8]), "b": entry("F32", [8], 40)}, 72),
    ],
    "its tensors end at": [header(GOOD, 127), header(GOOD, 129), header(GOOD)],
    "no object of strings": [header({"__metadata__": m}) for m in (3, {"a": 1}, [])],
    "has no tensors": [header({})],
    "no Unicode text": [header(b'{"\\ud800": ' + json.dumps(GOOD["w"]).encode() + b"}", 128)],
}  # fmt: skip


@pytest.mark.parametrize("text", HEADERS)
def test_headers(text, tmp_path):
    for data in HEADERS[text]:
        (tmp_path / "x.safetensors").write_bytes(data)
        refused(tmp_path / "x.safetensors", text)


def test_header_over_its_limit_is_not_read(tmp_path):
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    refused(tmp_path / "x.safetensors", "its header has 200000000 bytes, over 100000000")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x\0.safetensors", 3]
)  # fmt: skip
def test_names_in_an_index(name, tmp_path):
    path = folder(tmp_path / "src")
    index(path, {"w": name})
    refused(path, "expected the name of a .safetensors file in this folder")


def test_shards_and_their_index(tmp_path):
    path = folder(tmp_path / "src", layers=2)
    one, two = sorted(path.glob("*.safetensors"))
    names = {n: f.name for f, shard in zip((one, two), tensors(2), strict=True) for n in shard}
    index(path, names | {"extra": two.name})
    refused(path, "has no tensor extra")
    index(path, {n: f for n, f in names.items() if n != "lm_head.weight"})
    refused(path, "has a tensor that the index gives it not: lm_head.weight")
    index(path, names | {"extra": "three.safetensors"})
    refused(path, "the file three.safetensors is missing")
    index(path, {})
    refused(path, "has no weight_map")
    (path / "model.safetensors.index.json").unlink()
    refused(path, "2 files of weights, but no index.json")
    for file in (one, two, path / "pytorch_model.bin"):
        file.unlink()
    refused(path, "has no weights")


def test_links_out_of_a_folder(tmp_path):
    path = folder(tmp_path / "src")
    (tmp_path / "secret").write_text("secret")
    (path / "notes.txt").symlink_to(tmp_path / "secret")
    refused(path, "notes.txt: a link that leads out of the folder")
    (path / "notes.txt").unlink()
    (path / "docs").symlink_to(tmp_path)
    with Source(path) as source:
        assert source.left_out["docs/"] == "a link" and not any("docs" in n for n in source.others)
    (path / "docs").unlink()
    for name in ("loop.json", "none.json"):
        (path / name).symlink_to(name if name == "loop.json" else "nothing")
        refused(path, f"{name}: a link that leads nowhere")  # half of a cache, perhaps
        (path / name).unlink()
    shard = next(path.glob("*.safetensors"))
    shard.rename(tmp_path / "shard.safetensors")
    shard.symlink_to(tmp_path / "shard.safetensors")
    refused(path, "a link that leads out of the folder")
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(path, f"{shard.name} is missing")


def test_what_is_no_regular_file(tmp_path):
    path = folder(tmp_path / "src")
    os.mkfifo(path / "pipe")
    with Source(path) as source:
        assert source.left_out["pipe"] == "no regular file"
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")
    refused(path, "config.json: no regular file")
    os.mkfifo(tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "is no regular file")
    refused(tmp_path / "nothing", "there is no such file")
    (tmp_path / "x.txt").write_text("")
    refused(tmp_path / "x.txt", "expected a folder or a file of .safetensors")


class Runs:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pickles(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(3), "x": Runs(tmp_path / "trace")}, path)
    refused(path, "it asks for posix.mkdir, which is no weight")
    assert not (tmp_path / "trace").exists()
    path.write_bytes(pickle.dumps({"w": 1}))
    refused(path, "is no file that torch.save of torch 1.6 or newer writes")
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    refused(path, "is no file that torch.save of torch 1.6 or newer writes")
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    refused(path, "is TorchScript")
    torch.save({"w": torch.ones(3)}, path)
    for changed, text in (
        ({"m/byteorder": b"big"}, "its byte order is big"),
        ({"m/data.pkl": b"\x80\x02" + bytes(99)}, "data.pkl: torch.save writes no such"),
    ):
        with zipfile.ZipFile(path) as good, zipfile.ZipFile(tmp_path / "x.pt", "w") as bad:
            for name in good.namelist():
                kind = (
                    zipfile.ZIP_DEFLATED
                    if name in changed and "pkl" in name
                    else zipfile.ZIP_STORED
                )
                bad.writestr(name, changed.get(name, good.read(name)), kind)
        refused(tmp_path / "x.pt", text)
    torch.save([torch.ones(3)], path)
    refused(path, "expected a dict of tensors, got list")
    for said, keys in (
        ({"w": 3}, "'w'"),
        ({"model": {"w": torch.ones(3)}, "epoch": 1}, "'model', 'epoch'"),
        ({0: torch.ones(3), 1: torch.ones(3)}, "0, 1"),
        ({"state_dict": {}}, "none"),
    ):
        torch.save(said, path)
        text = "has no tensors: expected a dict of names and tensors, or one under 'state_dict'"
        refused(path, f"{text}, got the keys {keys}")
    torch.save({"w": torch.ones(3).to_sparse()}, path)
    refused(path, "is no dense tensor")
    torch.save({"w": torch.ones(3000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    refused(path, "is no file that torch.save")


def test_bytes_that_are_not_as_they_were(tmp_path):
    """Any change of a file is read as it is, or refused in one line."""
    chosen = random.Random(int(os.environ["QUANTKIT_SEED"]))
    made = {"a.weight": torch.randn(8, 16), "b": torch.arange(5)}
    torch.save({"state_dict": {**made, "c": torch.ones(3, 4).t()}}, tmp_path / "m.pt")
    files = {
        "x.safetensors": save(made, {"quantkit": "{}"}),
        "x.pt": (tmp_path / "m.pt").read_bytes(),
    }
    for name in ["x.safetensors"] * 400 + ["x.pt"] * 100:
        data = bytearray(files[name])
        for _ in range(chosen.choice((1, 1, 3))):
            at = chosen.randrange(min(len(data), 300) if "safe" in name else len(data))
            piece = chosen.choice(
                (b"", b'"', b"{", b"-1", b"1e400", bytes([chosen.randrange(256)]))
            )
            data[at : at + chosen.randrange(3)] = piece
        (tmp_path / name).write_bytes(data)
        try:
            read_all(tmp_path / name)
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) < 500


def test_source_that_changes_while_it_is_read(tmp_path):
    path = sparse(tmp_path / "x.safetensors", "F32", [1000, 1000])
    with Source(path) as source:
        region = source.tensors["w.weight"]
        os.truncate(path, 10_000)
        with pytest.raises(CheckpointError, match=r"x\.safetensors: it changed while it was read"):
            source.read(region, Buffer(region.nbytes))
    path = sparse(path, "F32", [1000, 1000])
    with Source(path) as source:
        size = os.stat(path).st_size
        source.files[0] = source.files[0]._replace(size=10_000)
        os.truncate(path, 10_000)
        stamp = os.stat(path)
        source.files[0] = source.files[0]._replace(mtime_ns=stamp.st_mtime_ns)
        with pytest.raises(CheckpointError, match="it ends at byte 10000: it shrank"):
            source.read(source.tensors["w.weight"], Buffer(size))


def test_what_the_terminal_gets():
    assert shown("\x1b[31mred\u202e\n") == r"\x1b[31mred\u202e\n"
    assert len(shown("n" * 5000)) < 300
    assert shown("größe") == "größe"


def test_a_good_file_is_read_as_it_is(tmp_path):
    made = {"a": torch.arange(6.0).view(2, 3)}
    (tmp_path / "x.safetensors").write_bytes(save(made))
    assert same(read_all(tmp_path / "x.safetensors")["a"], made["a"])
    shutil.rmtree(tmp_path)


def test_reserved_name(tmp_path):
    torch.save({"__metadata__": torch.ones(2, 2)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "a tensor is called __metadata__, which safetensors reserves")


def test_names_that_come_twice_are_found_at_once(tmp_path):
    """Pairs of all names were compared: hours for a header of 100 MB."""
    names = ",".join(f'"{i}":1' for i in range(200_000))
    text = f'{{{names},"199999":1}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    refused(tmp_path / "x.safetensors", "199999 comes twice")


def test_files_are_closed(tmp_path):
    path = folder(tmp_path / "src")

    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    there = checkpoint.Checkpoint(path)
    assert count() > before
    with pytest.raises(TypeError, match="an open checkpoint cannot be copied"):
        copy.deepcopy(there)
    there.close()
    assert count() == before
    with pytest.raises(CheckpointError, match="is closed"):
        there["lm_head.weight"]
    checkpoint.Checkpoint(path)
    assert count() == before


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    path, scandir = folder(tmp_path / "src"), os.scandir
    (path / "lost+found").mkdir()

    def refusing(place):
        if str(place).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with Source(path) as source:
        assert source.left_out["lost+found/"] == "Permission denied"
