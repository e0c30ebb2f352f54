"""The main job on small files: what it reports, and what it refuses."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import quantkit
from benchmarks import real_weights

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = {
    "layer.weight": torch.randn(8, 16),
    "layer.bias": torch.randn(16),
    "half": torch.randn(4, 4).half(),
    "brain": torch.randn(4, 4).bfloat16(),
    "zeros": torch.zeros(3, 3),
    "steps": torch.arange(5),
}


def job(weights, results, capsys):
    """main() in this process: its exit code, what it printed, and the report."""
    code = real_weights.main(["--weights", str(weights), "--results", str(results)])
    printed = capsys.readouterr()
    report = results / "run.json"
    return code, printed, json.loads(report.read_text()) if report.exists() else None


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(WEIGHTS, path)
    return path


def test_report(weights, tmp_path, capsys):
    code, printed, report = job(weights, tmp_path / "results", capsys)
    assert code == 0 and "91 of 91 bit-equal" in printed.out  # a bias has no blocks, 3 no bytes
    assert printed.out.rstrip().endswith(real_weights.COMMAND)
    assert set(report) == {"backend", "tensors", "total"}
    assert report["backend"] == str(quantkit.backend())
    assert set(report["total"]) == {"reference_ms", "quantkit_ms", "speedup"}
    keys = {"name", "shape", "scheme", "bit_equal", "reference_ms", "quantkit_ms", "sqnr_db"}
    keys |= {"bytes"}
    assert all(set(row) == keys and row["bit_equal"] for row in report["tensors"])
    assert {row["name"] for row in report["tensors"]} == set(WEIGHTS) - {"steps"}
    schemes = {row["scheme"] for row in report["tensors"]}
    assert schemes == {*real_weights.SCHEMES, *quantkit.SCHEMES}
    packed = [row for row in report["tensors"] if row["scheme"] == "int4_group128"]
    sizes = {row["name"]: row["bytes"] for row in packed}
    assert sizes == {"layer.weight": 96, "layer.bias": 12, "half": 24, "brain": 24}
    zeros = [row for row in report["tensors"] if row["name"] == "zeros"]
    assert all(row["sqnr_db"] is None for row in zeros)
    sums = sum(row["reference_ms"] for row in report["tensors"])
    assert report["total"]["reference_ms"] == sums
    zero = [line for line in printed.out.splitlines() if "include_zero=True" in line]
    assert len(zero) == 2 and all(line.count(" dB") == 4 for line in zero)
    assert (tmp_path / "results" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_state_dicts_flat_and_nested(tmp_path, capsys):
    torch.save({"a": torch.randn(3, 4), "b": torch.tensor(2.5)}, tmp_path / "flat.pt")
    nested = {"epoch": 3, "state_dict": {"w": torch.randn(2, 2), "more": [torch.ones(2)]}}
    torch.save(nested, tmp_path / "nested.pth")
    for name, tensors in (
        ("flat.pt", {"a", "b"}),
        ("nested.pth", {"state_dict.w", "state_dict.more.0"}),
    ):
        code, _, report = job(tmp_path / name, tmp_path / name[:-3], capsys)
        assert code == 0 and {row["name"] for row in report["tensors"]} == tensors


def test_what_has_no_parameters_is_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "odd.pt"
    odd = {
        "ok": torch.ones(2),
        "empty": torch.empty(0, 3),
        "c": torch.ones(2, dtype=torch.complex64),
    }
    odd["lazy"] = torch.ones(2, device="meta")
    odd["f8"] = torch.ones(2).to(torch.float8_e4m3fn)
    torch.save(odd, path)
    code, printed, report = job(path, tmp_path / "results", capsys)
    assert code == 0 and {row["name"] for row in report["tensors"]} == {"ok"}
    for name in ("empty", "c", "f8", "lazy"):
        assert f"left out {name}:" in printed.out


class RunsCode:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


def bad_files(tmp_path):
    good = tmp_path / "good.safetensors"
    save_file({"w": torch.randn(64, 64)}, good)
    trace = tmp_path / "trace"
    made = {
        "truncated.safetensors": good.read_bytes()[:5000],
        "foreign.safetensors": b"not a safetensors file at all",
        "foreign.pt": b"neither a zip nor a pickle",
        "empty.pth": b"",
        "number.pt": b"hello",  # KeyError(101)
        "words.txt": b"hello",
        "code.pt": pickle.dumps({"w": RunsCode(trace)}),
    }
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"w": torch.randn(64, 64)}, tmp_path / "whole.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:3000])
    torch.save({"steps": torch.arange(3)}, tmp_path / "integers.pt")
    (tmp_path / "folder.safetensors").mkdir()
    names = [*made, "truncated.pt", "integers.pt", "folder.safetensors", "missing.safetensors"]
    return [tmp_path / name for name in names], trace


def refused(path, folder, capsys):
    code, printed, report = job(path, folder / "results", capsys)
    assert code == 2 and report is None, path
    error = printed.err
    assert error.startswith("error: ") and error.endswith("\n") and error[:-1].isprintable(), error
    return error


def test_unusable_files_are_errors_of_one_line(tmp_path, capsys):
    files, trace = bad_files(tmp_path)
    for path in files:
        error = refused(path, tmp_path, capsys)
        assert path.name in error
        if path.name in ("empty.pth", "number.pt"):
            assert error.endswith("as weights: it is no file that torch.save writes\n")
    assert not trace.exists(), "unpickling ran code"
    pickle.loads(pickle.dumps(RunsCode(trace)))  # only the loader held it back
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
        refused(path, tmp_path, capsys)
        path.unlink()


def test_names_are_shown_without_their_control_characters(tmp_path, capsys):
    """Names are the file's own: they reach the report as they are, the terminal only as text."""
    names = (
        "[bold red]w[/]",
        "a\nerror: b\r\nc\u2028d",
        "\x1b[31mred\x07",
        "\u202egnp.exe",
        "n" * 5000,
    )
    path = tmp_path / "names.safetensors"
    save_file({name: torch.ones(2, 3) for name in names}, path)
    code, printed, report = job(path, tmp_path / "names", capsys)
    assert code == 0 and {row["name"] for row in report["tensors"]} == set(names)
    assert all(line.isprintable() for line in printed.out.split("\n"))
    for name in names[1:4]:
        refused(tmp_path / f"{name}.safetensors", tmp_path, capsys)


