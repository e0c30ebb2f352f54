"""The command: rules, what is shown, exit codes, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lib.sources import files_of, folder, sparse
from safetensors.torch import save_file

import quantkit
from quantkit import checkpoint
from quantkit.checkpoint import cli, reports, rules
from quantkit.checkpoint.cli import main
from quantkit.checkpoint.config_json import weights_in
from quantkit.checkpoint.files import CheckpointError
from quantkit.checkpoint.reports import picture

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("without_pictures")
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("cli") / "src", layers=2)


def schemes(source, **keywords):
    """The name of the scheme, or the reason why there is none, of each tensor."""
    made, _ = checkpoint.dry_run(source, source.parent / "none", **keywords)
    return {i.name: i.weight.scheme.name if i.weight else i.reason for i in made.items}


def wrong(text, **keywords):
    with pytest.raises(CheckpointError) as error:
        schemes_of = checkpoint.options(**keywords)
        assert schemes_of
    assert text in str(error.value) and str(error.value).isprintable(), error.value


# ---- rules ----------------------------------------------------------------------------------------


def test_defaults(source):
    found = schemes(source)
    assert found[UP.format(0)] == found[UP.format(1)] == "w8a8"
    assert found["model.embed_tokens.weight"] == "an embedding"
    assert found["lm_head.weight"] == "a head"
    assert found["model.layers.0.mlp.gate.weight"] == "a router"
    assert found["model.layers.0.mlp.up_proj.bias"] == "it is 1-D, not 2-D"
    assert found["position_ids"] == "its dtype is int64"


def test_the_first_rule_that_matches_wins(source, tmp_path):
    (tmp_path / "rules.toml").write_text("""
