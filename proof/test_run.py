"""The machinery of the proof: what is kept, what is run again, and what must never be kept."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import run
import work
from report import SWEEPS, Summary
from rich.console import Console
from work import Task

TASKS = """
import os, time
from pathlib import Path

def good(folder, name):
    Path(folder, name).write_text("done")
    return {"hashes": {"here": name}}

def bad(folder):
    raise ValueError("a wrong bit")

def changes(path):
    Path(path).write_text("other sources")
    return {}

def waits(folder):
    Path(folder, "part").write_text(str(os.getpid()))
    Path(folder, "part").rename(Path(folder, "pid"))
    time.sleep(600)

def dies():
    os._exit(1)
"""
# What make proof does, of one task that does not end.
WAITING = """
import sys
from pathlib import Path
import run, work
from rich.console import Console
if __name__ == "__main__":
    folder = sys.argv[1]
    sys.path.insert(0, folder)
    work.ROOT, work.CODE["made_up"] = Path(folder), ("made_up.py",)
    tasks = [work.Task("made_up", "made_up", "waits", (folder,))]
    run.run_all(tasks, run.Journal(Path(folder, "journal")), 1, run.product_now(), Console())
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project in whose place something can be changed, with tasks of its own."""
    (tmp_path / "setup.py").write_text("the sources")
    (tmp_path / "made_up.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)  # its workers too
    monkeypatch.setattr(work, "ROOT", tmp_path)
    monkeypatch.setitem(work.CODE, "made_up", ("made_up.py",))
    work.code_of.cache_clear()
    yield tmp_path
    work.code_of.cache_clear()


def task(function, *args, **more):
    return Task("made_up", "made_up", function, args, **more)


def prove(project, *tasks, console=None):
    """The errors, and the journal as the next run reads it."""
    path, console = project / "journal", console or Console(quiet=True)
    errors = run.run_all(tasks, run.Journal(path), 1, run.product_now(), console)
    return errors, run.Journal(path).done


def names(project):
    return {path.name for path in project.iterdir()} & {"a", "b", "c"}


def test_what_is_done_is_not_done_again(project):
    a, b = task("good", str(project), "a"), task("good", str(project), "b")
    errors, done = prove(project, a)
    assert not errors
    assert done[a.key]["hashes"] == {"here": "a"}
    (project / "a").unlink()
    errors, done = prove(project, a, b)
    assert not errors
    assert done.keys() == {a.key, b.key}
    assert names(project) == {"b"}


def test_progress_counts_the_tasks_of_this_run(project):
    tasks = [task("good", str(project), str(i)) for i in range(100)]
    for i in range(95):
        run.Journal(project / "journal").add(f"task {i} of other code", {})
    printed = io.StringIO()
    prove(project, *tasks[:10], console=Console(file=printed))
    prove(project, *tasks, console=Console(file=printed))
    assert re.findall(r"(\d+) of 100 tasks", printed.getvalue()) == ["100"]


def test_what_failed_is_told_and_not_kept(project):
    a, bad = task("good", str(project), "a"), task("bad", str(project))
    for _ in range(2):
        (error,), done = prove(project, bad, a)
        assert "a wrong bit" in error
        assert bad.key in error
        assert done.keys() == {a.key}


def test_nothing_runs_on_what_a_failed_first_phase_left(project):
    (error,), done = prove(
        project, task("good", str(project), "a"), task("bad", str(project), phase=0)
    )
    assert "a wrong bit" in error
    assert not done
    assert not names(project)


def test_the_first_phase_runs_again_while_something_is_left(project):
    first, a = task("good", str(project), "c", phase=0), task("good", str(project), "a")
    prove(project, first)
    (project / "c").unlink()
    prove(project, first, a)
    assert names(project) == {"a", "c"}
    (project / "c").unlink()
    prove(project, first, a)
    assert names(project) == {"a"}


@pytest.mark.parametrize("file", ["setup.py", "made_up.py"])
def test_results_of_sources_that_changed_meanwhile_are_not_kept(project, file):
    with pytest.raises(run.SourcesChanged):
        prove(project, task("changes", str(project / file)))
    assert not run.Journal(project / "journal").done


def test_a_task_is_another_when_its_code_is(project):
    before = task("bad").key
    assert task("bad").key == before
    assert task("bad", fallback=True).key != before
    (project / "made_up.py").write_text(TASKS + "# longer")
    work.code_of.cache_clear()
    assert task("bad").key != before


def test_a_killed_worker_is_no_result(project):
    with pytest.raises(BrokenProcessPool):
        prove(project, task("dies"))
    assert not run.Journal(project / "journal").done


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(project, how):
    (project / "waiting.py").write_text(WAITING)
    path = os.pathsep.join([str(Path(run.__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, str(project / "waiting.py"), str(project)]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        # What a shell runs in the background ignores it, and so would the parent.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        try:
            assert appears(lambda: (project / "pid").exists())
            worker = int((project / "pid").read_text())
            assert alive(worker)
            parent.send_signal(how)
            parent.wait(60)
        finally:
            parent.kill()
    assert appears(lambda: not alive(worker))
    assert not run.Journal(project / "journal").done


def appears(what):
    end = time.monotonic() + 120
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()


def alive(pid):
    """Whether it runs; where nobody waits for an orphan it stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    "rubbish", [b"", b"\n\n", b'{"key": "b", "sec', b"5", b"[]", b'{"seconds": 1}', b"\xff\xfe\x00"]
)
def test_lines_that_were_cut_off_are_no_results(tmp_path, rubbish):
    path = tmp_path / "journal"
    run.Journal(path).add("a", {"seconds": 1})
    path.write_bytes(path.read_bytes() + b"\n" + rubbish)
    journal = run.Journal(path)
    assert journal.done == {"a": {"seconds": 1}}
    journal.add("c", {"seconds": 2})
    assert run.Journal(path).done == {"a": {"seconds": 1}, "c": {"seconds": 2}}


