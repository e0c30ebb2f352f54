"""Quantized checkpoints: the same bytes by any tiles and threads, the way back, and what is refused."""

import inspect
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lib.checkpoints import ALL, quantized
from lib.sources import files_of, folder, header, refused, sparse, tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import checkpoint
from quantkit.checkpoint import plan, reports
from quantkit.checkpoint.files import CheckpointError
from quantkit.checkpoint.output import as_json

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("checkpoint") / "src")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory, without_pictures):
    """The source, quantized without any disturbance."""
    path = tmp_path_factory.mktemp("quantized") / "dst"
    checkpoint.quantize(source, path)
    return path


# ---- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
def test_schemes_there_and_back(scheme, source, tmp_path):
    """Files that safetensors reads hold what one call makes of each weight; all else is copied."""
    report = checkpoint.quantize(source, tmp_path / "dst", scheme)
    expected = {name: t for shard in tensors() for name, t in shard.items()}
    names = {f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)}
    assert [row["name"] for row in report["tensors"]] == sorted(names)
    with checkpoint.Checkpoint(tmp_path / "dst") as there:
        assert set(there) == set(expected)
        for name, t in expected.items():
            read = there[name]
            if name not in names:
                assert torch.equal(read, t)
                continue
            q, params = read
            q_expected, params_expected = quantized(checkpoint.SCHEMES[scheme], t)
            assert params == params_expected
            assert torch.equal(q.view(torch.uint8), q_expected.view(torch.uint8))
            row = next(row for row in report["tensors"] if row["name"] == name)
            assert row["sqnr_db"] == round(quantkit.measure(t, params).sqnr_db.item(), 4)
    checkpoint.dequantize(tmp_path / "dst", tmp_path / "back")
    found = {}
    for file in sorted((tmp_path / "back").glob("*.safetensors")):
        found |= load_file(file)
    for name, t in expected.items():
        if name in names:
            t = quantkit.dequantize(*quantized(checkpoint.SCHEMES[scheme], t), output_dtype=t.dtype)
        assert torch.equal(found[name], t), name
    assert checkpoint.verify(source, tmp_path / "dst") == []


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in ALL if name not in checkpoint.SCHEMES])
def test_what_rules_make_of_schemes(name, tmp_path):
    """Through files, and tiles of some rows, each is what one call makes of the weight."""
    source = folder(tmp_path / "src", layers=1, rows=256)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan, "TILE", 20_000)
        checkpoint.quantize(source, tmp_path / "dst", ALL[name])
        assert checkpoint.verify(source, tmp_path / "dst") == []
        checkpoint.dequantize(tmp_path / "dst", tmp_path / "back")
    weight = "model.layers.0.mlp.up_proj.weight"
    x = tensors(1, 256)[0][weight]
    expected = quantized(ALL[name], x)
    with checkpoint.Checkpoint(tmp_path / "dst") as there:
        q, params = there[weight]
        assert there.weights[weight].scheme == ALL[name]
    assert params == expected[1]
    assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8))
    with checkpoint.Checkpoint(tmp_path / "back") as back:
        assert torch.equal(back[weight], quantkit.dequantize(*expected, output_dtype=x.dtype))