scheme = "w4"
exclude = ["*.layers.0.mlp.gate"]
include = ["lm_head"]
shard_size = "1MB"
[[rule]]
match = 're:model\\.layers\\.[01]\\.mlp\\.gate'
scheme = { base = "w8a8", block = [1, 64], activations = false }
[[rule]]
match = ["*.layers.0.*up_proj.weight", "nothing else"]
scheme = { base = "fp8", block = "tensor", name = "mine" }
[[rule]]
match = "*up_proj*"
scheme = "w8"
""")
    with pytest.raises(CheckpointError, match="'nothing else': matches no tensor"):
        schemes(source, config=tmp_path / "rules.toml")
    text = (tmp_path / "rules.toml").read_text().replace(', "nothing else"', "")
    (tmp_path / "rules.toml").write_text(text)
    found = schemes(source, config=tmp_path / "rules.toml")
    assert found[UP.format(0)] == "mine" and found[UP.format(1)] == "w8"
    assert found["model.layers.0.mlp.gate.weight"] == "excluded"
    assert found["model.layers.1.mlp.gate.weight"] == "w8a8 with activations=False, block=[1, 64]"
    assert found["lm_head.weight"] == "w4"
    found = schemes(
        source, config=tmp_path / "rules.toml", exclude=["lm_head*"], include=["*up_proj*"]
    )
    assert found["lm_head.weight"] == "excluded"
    assert found[UP.format(0)] == found[UP.format(1)] == "w4"
    checkpoint.quantize(source, tmp_path / "dst", config=tmp_path / "rules.toml")
    assert checkpoint.verify(source, tmp_path / "dst") == []


def test_patterns_that_decide_nothing_are_named(source, tmp_path, capsys):
    command = ["quantize", str(source), str(tmp_path / "dst"), "--exclude", "*up_proj.weight"]
    command += ["--include", "*up_proj", "--include", "*gate"]
    note = "pattern '*up_proj': decides nothing: patterns before it match all its tensors\n"
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().err == note
    assert main(command) == 0
    assert capsys.readouterr().err.startswith(note)


def test_wrong_options(source, tmp_path):
    wrong("scheme: expected one of w8a8, ", scheme="w9")
    wrong("scheme: expected one of name, dtype", scheme={"base": "w8", "bits": 4})
    wrong(
        'block: expected "tensor", "channel" or [rows, numbers of a row], got \'row\'',
        scheme={"base": "w8", "block": "row"},
    )
    wrong(
        'block: expected [1, 16] for nvfp4-pack-quantized, got "tensor"',
        scheme={"base": "nvfp4", "block": "tensor"},
    )
    wrong(
        "symmetric: expected true for float8_e4m3fn, got false",
        scheme={"base": "fp8", "symmetric": False},
    )
    wrong("name: expected a str", scheme={"base": "w8", "name": ["a"]})
    wrong("scheme: block: expected", scheme={"base": "w8", "block": 3})
    wrong("dtype: expected", scheme={"base": "w8", "dtype": "float8_e4m3fn"})
    wrong("config: expected one of scheme, include", config={"shcheme": "w8"})
    good = {"match": "a", "skip": True}
    for table in (
        {"match": "a"}, {"skip": True}, {"match": "a", "scheme": "w8", "skip": True},
        {"match": "a", "skip": False}, {"match": "a", "skip": "yes"},
        {"match": "a", "scheme": "w8", "skip": "yes"},
    ):  # fmt: skip
        text = f"rule 2: expected match, and scheme or skip = true, got {table}"
        wrong(text, config={"rule": [good, table]})
    wrong("rule 1: match: expected a pattern or more", config={"rule": [{**good, "match": []}]})
    wrong("rule 1: keys: expected one of match", config={"rule": [{"match": "a", "bits": 4}]})
    wrong("rule 1: scheme: expected one of w8a8", config={"rule": [{"match": "a", "scheme": "w"}]})
    wrong("rule: expected tables: [[rule]], got {'match'", config={"rule": {"match": "a"}})
    wrong("exclude: expected patterns, got 3", config={"exclude": [3]})
    wrong("include: expected a list of patterns, got '*x*'", config={"include": "*x*"})
    wrong("exclude: 're:('", exclude=["re:("])
    wrong("allow_nonfinite: expected true or false", config={"allow_nonfinite": 1})
    wrong("none.toml: No such file or directory", config=tmp_path / "none.toml")
    for text in ("a = 1\nscheme = ", "a = 1\nscheme = 'w8", "a = 1\nb = 2 3"):
        (tmp_path / "wrong.toml").write_text(text)
        wrong("line 2", config=tmp_path / "wrong.toml")
    (tmp_path / "wrong.toml").write_bytes(b"\xff")
    wrong("wrong.toml: 'utf-8' codec", config=tmp_path / "wrong.toml")
    for size in ("2 gigabytes", "-1GB", "0", "1.2.3GB", "", True, "GB"):
        wrong("shard_size: expected", shard_size=size)
    with pytest.raises(
        CheckpointError, match=r"no tensor of it can be quantized to w8a8: .*\.bias"
    ):
        schemes(source, include=["*bias"])
    with pytest.raises(CheckpointError, match="layout: expected one kind for a checkpoint"):
        schemes(
            source, scheme="fp8_block", config={"rule": [{"match": UP.format(0), "scheme": "w8"}]}
        )


def test_sizes():
    for text, size in ("2GB", 2 * 10**9), ("1.5 KiB", 1536), ("7", 7), (9, 9), ("3MB", 3 * 10**6):
        assert rules.size_of(text) == size


HUGE = 10**400
NESTED = "re:" + "(" * 3000 + "a" + ")" * 3000
OWN = {"base": "w4", "layout": "quantkit", "activations": False}
BLOCK = "block: expected [rows from 1 on, numbers from 1 on or -1 for all], each below 2^63, got "


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shard_size": "9" * 400 + "TB"}, f"shard_size: expected 1 byte to 8 EiB, got {'9' * 200}…"),
        ({"shard_size": "10000000TB"}, "shard_size: expected 1 byte to 8 EiB, got 10000000TB"),
        (
            {"shard_size": HUGE},
            "shard_size: expected a size such as 2GB or 500MiB, got an int of 1329 bits",
        ),
        ({"allow_nonfinite": "x" * 400}, f"expected true or false, got '{'x' * 199}…"),
        (
            {"exclude": ["re:a{99999999999999999999}"]},
            "exclude: 're:a{99999999999999999999}': the repetition number is too large",
        ),
        ({"include": ["re:(?a)(?u)a"]}, "include: 're:(?a)(?u)a': ASCII and UNICODE flags"),
        ({"exclude": [NESTED]}, f"exclude: {repr(NESTED)[:200]}…: it is nested too deep"),
        ({"scheme": {**OWN, "block": [1, 10**30]}}, f"scheme: {BLOCK}[1, an int of 100 bits]"),
        ({"scheme": {**OWN, "block": [1 << 63, 8]}}, f"scheme: {BLOCK}[{1 << 63}, 8]"),
        ({"config": "a = " + "[" * 3000 + "]" * 3000}, "x.toml: it is nested too deep"),
        ({"config": "rule" + ".a" * 3000 + " = 1"}, "x.toml: it is nested too deep"),
        ({"config": "shard_size = 0x" + "f" * 6000}, "x.toml: Exceeds the limit (4300 digits)"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_values_that_are_too_large(given, message, tmp_path):
    if "config" in given:
        (tmp_path / "x.toml").write_text(given["config"])
        given = {"config": tmp_path / "x.toml"}
    wrong(message, **given)


def test_metadata_with_a_block_that_is_too_large():
    scheme = {**checkpoint.SCHEMES["w8"].as_dict(), "layout": "quantkit", "block": [1, 10**30]}
    said = {"version": 1, "schemes": [scheme], "weights": {"a": [0, [4, 8], "float32"]}}
    with pytest.raises(ValueError) as error:
        weights_in({"quantkit": json.dumps(said)})
    assert BLOCK in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_size": "x"}, "shard_size: expected a size such as 2GB or 500MiB, got x"),
        ({"shard_size": HUGE}, "shard_size: expected a size"),
        ({"rules": [[[5], None]]}, "rules: expected patterns, got 5"),
        ({"rules": [["ab", None]]}, "rules: expected a list of patterns, got 'ab'"),
        ({"rules": [[["re:("], None]]}, "rules: 're:(': missing )"),
        ({"rules": [[["re:a{99999999999999999999}"], None]]}, "the repetition number is too large"),
        ({"allow_nonfinite": "x"}, "allow_nonfinite: expected true or false, got 'x'"),
    ],
    ids=str,
)
def test_remembered_options_that_someone_else_wrote(change, message):
    made = checkpoint.options(exclude=["a"], shard_size="2GB")
    good = made.as_dict()
    assert rules.Options.of_dict(good) == made
    with pytest.raises(CheckpointError) as error:
        rules.Options.of_dict({**good, **change})
    text = str(error.value)
    assert text.startswith("options: not as quantkit writes them: ") and message in text


# ---- the command ----------------------------------------------------------------------------------


def test_quantize_verify_report_dequantize(source, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert main(["quantize", str(source), str(dst), "--scheme", "w8"]) == 0
    out, err = capsys.readouterr()
    first, kept, worst, *table = out.splitlines()
    assert first.startswith("2 weights quantized, 9 tensors kept, ")
    assert kept.startswith("kept: it is 1-D, not 2-D (4); ") and "; a head (1)" in kept
    assert worst == "the 2 worst:" and len(table) == 3
    assert err.count(": done in ") == 2 and err.endswith(
        "no report.png: matplotlib is not installed\n"
    )
    assert main(["verify", str(source), str(dst)]) == 0
    assert capsys.readouterr().out == "every byte is the same\n"
    assert main(["report", str(dst)]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == [first, kept]
    assert main(["report", str(dst), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == checkpoint.report(dst)
    assert main(["dequantize", str(dst), str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.startswith("2 weights dequantized, ")
    assert main(["info", str(dst), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"] == {"w8": 2}
    (dst / "tokenizer.json").write_text("{}")
    assert main(["verify", str(source), str(dst)]) == cli.DIFFERS
    assert capsys.readouterr().out == "differs: tokenizer.json\n"
    assert main(["verify", str(source), str(dst), "--json"]) == cli.DIFFERS
    assert json.loads(capsys.readouterr().out) == {"differing": ["tokenizer.json"]}


def test_dry_run_lists_all_and_writes_nothing(source, tmp_path, capsys):
    command = ["quantize", str(source), str(tmp_path / "dst"), "--dry-run"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"  {UP.format(0)} [96, 256] bfloat16 w8a8: 49,152 -> 24,768 bytes\n" in out
    assert "  lm_head.weight [128, 256] bfloat16 kept: a head\n" in out
    assert "copied: 1_Pooling/config.json\n" in out and "left out: .git/: hidden\n" in out
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert sum(len(file["tensors"]) for file in said["files"]) == 11
    assert not (tmp_path / "dst").exists()


def test_exit_codes(source, tmp_path, capsys, monkeypatch):
    def error(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    code, err = error("quantize", source, source)
    assert code == cli.REFUSED and err == f"quantkit: error: {source}: is the source itself\n"
    with monkeypatch.context() as several:
        several.setenv("RANK", "2")
        several.setenv("WORLD_SIZE", "3")
        _, err = error("quantize", source, source)
        assert err == f"quantkit: rank 2 of 3: error: {source}: is the source itself\n"
        several.setenv("WORLD_SIZE", "x\n")
        _, err = error("quantize", source, tmp_path / "dst")
    assert err == "quantkit: error: WORLD_SIZE: expected a number, got 'x\\n'\n"
    code, err = error("quantize", source, tmp_path / "dst", "--exclude", "nothing\n")
    assert code == cli.REFUSED and err.count("\n") == 1 and err.isascii()
    scheme = f"scheme: expected one of {', '.join(checkpoint.SCHEMES)}, got"
    for arguments, text in (
        (("--scheme", "w5"), f"{scheme} 'w5'"),
        (("--scheme", "int4_group128"), f"{scheme} 'int4_group128', the functions' name of w4"),
        (
            ("--scheme", "int8_channel"),
            f"{scheme} 'int8_channel', the functions' name of w8a8 or w8",
        ),
        (("--threads", "0"), "argument --threads: expected 1 to 4095, got '0'"),
        (("--threads", "x\x1b"), r"argument --threads: expected 1 to 4095, got 'x\x1b'"),
        (("--threads", "00000000054"), "argument --threads: expected 1 to 4095, got '00000000054'"),
        (("--bits", "4"), "unrecognized arguments: --bits 4"),
    ):
        found = error("quantize", source, tmp_path / "dst", *arguments)
        assert found == (cli.REFUSED, f"quantkit: error: {text}\n")
    text = "quantkit: error: the following arguments are required: DST\n"
    assert error("quantize", source) == (cli.REFUSED, text)
    assert error("report", source) == (
        cli.REFUSED, f"quantkit: error: {source}: has no report.json\n",
    )  # fmt: skip
    monkeypatch.setattr(checkpoint.run, "free_space", lambda _: 10)
    code, err = error("quantize", source, tmp_path / "dst")
    assert code == cli.FULL and err.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.setattr(cli, "quantize", lambda *_, **__: (tmp_path / "none" / "file").read_text())
    code, err = error("quantize", source, tmp_path / "dst")
    assert code == cli.REFUSED and err.endswith("none/file: No such file or directory\n")


ROW = {
    "name": "a", "shape": [2, 2], "scheme": "w8", "sqnr_db": None, "max_error": 0.5,
    "saturated": 0, "left_out": 0, "bytes_before": 1, "bytes_after": 1,
}  # fmt: skip


def test_report_that_someone_else_wrote(tmp_path, capsys):
    row = {**ROW, "name": "a\x1b[31m"}
    good = {"tensors": [row], "kept": [], "bytes_before": 1, "bytes_after": 1}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(good))
    assert main(["report", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert r"a\x1b[31m" in out and err == ""
    path.write_text(json.dumps({**good, "tensors": [{**row, "left_out": 3}]}))
    assert main(["report", str(tmp_path), "--json"]) == 0
    warning = "quantkit: warning: weights with errors that are not finite: 1\n"
    assert capsys.readouterr().err == warning
    bad = [{**good, "tensors": [{**row, key: []}]} for key in row if key != "shape"]
    bad += [
        {**good, "tensors": [{**row, "shape": ["x"]}]},
        {**good, "tensors": 3},
        {**good, "kept": 1},
        {**good, "kept": [["a", 1]]},
    ]
    bad += [{"tensors": []}, [], {**good, "bytes_before": "x"}]
    for said in bad:
        path.write_text(json.dumps(said))
        assert main(["report", str(tmp_path)]) == cli.REFUSED, said
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", [HUGE, float("inf"), float("nan")], ids=["huge", "inf", "nan"])
def test_figures_that_are_too_large(value, tmp_path):
    good = {"tensors": [ROW], "kept": [], "bytes_before": 1, "bytes_after": 1}
    wrong_rows = [{**ROW, key: value} for key in ROW if type(ROW[key]) in (int, float, type(None))]
    for said in (
        *({**good, "tensors": [row]} for row in wrong_rows),
        {**good, "bytes_before": value},
        {**good, "bytes_after": value},
    ):
        (tmp_path / "report.json").write_text(json.dumps(said))
        with pytest.raises(CheckpointError, match="is no report of quantkit"):
            checkpoint.report(tmp_path)


def test_a_picture_leaves_the_backend_as_it_is(monkeypatch):
    """None is selected, so that a user's own plots stay as they are; none needs a display."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.delenv("DISPLAY", raising=False)
    matplotlib.use("svg")
    png = picture(reports.summary([ROW], [], "w8", (1, 1)))
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    assert png.startswith(b"\x89PNG") and backend == "svg"


