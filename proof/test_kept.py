"""The comparison with proof/short.json."""

import kept
from kept import Found
from parts import PARTS
from work import Task

KEPT = {
    "floats: a": {"hash": "1", "drawn": None, "backends": ["avx2", "fallback"]},
    "halves: b": {"hash": "2", "drawn": "x", "backends": ["avx2"]},
}
SAME = [Found("floats: a", None, "avx2", "1"), Found("halves: b", "x", "avx2", "2")]


def test_equal_hashes_are_right():
    assert kept.compare(SAME, KEPT, whole=True) == ([], [])


def test_another_hash_is_wrong():
    (wrong,), notes = kept.compare([SAME[0], Found("halves: b", "x", "avx512", "3")], KEPT, True)
    assert wrong == "halves: b: avx512 gave 3, contract 1 2" and not notes


def test_inputs_that_nobody_kept_are_not_compared():
    assert kept.compare([*SAME, Found("floats: c", None, "avx2", "9")], KEPT, True) == ([], [])


def test_what_was_not_run_is_told():
    (wrong,), _ = kept.compare(SAME[:1], KEPT, whole=True)
    assert "halves: b" in wrong
    assert kept.compare(SAME[:1], KEPT, whole=False) == ([], [])


def test_other_parameters_are_a_note():
    wrong, (note,) = kept.compare([SAME[0], Found("halves: b", "y", "avx2", "3")], KEPT, True)
    assert "halves: b" in note and not wrong


def test_a_run_adds_keys_and_backends(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "FILE", tmp_path / "short.json")
    new = [
        Found("floats: a", None, "baseline", "1"),
        Found("halves: b", "y", "avx512", "3"),  # of other parameters: stays out
        Found("floats: c", None, "avx2", "9"),
    ]
    kept.write(kept.added(new, KEPT))
    assert kept.read() == {
        "floats: a": {"hash": "1", "drawn": None, "backends": ["avx2", "baseline", "fallback"]},
        "halves: b": KEPT["halves: b"],
        "floats: c": {"hash": "9", "drawn": None, "backends": ["avx2"]},
    }


def test_every_kept_sweep_is_one_of_the_short_form():
    """Each has one key of its own, and words that changed would leave a key without a task."""
    tasks = [task for task in PARTS["samples"].tasks(True) if not task.fallback]
    done = {task.key: {"drawn": None, "hashes": {"avx2": ""}} for task in tasks}
    keys = [one.key for one in kept.found(tasks, done)]
    assert len(set(keys)) == len(keys)
    assert {key for key in kept.read() if not key.startswith("recorded")} <= set(keys)


def test_recorded_calls_have_keys():
    record = Task("record", "machines", "record", (True,))
    driver = Task("g++", "machines", "machine", ("g++", True))
    valgrind = Task("valgrind", "machines", "machine", ("valgrind", True))
    done = {
        record.key: {"results": "1"},
        driver.key: {"every": 1, "hashes": {"avx2": "2"}},
        valgrind.key: {"every": 23, "hashes": {"avx2": "3"}},
    }
    assert list(kept.found([record, driver, valgrind], done)) == [
        Found("recorded: results of operators", None, "cuda_emu", "1"),
        Found("recorded: memory that kernels wrote, sums too", None, "avx2 of g++", "2"),
        Found(
            "recorded: memory that kernels wrote, sums too, one call in 23",
            None,
            "avx2 of valgrind",
            "3",
        ),
    ]
