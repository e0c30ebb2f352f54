"""The tools, where no GPU and no other torch is needed."""

import importlib
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Imports a tool by name, with the arguments of a run into tmp_path."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(sys, "argv", ["tool", str(tmp_path / "out")])

    def load(name):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


def results(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("out/*.json")}


def test_every_part_of_a_gpu_run_ends_and_a_summary_comes_last(tool, tmp_path, capsys, monkeypatch):
    gpu = tool("gpu")
    checks = {
        "passes": "def test_it(): pass",
        "skips": "import pytest\n@pytest.mark.skip\ndef test_it(): pass",
        "hangs": "import time\ndef test_first(): pass\ndef test_it(): time.sleep(60)",
    }
    full = 'def pytest_addoption(parser): parser.addoption("--full", action="store_true")'
    (tmp_path / "conftest.py").write_text(full)
    for name, text in checks.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    run = ("-c", "/dev/null", "--rootdir", str(tmp_path))  # not by the options of this project
    parts = [gpu.Part(n, 15, gpu.tests("test", f"{tmp_path}/test_{n}.py", *run)) for n in checks]
    parts += [gpu.Part("stubborn", 6, gpu.python("-c", "import signal, time; " + STUBBORN))]
    parts += [gpu.Part("fails", 15, gpu.python("-c", "exit('the reason')"))]
    monkeypatch.setattr(gpu, "STAGES", [parts[:1], parts[1:]])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code
    found = results(tmp_path)
    assert [r["name"] for r in found.pop("summary")] == [p.name for p in parts]
    assert {name for name, r in found.items() if r["ok"]} == {"passes"}
    assert found["passes"]["passed"] == 1 and found["skips"]["skipped"] == 1
    assert found["skips"]["said"].startswith("every test was skipped")
    assert found["hangs"]["passed"] == 1 and found["hangs"]["said"].startswith("stopped after")
    assert found["stubborn"]["seconds"] < 12 and found["fails"]["said"] == "the reason"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("failed: skips, hangs, stubborn, fails")


STUBBORN = "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"


def test_a_gpu_run_that_passes_exits_with_0(tool, monkeypatch, capsys):
    gpu = tool("gpu")
    monkeypatch.setattr(gpu, "STAGES", [[gpu.Part("one", 15, gpu.python("-c", "print('done')"))]])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert not stop.value.code and "everything passed" in capsys.readouterr().out


def test_the_parts_of_a_gpu_run_fit_into_ten_minutes_and_name_tests_that_are_there(tool):
    gpu = tool("gpu")
    assert sum(max(part.budget for part in stage) for stage in gpu.STAGES) < 600
    text = (TOOLS.parent / "tests" / "test_gpu.py").read_text()
    for words in (gpu.STREAMS, gpu.GRAPHS, gpu.LARGE):
        assert all(word in text for word in words.split(" or ")), words


def test_the_matrix_has_every_python_and_writes_its_table(tool, tmp_path, monkeypatch):
    matrix = tool("matrix")
    assert set(matrix.MATRIX.values()) == {"3.10", "3.11", "3.12", "3.13"}
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n")
    monkeypatch.setattr(matrix, "PAGE", page)
    row = {"torch": "2.11.0+cu130", "python": "3.12.1", "build": "13.0", "date": "2026-01-02"}
    good = row | {"passed": 7, "failed": 0, "libraries": ["2.12", "2.11"]}
    matrix.write(matrix.markdown([good, row | {"failure": "compile: no"}], "0123456789abcdef0123"))
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "| 2.11.0 | CUDA 13.0 | 3.12.1 | 7 passed | 2.12, 2.11 | 2026-01-02 |" in lines
    assert "| 2.11.0 | CUDA 13.0 | 3.12.1 | compile: no |  | 2026-01-02 |" in lines


CPP = r"""// a comment \
   that goes on
#include "a.h"  // code

int a = 1'000; /* two
   lines */ char b = '"';
const char* c = "// no comment"; const char* d = R"x(
/* text )" */
)x";
"""  # lines of code: the include, a, b, c and d, their text, their end

PYTHON = '''"""A docstring of
two lines."""

import os  # code


def f():
    "A docstring " \\
        "in two."
    return """text

    # text"""


class C: "A docstring beside code."
'''  # lines of code: import, def, return, its second line of text, class


def test_lines_of_code_leave_out_comments_and_docstrings(tool, tmp_path, capsys):
    lines = tool("lines")
    assert lines.cpp_lines(CPP) == 6
    assert lines.python_lines(PYTHON) == 5
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "a.cu").write_text(CPP)
    (folder / "b.py").write_text(PYTHON + "x = 1" + " " * 100)
    (folder / "c.txt").write_text("text\n")
    lines.main([str(folder), str(folder / "a.cu")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 files 12 lines of more than 100 columns: 1" in printed
    assert printed.endswith("b.py:16: 105")
    with pytest.raises(SystemExit, match=r"c\.txt: expected a folder or a file in"):
        lines.main([str(folder / "c.txt")])


def test_prose_names_long_sentences_and_invented_words(tool):
    prose = tool("prose")
    long = "word " * 31
    page = f"# {long}\n\nA `call` is short. {long.strip()}.\n\n| a |\n|---|\n| lent |\n\n- for\n  ever\n"
    faults = [fault.split(":")[0] for _, fault in prose.faults(page)]
    assert faults == ["31 words", '"lent"', '"for ever"']
    assert not list(prose.faults(f"{'word ' * 29}word. `{long}`\n\n```\n{long}\n```\n"))
