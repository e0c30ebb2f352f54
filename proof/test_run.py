"""The machinery of the proof: what is kept, what is run again, and what must never be kept."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import report
import run
import work
from parts import PARTS
from work import Task

TASKS = """
import os, time
from pathlib import Path
from work import Missing

def good(folder, name):
    Path(folder, name).write_text("done")
    return {"inputs": 2, "hashes": {"here": name}}

def bad(*folder):
    raise ValueError("a wrong bit")

def misses():
    raise Missing("no such compiler")

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
if __name__ == "__main__":
    folder = sys.argv[1]
    sys.path.insert(0, folder)
    tasks = [work.Task("waits", "made_up", "waits", (folder,))]
    run.run_all(tasks, run.Journal(Path(folder, "journal")), 1, lambda: 0)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with tasks and sources of its own."""
    (tmp_path / "made_up.py").write_text(TASKS)
    (tmp_path / "source").write_text("the sources")
    monkeypatch.syspath_prepend(tmp_path)  # its workers too
    return tmp_path


def task(function, *args, **more):
    return Task(function, "made_up", function, args, **more)


def prove(project, *tasks):
    """The errors, and the journal as the next run reads it."""
    journal, sources = run.Journal(project / "journal"), (project / "source").read_text
    errors = run.run_all(tasks, journal, 1, sources, say=lambda text: None)
    return errors, run.Journal(project / "journal").done


def names(project):
    return {path.name for path in project.iterdir()} & {"a", "b", "c"}


def test_what_is_done_is_not_done_again(project):
    a, b = task("good", str(project), "a"), task("good", str(project), "b")
    errors, done = prove(project, a)
    assert not errors and done[a.key]["hashes"] == {"here": "a"}
    (project / "a").unlink()
    errors, done = prove(project, a, b)
    assert not errors and done.keys() == {a.key, b.key}
    assert names(project) == {"b"}


def test_what_failed_is_told_and_not_kept(project):
    a, bad, misses = task("good", str(project), "a"), task("bad"), task("misses")
    for _ in range(2):
        errors, done = prove(project, bad, misses, a)
        assert done.keys() == {a.key}
        assert any(bad.key in error and "a wrong bit" in error for error in errors)
        assert f"{misses.key}\nno such compiler" in errors  # and no traceback


def test_the_first_phase(project):
    """It runs again while something is left, and nothing runs on what a failed one left."""
    first, a = task("good", str(project), "c", phase=0), task("good", str(project), "a")
    (error,), _ = prove(project, first, a, task("bad", phase=0))
    assert "a wrong bit" in error and names(project) == {"c"}
    (project / "c").unlink()
    prove(project, first, a)
    assert names(project) == {"a", "c"}
    (project / "c").unlink()
    prove(project, first, a)
    assert names(project) == {"a"}


def test_results_of_sources_that_changed_meanwhile_are_not_kept(project):
    with pytest.raises(run.SourcesChanged):
        prove(project, task("changes", str(project / "source")))
    assert not run.Journal(project / "journal").done


def test_a_killed_worker_is_no_result(project):
    with pytest.raises(BrokenProcessPool):
        prove(project, task("dies"))
    assert not run.Journal(project / "journal").done


def test_workers_end_with_their_parent(project):
    (project / "waiting.py").write_text(WAITING)
    path = os.pathsep.join([str(Path(run.__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, str(project / "waiting.py"), str(project)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}) as parent:
        try:
            assert appears((project / "pid").exists)
            worker = int((project / "pid").read_text())
            assert alive(worker)
        finally:
            parent.kill()
    assert appears(lambda: not alive(worker))


def appears(what):
    end = time.monotonic() + 120
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()


def alive(pid):
    """Whether it runs; an orphan that no process waits for stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("rubbish", [b"\n\n", b'{"key": "b", "sec', b"5", b'{"s": 1}', b"\xff\0"])
