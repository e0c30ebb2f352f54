"""Runs that stop, go on, share a folder, or find it taken: the same bytes in the end."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lib.sources import files_of, folder, refused, sparse

from quantkit import checkpoint
from quantkit.checkpoint import plan, state
from quantkit.checkpoint.files import CheckpointError
from quantkit.checkpoint.output import DiskFull

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


def test_killed_in_a_file_and_resumed_by_two_processes(source, made, tmp_path):
    """The first process dies in the middle of the third file, as if by kill -9."""
    dst = tmp_path / "dst"
    script = (
        "import os, sys\n"
        "from quantkit import checkpoint\n"
        "from quantkit.checkpoint.output import Writer\n"
        "put, seen = Writer.put, []\n"
        "def dying(self, name, place, t):\n"
        "    seen.append(self)\n"
        "    if len(set(map(id, seen))) == 3:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    put(self, name, place, t)\n"
        "Writer.put = dying\n"
        "checkpoint.quantize(*sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, source, dst], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (dst / "model-00001-of-00003.safetensors").exists()
    assert (dst / "model-00003-of-00003.safetensors.part").exists()
    assert not (dst / "config.json").exists()
    first = (dst / "model-00001-of-00003.safetensors").stat()
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "quantkit", "quantize", source, dst], cwd=ROOT, text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0, out + err
        line = r"rank [01] of 2: model-00001-of-00003.safetensors: was done before"
        assert re.search(line, err)
    assert (dst / "model-00001-of-00003.safetensors").stat() == first
    (dst / "report.png").unlink(missing_ok=True)
    assert files_of(dst) == files_of(made)
    assert not list(dst.glob("*.part"))


def test_done_before(source, tmp_path):
    events = []
    checkpoint.quantize(source, tmp_path / "dst")
    before = {p: p.stat().st_ino for p in (tmp_path / "dst").iterdir() if p.is_file()}
    report = checkpoint.quantize(source, tmp_path / "dst", progress=events.append, png=False)
    assert {event.kind for event in events} == {"plan", "before"}
    assert {p: p.stat().st_ino for p in before} == before
    assert report == checkpoint.report(tmp_path / "dst")


def test_small_files_are_restored(source, made, tmp_path):
    """Of a finished folder too, and only those that differ."""
    dst, events = tmp_path / "dst", []
    shutil.copytree(made, dst)
    index = dst / "model.safetensors.index.json"
    before = index.stat().st_ino
    (dst / "tokenizer.json").unlink()
    (dst / "config.json").write_text("{}")
    checkpoint.quantize(source, dst, progress=events.append)
    assert files_of(dst) == files_of(made)
    assert index.stat().st_ino == before
    names = [event.name for event in events if event.name.endswith(": written again")]
    assert names == ["tokenizer.json: written again", "config.json: written again"]


def test_no_collective_is_needed_and_ranks_are_checked(source, made, tmp_path, monkeypatch):
    """One of two processes does all, where the other never comes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    checkpoint.quantize(source, tmp_path / "dst")
    assert files_of(tmp_path / "dst") == files_of(made)
    refused("is for one process", source, tmp_path / "dst", restart=True)
    for rank, world, text in (
        ("2", "2", "expected a rank below the number of processes, got 2 of 2"),
        ("-1", "2", "expected a rank below the number of processes, got -1 of 2"),
        ("x", "2", "RANK: expected a number, got 'x'"),
        ("0", "x", "WORLD_SIZE: expected a number, got 'x'"),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        refused(text, source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- what stops a run ------------------------------------------------------------------------------


def test_another_plan_and_restart(tmp_path):
    source, dst = folder(tmp_path / "src", layers=1), tmp_path / "dst"
    checkpoint.quantize(source, dst)
    tensor = {"base": "w8a8", "block": "tensor", "name": "w8a8"}
    rule = {"rule": [{"match": "*up_proj.weight", "scheme": "w8a8"}]}
    for said, keywords in (
        ("scheme w8a8, now w4", {"scheme": "w4"}),
        ("block [1, -1], now None", {"scheme": tensor}),
        ("shard_size None, now 1000", {"shard_size": 1000}),
        ("allow_nonfinite False, now True", {"allow_nonfinite": True}),
        ("other rules", {"config": rule}),
    ):
        refused(f"was begun with {said}: delete it, or pass", source, dst, **keywords)
    checkpoint.quantize(source, dst, "fp8", restart=True)
    checkpoint.quantize(source, tmp_path / "fp8", "fp8")
    assert files_of(dst) == files_of(tmp_path / "fp8")
    os.utime(source / "model-00001-of-00001.safetensors", (1, 1))
    refused("was begun with another source, or it changed", source, dst, "fp8")
    with pytest.raises(CheckpointError, match="was begun with command quantize, now dequantize"):
        checkpoint.dequantize(tmp_path / "fp8", dst)


def test_lock(source, tmp_path, monkeypatch):
    """A second run is refused while one works; ranks of a run are no second run."""
    dst = tmp_path / "dst"
    stamp = plan.plan_to_quantize(checkpoint.run.Source(source), checkpoint.options()).stamp
    with state.State(dst, stamp, several=False, restart=False).locked():
        refused("another process works here", source, dst)
        monkeypatch.setenv("WORLD_SIZE", "2")
        refused("another process works here", source, dst)
    with state.State(dst, stamp, several=True, restart=False).locked():
        checkpoint.quantize(source, dst)
        monkeypatch.delenv("WORLD_SIZE")
        refused("another process works here", source, dst)


def test_a_long_wait_says_for_whom(source, made, tmp_path, monkeypatch):
    dst, events = tmp_path / "dst", []
    stamp = plan.plan_to_quantize(checkpoint.run.Source(source), checkpoint.options()).stamp
    other = state.State(dst, stamp, several=True, restart=False)
    held = contextlib.ExitStack()
    monkeypatch.setattr(state, "PATIENCE", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "3")

    def tell(event):
        events.append(event)
        if "waits" in event.name:
            held.close()

    with other.locked():
        held.enter_context(other.file("model-00002-of-00003.safetensors", "rank 2 of 3, process 5"))
        checkpoint.quantize(source, dst, progress=tell)
    notes = [event.name for event in events if "waits" in event.name]
    assert notes == [f"{dst}/model-00002-of-00003.safetensors: waits for rank 2 of 3, process 5"]
    assert files_of(dst) == files_of(made)


def test_source_that_shrinks(tmp_path):
    path = sparse(tmp_path / "x.safetensors", "F32", [2000, 4096])
    seen = []

    def shrink(event):
        seen.append(event)
        if event.kind == "read":
            os.truncate(path, 1_000_000)

    refused("x.safetensors: it ", path, tmp_path / "dst", progress=shrink)  # shrank, or changed
    assert any(event.kind == "read" for event in seen)
    assert not list((tmp_path / "dst").glob("model*"))


def test_full_disk(source, tmp_path, monkeypatch):
    """A disk that says at the start that it is full, in the middle, and at the end."""
    fsync = os.fsync

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_at_last(fd):
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors.part"):
            full()
        fsync(fd)

    for name in ("posix_fallocate", "pwrite", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full_at_last if name == "fsync" else full)
            refused("no space: it needs ", source, tmp_path / name)
        assert not list((tmp_path / name).glob("model*"))
        checkpoint.quantize(source, tmp_path / name)
        assert checkpoint.verify(source, tmp_path / name) == []
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.run, "free_space", lambda _: 100_000)
        refused("no space: it needs ", source, tmp_path / "third")
    opened = os.open

    def full_of_files(path, *arguments):
        return full() if ".quantkit" in str(path) else opened(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full_of_files)
        with pytest.raises(DiskFull, match="no space: No space left on device"):
            checkpoint.quantize(source, tmp_path / "fourth")


def test_interrupted_while_a_file_is_opened(source, tmp_path, monkeypatch):
    """Python raises KeyboardInterrupt after the system has made the file."""
    opened = os.open

    def interrupted(path, *arguments):
        fd = opened(path, *arguments)
        if str(path).endswith(".safetensors.part"):
            os.close(fd)
            raise KeyboardInterrupt
        return fd

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.quantize(source, tmp_path / "dst")
    assert files_of(tmp_path / "dst") == {}


def test_interrupted_in_a_small_file(source, made, tmp_path, monkeypatch):
    """Nothing of it is left, and the same command goes on."""
    replace, dst = os.replace, tmp_path / "dst"

    def interrupted(part, path):
        if Path(path).name == "tokenizer.json":
            raise KeyboardInterrupt
        replace(part, path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.quantize(source, dst)
    assert "tokenizer.json" not in files_of(dst)
    (dst / ".quantkit" / "small.part").write_text("of a process that was killed")
    checkpoint.quantize(source, dst)
    assert files_of(dst) == files_of(made)


def test_restart_deletes_what_the_earlier_run_wrote(source, tmp_path):
    """All of that, whatever its name is, and nothing else."""
    other = folder(tmp_path / "other", layers=1)
    for name in ("tokenizer.json", "1_Pooling/config.json"):
        (other / name).unlink()
    dst = tmp_path / "dst"
    checkpoint.quantize(source, dst)
    for name in ("mine.safetensors", "mine.part", "1_Pooling/notes"):
        (dst / name).write_text(name)
    checkpoint.quantize(other, dst, restart=True)
    extra = "1_Pooling/notes", "mine.part", "mine.safetensors"
    assert checkpoint.verify(other, dst) == [f"{n}: quantize writes no such file" for n in extra]


def test_the_source_is_no_part_of_the_destination(tmp_path):
    """A run that failed has left its mark in the folder to which the user moves the model."""
    dst = tmp_path / "dst"
    path = sparse(tmp_path / "model.safetensors", "F32", [64, 64])
    checkpoint.quantize(path, dst)
    with pytest.raises(CheckpointError, match="dst: holds the source"):
        checkpoint.dequantize(dst / "model.safetensors", dst, restart=True)
    (dst / "model.safetensors").unlink()
    shutil.move(path, dst)
    before = (dst / "model.safetensors").read_bytes()
    (tmp_path / "link.safetensors").symlink_to(dst / "model.safetensors")
    for path in (dst / "model.safetensors", tmp_path / "link.safetensors"):
        for restart in (False, True):
            refused("dst: holds the source", path, dst, restart=restart)
    assert (dst / "model.safetensors").read_bytes() == before
    inner = folder(dst / "inner" / "src")
    refused("dst: holds the source", inner, dst)
    (dst / "link.safetensors").symlink_to(path := sparse(tmp_path / "b.safetensors", "F32", [2, 2]))
    refused("dst: holds the source", dst / "link.safetensors", dst)
    assert path.exists()


def test_a_folder_that_becomes_a_file(tmp_path):
    path, dst = folder(tmp_path / "src"), tmp_path / "dst"
    checkpoint.quantize(path, dst)
    shutil.rmtree(path / "1_Pooling")
    (path / "1_Pooling").write_text("a file now")
    checkpoint.quantize(path, dst, restart=True)
    assert checkpoint.verify(path, dst) == []


def test_links_in_the_destination(source, tmp_path):
    dst = tmp_path / "dst"
    checkpoint.quantize(source, dst)
    shutil.move(dst / "1_Pooling", tmp_path / "outside")
    (tmp_path / "outside" / "config.json").write_text("mine")
    (dst / "1_Pooling").symlink_to(tmp_path / "outside")
    refused("a link that leads out of the folder", source, dst)
    refused("a link that leads out of the folder", source, dst, restart=True)
    assert (tmp_path / "outside" / "config.json").read_text() == "mine"
    (dst / "1_Pooling").unlink()
    memory, kept = dst / ".quantkit", tmp_path / "kept"
    kept.write_text("kept")
    for path in (memory / "small.part", dst / "model-00001-of-00003.safetensors.part"):
        for link in (path.symlink_to, path.hardlink_to):
            path.unlink(missing_ok=True)
            link(kept)
            (dst / "model-00001-of-00003.safetensors").unlink()
            (dst / "tokenizer.json").unlink()
            checkpoint.quantize(source, dst)
    memory.rename(tmp_path / "memory")
    memory.symlink_to(tmp_path / "memory")
    refused(".quantkit: is a link", source, dst, restart=True)
    assert kept.read_text() == "kept" and not (dst / "tokenizer.json").is_symlink()


def test_what_the_folder_remembers_is_checked(source, tmp_path):
    dst = tmp_path / "dst"
    checkpoint.quantize(source, dst)
    memory = dst / ".quantkit"
    for name, text, error in (
        ("model-00001-of-00003.safetensors.json", '{"size": 1, "rows": "abc"}', "expected rows"),
        ("model-00001-of-00003.safetensors.json", '{"size": 1, "rows": [{}]}', "expected rows"),
        ("stamp.json", "[" * 100_000, "stamp.json: "),
    ):
        before = (memory / name).read_bytes()
        (memory / name).write_text(text)
        refused(error, source, dst)
        (memory / name).write_bytes(before)
    for name in ("../x", "/x", "", ".", "a/../x", ".quantkit/lock", "a\0b", "\ud800", 1):
        (memory / "small.json").write_text(json.dumps({"files": [name]}))
        refused("small.json: expected names of files", source, dst, restart=True)
    assert (dst / "model-00001-of-00003.safetensors").exists()
