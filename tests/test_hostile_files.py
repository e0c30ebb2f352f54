"""Hostile weight files: the main job refuses each in one line, and runs nothing of it.

The formats are parsed by safetensors and by torch; here is what the job itself does with what they raise.
"""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save

from benchmarks import real_weights

GOOD = save({"w": torch.arange(48.0).view(4, 12)})
NAMES = (
    "[bold red]w[/]",
    "a\nerror: b\r\nc\u2028d",
    "\x1b[31mred\x07",
    "\u202egnp.exe",
    "n" * 5000,
)


class Runs:
    """Unpickling it would make a folder."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def refused(path, capsys):
    results = path.parent / "refused"
    assert real_weights.main(["--weights", str(path), "--results", str(results)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and error[:-1].isprintable(), error
    assert not results.exists()


@pytest.mark.parametrize("end", [0, 7, 8, 40, 100, len(GOOD) - 1])
def test_truncated_safetensors(end, tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOOD[:end])
    refused(path, capsys)


def test_pickles_run_nothing(tmp_path, capsys):
    path, trace = tmp_path / "hostile.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"w": Runs(trace)}))
    refused(path, capsys)
    torch.save({"w": torch.ones(3), "x": Runs(trace)}, path)
    refused(path, capsys)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Runs(trace)))  # the weapon works: only the loader holds it back
    assert trace.exists()


def test_paths_without_a_regular_file(tmp_path, capsys):
    path = tmp_path / "path.safetensors"
    for make in (
        lambda: path.symlink_to(tmp_path / "nowhere"),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: os.mkfifo(path),
    ):
        make()
        refused(path, capsys)
        path.unlink()


def test_names_are_shown_without_their_control_characters(tmp_path, capsys):
    """Names are the file's own: they reach the report as they are, the terminal only as text."""
    path, results = tmp_path / "names.safetensors", tmp_path / "results"
    path.write_bytes(save({name: torch.ones(2, 3) for name in NAMES}))
    assert real_weights.main(["--weights", str(path), "--results", str(results)]) == 0
    rows = json.loads((results / "run.json").read_text())["tensors"]
    assert {row["name"] for row in rows} == set(NAMES)
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))
    for name in NAMES[1:4]:
        refused(tmp_path / f"{name}.safetensors", capsys)