def test_small_files(source, made):
    found = files_of(made)
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert found.keys() == shards | {
        "config.json", "tokenizer.json", "1_Pooling/config.json", "report.json",
        "model.safetensors.index.json",
    }  # fmt: skip
    config = json.loads(found["config.json"])
    assert config.pop("quantization_config")["format"] == "int-quantized"
    assert config == {"model_type": "test", "vocab_size": 128}
    index = json.loads(found["model.safetensors.index.json"])
    total = 0
    for file in shards:
        with safe_open(made / file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert {n for n, f in index["weight_map"].items() if f == file} == set(opened.keys())
            total += sum(opened.get_tensor(n).nbytes for n in opened.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == total


def test_report(made):
    report = checkpoint.report(made)
    assert dict(report["kept"]) | {"model.layers.0.mlp.gate.weight": "a router"} == dict(
        report["kept"]
    )
    reasons = {name.split(".")[-2]: reason for name, reason in report["kept"] if "." in name}
    assert reasons["embed_tokens"] == "an embedding" and reasons["lm_head"] == "a head"
    assert all(row["left_out"] == 0 and 40 < row["sqnr_db"] < 50 for row in report["tensors"])
    assert report["bytes_after"] < report["bytes_before"]


def test_pickled_source_is_one_file(tmp_path):
    e, w = torch.randn(96, 64), torch.randn(64, 96)
    torch.save(
        {"a.weight": w.t(), "b.weight": e, "c.weight": e, "bias": e[0].clone()}, tmp_path / "m.pt"
    )
    checkpoint.quantize(tmp_path / "m.pt", tmp_path / "dst")
    found = load_file(tmp_path / "dst" / "model.safetensors")
    q, _ = quantized(checkpoint.SCHEMES["w8a8"], w.t())
    assert torch.equal(found["a.weight"], q)
    assert torch.equal(found["b.weight"], e) and torch.equal(found["c.weight"], e)
    assert "tied" in dict(checkpoint.report(tmp_path / "dst")["kept"])["b.weight"]
    assert json.loads((tmp_path / "dst" / "config.json").read_text()).keys() == {
        "quantization_config"
    }


# ---- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8", "nvfp4", "fp8_block"])
def test_tiles_and_threads_change_no_byte(scheme, source, tmp_path, monkeypatch):
    checkpoint.quantize(source, tmp_path / "one", scheme, threads=1)
    expected = files_of(tmp_path / "one")
    for tile, threads in (5000, 1), (40_000, 3), (1, 2):
        monkeypatch.setattr(plan, "TILE", tile)
        monkeypatch.setattr("quantkit.checkpoint.convert.TILE", max(tile, 100))
        path = tmp_path / str(tile)
        checkpoint.quantize(source, path, scheme, threads=threads)
        assert files_of(path) == expected
        assert checkpoint.verify(source, path, threads=threads) == []
        checkpoint.dequantize(path, tmp_path / f"{tile}-back", threads=threads)
    monkeypatch.undo()
    checkpoint.dequantize(tmp_path / "one", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "5000-back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "1-back")


def test_shard_size(source, made, tmp_path):
    checkpoint.quantize(source, tmp_path / "dst", shard_size="60KB")
    files = sorted((tmp_path / "dst").glob("*.safetensors"))
    assert len(files) == 4 and files[0].name == "model-00001-of-00004.safetensors"
    found, expected = {}, {}
    for file in files:
        tensors_of = load_file(file)
        found |= tensors_of
        assert len(tensors_of) == 1 or sum(t.nbytes for t in tensors_of.values()) <= 60_000
    for file in made.glob("*.safetensors"):
        expected |= load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)
    whole = checkpoint.options(shard_size="1GB")
    checkpoint.quantize(source, tmp_path / "whole", options=whole)
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()


# ---- what is refused ------------------------------------------------------------------------------


def test_quantized_already(source, made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    refused("its config.json has quantization_config", tmp_path / "copy", tmp_path / "dst")
    (tmp_path / "copy" / "config.json").unlink()
    for path in (tmp_path / "copy", next(made.glob("*.safetensors"))):
        refused("is quantized already: its metadata says how", path, tmp_path / "dst")


def test_text_that_is_no_unicode(source, tmp_path):
    """JSON may have half a surrogate pair, a name on a disk any bytes."""
    path = tmp_path / "\udcff"
    shutil.copytree(source, path)
    config = {**json.loads((path / "config.json").read_text()), "odd": "\ud800é"}
    (path / "config.json").write_text(json.dumps(config))
    checkpoint.quantize(path, tmp_path / "dst", exclude=["re:[^\udcff]*bias"])
    text = (tmp_path / "dst" / "config.json").read_text(encoding="utf-8")
    assert json.loads(text)["odd"] == config["odd"] and "\\ud800é" in text
    assert checkpoint.verify(path, tmp_path / "dst") == []


def test_places(source, tmp_path):
    before = files_of(source)
    refused("is the source itself", source, source)
    refused("is the source itself", source, source / ".." / "src")
    refused("lies inside the source", source, source / "quantized")
    (tmp_path / "file").write_text("")
    refused("is a file, expected a folder", source, tmp_path / "file")
    (tmp_path / "link").symlink_to(source)
    refused("is the source itself", source, tmp_path / "link")
    refused("has files that quantkit did not write", source, tmp_path)
    with pytest.raises(CheckpointError, match="has files that quantkit did not write"):
        checkpoint.dry_run(source, tmp_path)
    assert files_of(source) == before and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        checkpoint.quantize(source, tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    checkpoint.quantize(source, tmp_path / "empty")


W8, PATH = checkpoint.options("w8"), "expected a str or an os.PathLike of one, got"
HELD = "expected none beside options=, which holds scheme and rules already, got"


@pytest.mark.parametrize(
    "given, kind, message",
    [
        *(
            ({"threads": n}, ValueError, f"threads: expected 1 to 4095, got {n}")
            for n in (-1, 0, 4096)
        ),
        ({"threads": "2"}, TypeError, "threads: expected an int or None, got str"),
        ({"threads": 1.5}, TypeError, "threads: expected an int or None, got float"),
        ({"threads": True}, TypeError, "threads: expected an int or None, got bool"),
        ({"progress": 3}, TypeError, "progress: expected a function of an Event, got int"),
        ({"restart": "no"}, TypeError, "restart: expected a bool, got str"),
        ({"png": "no"}, TypeError, "png: expected a bool, got str"),
        ({"src": None}, TypeError, f"src: {PATH} NoneType"),
        ({"dst": 3}, TypeError, f"dst: {PATH} int"),
        ({"path": b"x"}, TypeError, f"path: {PATH} bytes"),
        ({"options": "w4"}, TypeError, "options: expected checkpoint.Options or None, got str"),
        ({"options": W8, "scheme": "w4"}, ValueError, f"scheme: {HELD} 'w4'"),
        ({"options": W8, "exclude": ["*"]}, ValueError, f"exclude: {HELD} list"),
    ],
    ids=str,
)
def test_bad_arguments(given, kind, message, source, made, tmp_path):
    """Of each function that has them, before a source is opened or anything made."""
    good = {"src": source, "dst": tmp_path / "dst", "path": made}
    took = 0
    for function in (
        checkpoint.quantize, checkpoint.dry_run, checkpoint.verify, checkpoint.dequantize,
        checkpoint.report, checkpoint.Checkpoint,
    ):  # fmt: skip
        names = inspect.signature(function).parameters
        if given.keys() <= names.keys() or ("keywords" in names and "options" in given):
            with pytest.raises(kind) as error:
                function(**{n: v for n, v in good.items() if n in names} | given)
            assert str(error.value) == message and type(error.value) is kind
            took += 1
    assert took and not (tmp_path / "dst").exists()


@pytest.mark.parametrize("scheme", ["w8a8", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(scheme, value, tmp_path):
    w = torch.randn(200, 256)
    w[150, 7] = w[199, 0] = value
    save_file({"w.weight": w}, tmp_path / "x.safetensors")
    text = f"w.weight: has {value} in row 150, column 7; --allow-nonfinite takes it"
    refused(text, tmp_path / "x.safetensors", tmp_path / "dst", scheme)
    assert not list((tmp_path / "dst").glob("model*"))
    report = checkpoint.quantize(
        tmp_path / "x.safetensors", tmp_path / "taken", scheme, allow_nonfinite=True
    )
    assert report["tensors"][0]["left_out"] > 0


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_block"])
def test_a_weight_that_is_lost_is_the_worst(scheme, tmp_path):
    """Null says that nothing is lost, so it is no figure of a weight that became NaN."""
    lost, exact = torch.randn(8, 128), torch.zeros(8, 128)
    lost[0, 0], lost[1, 1] = float("nan"), float("inf")
    weights = {"a.weight": torch.randn(8, 128), "b.weight": exact, "c.weight": lost}
    save_file(weights, tmp_path / "x.safetensors")
    report = checkpoint.quantize(
        tmp_path / "x.safetensors", tmp_path / "dst", scheme, allow_nonfinite=True
    )
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows["c.weight"]["left_out"] == 1024 and rows["c.weight"]["sqnr_db"] == 0.0
    assert rows["b.weight"]["left_out"] == 0 and rows["b.weight"]["sqnr_db"] is None
    assert [row["name"] for row in reports.worst(report)] == ["c.weight", "a.weight"]


# ---- verify, dequantize ---------------------------------------------------------------------------


def test_verify_finds_every_change(source, made, tmp_path):
    dst = tmp_path / "dst"
    shutil.copytree(made, dst)
    assert checkpoint.verify(source, dst) == []

    def flipped(name, place):
        data = bytearray((dst / name).read_bytes())
        data[place] ^= 1
        (dst / name).write_bytes(data)

    shard = "model-00002-of-00003.safetensors"
    names = load_file(dst / shard).keys()
    size = (dst / shard).stat().st_size
    for place in (size - 1, size // 2, size - 2000):
        flipped(shard, place)
        (found,) = checkpoint.verify(source, dst)
        assert found in names
        flipped(shard, place)
    flipped(shard, 30)
    assert checkpoint.verify(source, dst) == [f"{shard}: its header or its size differs"]
    flipped(shard, 30)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        flipped(name, 3)
        assert checkpoint.verify(source, dst) == [name]
        flipped(name, 3)
    path = dst / "report.json"
    said = json.loads(path.read_text())
    row = said["tensors"][0]
    for rows in ([], said["tensors"] * 2, [{**row, "bytes_after": 1}, *said["tensors"][1:]]):
        path.write_bytes(as_json({**said, "tensors": rows}))
        assert checkpoint.verify(source, dst) == ["report.json"]
    path.write_bytes(as_json({**said, "tensors": [{**row, "max_error": 1}, *said["tensors"][1:]]}))
    assert checkpoint.verify(source, dst) == []  # a figure, which is not measured again
    (dst / "extra.safetensors").write_bytes(b"")
    (dst / "tokenizer.json").unlink()
    (dst / "1_Pooling" / "notes.txt").write_text("")
    (dst / ".gitattributes").write_text("")
    differing = [
        "tokenizer.json: is missing", "1_Pooling/notes.txt: quantize writes no such file",
        "extra.safetensors: quantize writes no such file",
    ]  # fmt: skip
    assert checkpoint.verify(source, dst) == differing
    (dst / "report.json").unlink()
    (dst / shard).unlink()
    more = [f"{shard}: is missing", "report.json: is missing"]
    assert checkpoint.verify(source, dst) == [*more, *differing]
    (dst / "report.json").write_text("{}")
    assert checkpoint.verify(source, dst) == [more[0], "report.json", *differing]
    (dst / ".quantkit" / "complete").unlink()
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        checkpoint.verify(source, dst)


def test_dequantize_takes_what_quantkit_wrote(source, made, tmp_path):
    with pytest.raises(CheckpointError, match="has no weights that quantkit quantized"):
        checkpoint.dequantize(source, tmp_path / "dst")
    refused("is quantized already", made, tmp_path / "dst")
    checkpoint.dequantize(made, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {"model_type": "test", "vocab_size": 128}


def test_metadata_that_lies(made, tmp_path):
    shard = "model-00001-of-00003.safetensors"
    with safe_open(made / shard, "pt") as opened:
        said = opened.metadata()
    good = load_file(made / shard)
    name = "model.layers.0.mlp.up_proj.weight"
    for change in (
        lambda: good.pop(f"{name}_scale"),
        lambda: good.__setitem__(f"{name}_scale", torch.ones(3)),
        lambda: said.__setitem__("quantkit", "{}"),
        lambda: said.__setitem__("quantkit", "[" * 99999),
    ):
        change()
        save_file(good, tmp_path / "x.safetensors", said)
        with pytest.raises(CheckpointError) as error:
            checkpoint.Checkpoint(tmp_path / "x.safetensors")
        assert str(error.value).isprintable()


# ---- memory ---------------------------------------------------------------------------------------


def peak(*arguments):
    """MB of anonymous memory that the command had at most."""
    run = subprocess.Popen([sys.executable, "-m", "quantkit", *map(str, arguments)], cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    most = 0
    while run.poll() is None:
        try:
            text = Path(f"/proc/{run.pid}/status").read_text()
        except OSError:
            break
        found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
        most = max([most, *map(int, found)])
        time.sleep(0.005)
    assert run.wait() == 0, run.stderr.read()
    return most / 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize(
    "scheme, dtype, shape",
    [
        ("w8a8", "F32", [16384, 4096]),
        pytest.param("w4", "BF16", [131072, 4096], marks=pytest.mark.full),
        pytest.param("nvfp4", "F32", [64, 4 << 20], marks=pytest.mark.full),
        pytest.param("fp8_block", "F32", [512, 65536], marks=pytest.mark.full),
    ],
)
def test_memory(scheme, dtype, shape, tmp_path):
    """At most 400 MB, imports included, of tensors of 0.3 to 1 GB and of rows of 16 MB."""
    path = sparse(tmp_path / "x.safetensors", dtype, shape)
    assert peak("quantize", path, tmp_path / "dst", "--scheme", scheme) < 400
    if shape[0] < 1000:
        assert peak("dequantize", tmp_path / "dst", tmp_path / "back") < 400


def test_rows_that_are_too_large_are_kept(tmp_path):
    path = sparse(tmp_path / "x.safetensors", "F32", [2, 9 << 20])
    made, _ = checkpoint.dry_run(path, tmp_path / "dst")
    assert [item.reason for item in made.items] == ["1 of its rows are over 32 MiB"]


def test_names_are_escaped(tmp_path):
    name = "a\x1b[31m\nb.weight"
    data = {name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    (tmp_path / "x.safetensors").write_bytes(header(data, 12) + b"\x00\x00\xc0\x7f")
    refused(r"a\x1b[31m\nb.weight: has nan in row 1", tmp_path / "x.safetensors", tmp_path / "dst")