@pytest.mark.parametrize("which", ["q", "x_hat", "scale", "zero_point"])
def test_a_differing_bit_is_found_and_named(weights, tmp_path, capsys, monkeypatch, which):
    right = quantkit.quantize_dequant

    def wrong(x, **arguments):
        q, x_hat, p = right(x, **arguments)
        if x.dtype == torch.float16 and not arguments["sym"]:
            t = {"q": q, "x_hat": x_hat, "scale": p.scale, "zero_point": p.zero_point}[which]
            bits = (
                t
                if t.dtype == torch.int8
                else t.view({2: torch.int16, 4: torch.int32}[t.element_size()])
            )
            bits.view(-1)[-1] ^= 1
        return q, x_hat, p

    monkeypatch.setattr(quantkit, "quantize_dequant", wrong)
    code, printed, report = job(weights, tmp_path / "results", capsys)
    assert code == 1
    lines = printed.err.strip().splitlines()
    assert len(lines) == 4 and all("half" in line and which in line for line in lines)
    assert sum(not row["bit_equal"] for row in report["tensors"]) == 4


def test_a_wrong_bit_of_a_named_scheme_is_reported(weights, tmp_path, monkeypatch, capsys):
    right = quantkit.quantize

    def wrong(x, scheme):
        q, p = right(x, scheme)
        q.view(torch.uint8).view(-1)[0] ^= 1
        return q, p

    monkeypatch.setattr(quantkit, "quantize", wrong)
    code, _, report = job(weights, tmp_path / "results", capsys)
    assert code == 1
    wrong_rows = [row for row in report["tensors"] if not row["bit_equal"]]
    assert len(wrong_rows) == 61 and {row["scheme"] for row in wrong_rows} == {*quantkit.SCHEMES}


def test_the_reference_is_not_compared_with_itself(weights, tmp_path):
    command = [sys.executable, "-m", "benchmarks.real_weights", "--weights", str(weights)]
    env = {k: v for k, v in os.environ.items() if k != "QUANTKIT_ISA"} | {"QUANTKIT_REFERENCE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "proves nothing" in done.stderr.splitlines()[-1]