def test_lines_that_were_cut_off_are_no_results(tmp_path, rubbish):
    path = tmp_path / "journal"
    run.Journal(path).add("a", {"text": "two\nlines"})
    path.write_bytes(path.read_bytes() + b"\n" + rubbish)
    run.Journal(path).add("c", {"s": 2})
    assert run.Journal(path).done == {"a": {"text": "two\nlines"}, "c": {"s": 2}}


# ---- results ----------------------------------------------------------------------------------------


def test_hashes_of_kernels_and_fallback_are_compared():
    def of(number, **hashes):
        return Task("floats", "sweeps", "floats", (number,), "fallback" in hashes), hashes

    def differences(*results):
        done = {task.key: {"hashes": hashes} for task, hashes in results}
        return report.differences([task for task, _ in results], done)

    kernels = of(1, baseline="a", avx2="a"), of(2, baseline="b", avx2="b")
    assert not differences(*kernels, of(1, fallback="a"), of(2, fallback="b"))
    (told,) = differences(*kernels, of(2, fallback="a"))
    assert "floats(2,)" in told
    assert differences(of(1, baseline="a", avx2="b"))


def test_hashes_of_builds_are_compared():
    tasks = [Task(name, "machines", "machine", (name,)) for name in ("g++", "clang++", "valgrind")]

    def differences(*hashes):
        results = ({"every": n, "hashes": h} for n, h in zip((1, 1, 23), hashes, strict=True))
        return report.differences(tasks, {t.key: r for t, r in zip(tasks, results, strict=True)})

    assert not differences({"baseline": "a", "avx2": "a"}, {"baseline": "a"}, {"baseline": "s"})
    assert differences({"baseline": "a", "avx2": "b"}, {"baseline": "a"}, {"baseline": "s"})
    assert differences({"baseline": "a"}, {"baseline": "b"}, {"baseline": "s"})


def test_rows_add_what_the_kernels_covered():
    tasks = [Task("floats", "sweeps", "floats", (i,), back) for back in (0, 1) for i in (1, 2)]
    done = {
        t.key: {"inputs": 2, "compiler": "c", "hashes": {"fallback" if t.fallback else "avx2": h}}
        for t, h in zip(tasks, "abab", strict=True)
    }
    both = report.short_hash("ab")
    hashes = {"avx2": both, "fallback": both}
    assert report.rows(tasks, done) == {"floats": {"inputs": 4, "compiler": "c", "hashes": hashes}}


def test_a_result_file_is_current_until_its_sources_change(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.state("tests") == "no results"
    tasks = [Task("large", "suites", "large")]
    done = {tasks[0].key: {"passed": 26, "cpu_s": 90.0}}
    report.write("tests", report.identity("tests"), ["avx2"], tasks, done)
    assert report.state("tests") == "current"
    assert json.loads(report.path_of("tests").read_text())["rows"]["large"]["passed"] == 26
    text = page.read_text()
    assert text.startswith(f"above\n{report.BEGIN}\n|") and text.endswith(f"{report.END}\nbelow\n")
    assert "| tests | 26 tests |" in text and "- Instruction sets: avx2." in text
    monkeypatch.setattr(report, "product_files", lambda: [work.ROOT / "setup.py"])
    assert report.state("tests") == "results of other sources"


def test_tasks_import_nothing_that_results_do_not_name():
    code = """
import parts, record, suites, divisions, test_large, sys
suites.generated(5, seed=1)
print(*(name.split(".")[1] for name in sys.modules if name.startswith("quantkit.")))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (work.HERE, work.ROOT)))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "reference" in imported and imported & work.BESIDE == {"_version"}


def test_every_part_has_tasks_and_code():
    for name, part in PARTS.items():
        tasks = list(part.tasks(False))
        assert len({task.key for task in tasks}) == len(tasks) > 0, name
        assert all(any(work.ROOT.glob(pattern)) for pattern in part.code), name