# ---- what makes a proof fail -------------------------------------------------------------------------


def summary(*results):
    """Of tasks, each with its result."""
    done = {task.key: result for task, result in results}
    return Summary([task for task, _ in results], done, "sources", "commit")


def differences(*results):
    return summary(*results).differences()


@pytest.mark.parametrize("part", SWEEPS)
def test_hashes_of_kernels_and_fallback_are_compared(part):
    def of(number, **hashes):
        fallback = "fallback" in hashes
        return Task(part, "sweeps", part, (number,), fallback=fallback), {"hashes": hashes}

    kernels = of(1, baseline="a", avx2="a"), of(2, baseline="b", avx2="b")
    assert not differences(*kernels, of(1, fallback="a"), of(2, fallback="b"))
    (told,) = differences(*kernels, of(2, fallback="a"))
    assert "(2,)" in told
    assert differences(*kernels, of(1, fallback="c"), of(2, fallback="b"))
    assert differences(of(1, baseline="a", avx2="b"))


def test_hashes_of_builds_are_compared():
    def of(name, every=1, **hashes):
        return Task("machines", "machines", "machine", (name,)), {"every": every, "hashes": hashes}

    some = of("valgrind", 23, baseline="s")
    assert not differences(of("g++", baseline="a", avx2="a"), of("clang", baseline="a"), some)
    assert differences(of("g++", baseline="a", avx2="b"), some)
    assert differences(of("g++", baseline="a"), of("clang", baseline="b"), some)


def test_the_table_of_builds_has_what_each_did():
    def of(name, module, **more):
        result = {"compiler": "c 1.0", "calls": 406_656, "seconds": 90}
        return Task("machines", module, "machine", (name,)), result | more

    driver = {"every": 23, "guarded": 4_500_000, "step": 7, "callers": ["usual", "upward"]}
    emulator = {"every": 1, "guarded": 0, "step": 0, "callers": ["usual"]}
    lines = summary(
        of("g++", "machines", hashes={"baseline": "h1", "avx2": "h1"}, **driver),
        of("extension", "emulated", hashes={"cuda_emu": "h2"}, **emulator),
    ).machine_lines()
    steps = "4.5 million (in steps of 7 from 64 on)"
    assert [line for line in lines if "c 1.0" in line] == [
        f"| g++ | c 1.0 | 406,656 (one in 23) | usual, upward | {steps} | 1.5 | `h1` | baseline, avx2 |",
        "| extension | c 1.0 | 406,656 | usual | – | 1.5 | `h2` | cuda_emu |",
    ]


def test_the_journal_is_one_object_a_line(tmp_path):
    path = tmp_path / "journal"
    run.Journal(path).add("a", {"text": "two\nlines"})
    assert [json.loads(line) for line in path.read_text().splitlines() if line] == [
        {"key": "a", "text": "two\nlines"}
    ]