def test_version_and_info(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"quantkit {quantkit.__version__}\n"
    assert main(["info"]) == 0
    assert capsys.readouterr().out.startswith(f"quantkit: {quantkit.__version__}\ntorch: ")


def test_picture_and_terminal(source, tmp_path):
    """On a terminal rich shows a bar and tables; names of files are no markup."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    weights = tmp_path / "x.safetensors"
    save_file(
        {"[bold]$x$[/].weight": torch.randn(9, 16), "\x1b[31m.weight": torch.randn(4, 4)}, weights
    )
    script = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    command = [sys.executable, "-c", script, sys.executable, "-m", "quantkit", "quantize"]
    run = subprocess.run(
        [*command, weights, tmp_path / "dst"], cwd=ROOT, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "160", "TERM": "xterm"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "[bold]$x$[/].weight" in run.stdout and r"\x1b[31m.weight" in run.stdout
    assert "\x1b[31m" not in run.stdout
    assert (tmp_path / "dst" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reports, "picture", lambda _: b"png")
    command = ["quantize", str(source), str(tmp_path / "dst")]
    assert main([*command, "--no-png"]) == 0
    assert not (tmp_path / "dst" / "report.png").exists()
    assert main(command) == 0  # a picture that is missing is drawn
    assert (tmp_path / "dst" / "report.png").read_bytes() == b"png"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number, code, tmp_path):
    """One line, a code that says which, and nothing half done; the same command goes on."""
    path = sparse(tmp_path / "x.safetensors", "BF16", [1 << 19, 4096])
    dst = tmp_path / "dst"
    run = subprocess.Popen(
        [sys.executable, "-m", "quantkit", "quantize", path, dst], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell that runs the tests in its background has them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list(dst.glob("*.part")):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(number)
    out, err = run.communicate()
    assert run.returncode == code and out == ""
    assert err.endswith("ed: the same command goes on from here\n") and err.count("\n") == 1
    assert files_of(dst) == {}


def test_without_numpy(source, tmp_path):
    """torch alone is enough; and quantkit alone does not import its checkpoints."""
    code = (
        "import sys\n"
        "for name in ('numpy', 'rich', 'matplotlib', 'safetensors'): sys.modules[name] = None\n"
        "import quantkit\n"
        "assert 'quantkit.checkpoint' not in sys.modules\n"
        "from quantkit.checkpoint.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "quantize", source, tmp_path / "dst"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no report.png: matplotlib is not installed" in run.stderr


def test_closed_streams(source, tmp_path):
    """By the shell's >&- and 2>&-: Python has None in their places."""
    checkpoint.quantize(source, tmp_path / "dst")
    command = f"{sys.executable} -m quantkit verify '{source}' '{tmp_path / 'dst'}'"
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        assert subprocess.run(f"{command} {closed}", shell=True, cwd=ROOT).returncode == 0
