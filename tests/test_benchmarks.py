"""The benchmark programs: what they write, what they refuse, how they compare. Never how fast."""

import copy
import json
import re

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as program
from benchmarks import ab, builds, cells, linear, measures, report, rivals, schemes, stochastic
from benchmarks.cases import Case, Job, differing
from quantkit import quantize_tensor

TINY = ["--quick", "--shapes", "8x32", "--rivals", "eager,torch,decomposed,copy,clone"]


def main(*arguments):
    return program.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of few tiny cells: its JSON, and the folder with the plots."""
    folder = tmp_path_factory.mktemp("bench")
    more = ["--ops", "quantize,dequantize,quantize_dequantize", "--granularity", "tensor,channel"]
    assert main(*TINY, *more, "--json", folder / "bench.json", "--png", folder) == 0
    return json.loads((folder / "bench.json").read_text()), folder


def test_a_run_holds_every_raw_time(run):
    report, _ = run
    assert len(report["cells"]) == 6
    for cell in report["cells"]:
        assert cell["shape"] == [8, 32] and cell["caches"] == "warm"
        assert {"quantkit", "quantkit out=", "copy"} <= set(cell["contestants"])
        for contestant in cell["contestants"].values():
            assert len(contestant["seconds"]) >= 7 and min(contestant["seconds"]) > 0
            assert contestant["min"] == min(contestant["seconds"]) <= contestant["median"]
    assert set(report["machine"]) >= {"cpu", "torch", "quantkit", "huge_pages", "commit", "rivals"}


def test_rivals_are_compared_with_our_bits(run):
    by_case = {(c["op"], c["granularity"]): c["contestants"] for c in run[0]["cells"]}
    for contestants in by_case.values():
        assert contestants["eager"]["note"] == "same bits"
    assert by_case["dequantize", "tensor"]["torch"]["note"] == "same bits"


def test_differences_are_counted():
    job = Job.of(Case("dynamic_quantize", (8, 32)))
    q, scale, zero_point = job.expected
    assert differing(job.expected, job.expected) == "same bits"
    wrong = q.clone()
    wrong[0, :3] += 1
    expected = "3 of 256 codes differ; 1 of 1 scales differ"
    assert differing((wrong, scale * 2, zero_point), job.expected) == expected


def test_a_wrong_kernel_is_not_measured(monkeypatch):
    honest = Job.fresh
    monkeypatch.setattr(Job, "fresh", lambda job: tuple(t + 1 for t in honest(job)))
    with pytest.raises(cells.Wrong, match="not the reference's"):
        cells.cell(Case("quantize", (8, 32)), [], 0.01)


def test_wrong_outputs_are_not_measured(monkeypatch):
    honest = Job.out
    monkeypatch.setattr(Job, "out", lambda job: lambda: (honest(job)(), job.outs[0].neg_()))
    with pytest.raises(cells.Wrong, match="not the reference's"):
        cells.cell(Case("quantize", (8, 32)), [], 0.01)


def test_results_that_cannot_be_written_are_known_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "measure", lambda *_: pytest.fail("measured"))
    file = tmp_path / "file"
    file.write_text("")
    for arguments in (["--json", tmp_path], ["--json", file / "x.json"], ["--png", file]):
        with pytest.raises(SystemExit, match="benchmarks: "):
            main(*TINY, "--json", tmp_path / "run.json", *arguments)


def test_a_missing_rival_is_reported(monkeypatch, capsys, tmp_path):
    def none(name):
        raise rivals.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(rivals.importlib.metadata, "version", none)
    arguments = ["--ops", "quantize", "--rivals", "torchao", "--quick", "--shapes", "8x32"]
    main(*arguments, "--json", tmp_path / "bench.json", "--png", tmp_path)
    cell = json.loads((tmp_path / "bench.json").read_text())["cells"][0]
    assert cell["absent"] == {"torchao": "missing: torchao is not installed"}
    assert "not installed" in capsys.readouterr().out


# Without compile: the same functions run as eager.
OF_TORCH = [n for n, rival in rivals.RIVALS.items() if rival.package is None and n != "compile"]


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("op", ["quantize", "dequantize", "dynamic_quantize", "fake_quantize"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_rival_of_torch_does_the_case_or_says_why_not(name, op, granularity):
    made = rivals.contestant(name, Job.of(Case(op, (8, 32), granularity=granularity)))
    if isinstance(made, str):
        assert not made.startswith("missing")
    else:
        made.call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "quantise"], "expected some of choose_qparams, quantize, .*got quantise"),
        (["--dtypes", ""], "got nothing"),
        (["--shapes", "64"], "expected matrices such as 4096x4096,64x1024, got '64'"),
        (["--shapes", "0x4"], "got '0x4'"),
        (["--threads", "0"], "expected a number from 1 to 1024, got '0'"),
        (["--threads", "99999"], "got '99999'"),
        (["--rivals", "nobody"], "got nobody"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(*arguments)
    assert stopped.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_blocks_that_fit_no_shape_are_refused():
    with pytest.raises(SystemExit, match="no shape can be cut"):
        main("--shapes", "8x9", "--granularity", "group32")


# ---- two builds in one process ----------------------------------------------------------------------


@pytest.fixture
def same_build(monkeypatch):
    """The library under test as both builds."""
    monkeypatch.setattr(builds, "namespace", lambda build: "quantkit")


def arguments_of_ab(*words):
    args = ab.parser().parse_args(["old", "new", "--threads", "1", "--repeats", "2", *words])
    return args, Console(record=True, width=200)


@pytest.mark.parametrize(
    "words",
    [
        "quantize 8 float32",
        "choose_qparams 65536x16",
        "dequantize 1024x512 float32 transposed group128",
        "quantize 64x1024 float32 tensor symmetric",
    ],
)
def test_two_builds_are_measured_in_every_kind_of_cell(same_build, words):
    args, console = arguments_of_ab("--only", words)
    found = ab.run(args, console)
    assert {entry["cell"] for entry in found} == set(map(str, ab.chosen(args)))
    for entry in found:
        assert len(entry["seconds"]["old"]) == len(entry["seconds"]["new"]) >= 2
        assert ("abs" in entry["seconds"]) == (" 8 " in words)
    slow = ab.show(found, ("one", "other"), console)
    assert f"{slow} of {len(found)} cells below 0.95" in console.export_text()


def test_builds_with_other_bits_are_not_measured(same_build, monkeypatch):
    honest = ab.results_of
    wrong = lambda job, build: tuple(t + (build == "new") for t in honest(job, build))  # noqa: E731
    monkeypatch.setattr(ab, "results_of", wrong)
    monkeypatch.setattr(ab, "measure", lambda *_: pytest.fail("measured"))
    args, console = arguments_of_ab("--only", "choose_qparams 64x1024 float32 tensor symmetric")
    with pytest.raises(SystemExit, match="2 of 2 cells have other bits"):
        ab.run(args, console)
    assert "1 of 1 scales differ" in console.export_text()


def test_every_difference_of_two_results_is_seen():
    a, nan = torch.zeros(2, 3), torch.full((2, 3), float("nan"))
    assert ab.difference((a,), (a.clone(),)) == "" == ab.difference((nan,), (nan.clone(),))
    assert ab.difference((a,), (a.double(),)).startswith("dtype")
    assert ab.difference((a,), (a[:1],)).startswith("shape")
    assert ab.difference((a,), (a.t().contiguous().t(),)).startswith("strides")
    assert ab.difference((a,), (-a,)) == "6 of 6 values differ"
    assert ab.difference((nan,), (-nan,)) == "bits of NaN differ"
    assert ab.difference((a,), (a, a)) == "1 results became 2"


def measured(old, new):
    return {"cell": "c", "threads": 1, "seconds": {"old": old, "new": new}}


def test_ratios_are_those_of_minima_and_of_medians():
    one, two = measured([2.0, 3.0, 4.0], [1.0, 6.0, 8.0]), measured([1.0], [2.0])
    assert ab.ratios(one) == (2.0, 0.5) and not ab.is_slow(one) and ab.is_slow(two)
    assert ab.pooled(one, two) == measured([2.0, 3.0, 4.0, 1.0], [1.0, 6.0, 8.0, 2.0])
    console = Console(record=True, width=200)
    assert ab.show([one, two], ("one", "other"), console) == 1
    printed = console.export_text()
    assert re.search(r"2\.000 │ +0\.500 │ +│", printed) and "slow" in printed
    assert printed.endswith("1 of 2 cells below 0.95\n")


def test_cells_are_named_once_and_the_usual_ones_are_some_of_all():
    every, usual = ab.cells(True), ab.cells(False)
    assert len(set(map(str, every))) == len(every) and set(usual) < set(every)
    for words in ("float16", "float64", "token", "block128", "asymmetric", "fresh", "backward"):
        assert any(words in str(cell) for cell in usual), words
    assert set(ab.layouts()) < set(usual)
    assert not [cell for cell in every if cell.case.shape == (64, 1024) and "block" in str(cell)]


def test_sources_that_two_builds_cannot_have_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="nosuch: expected a git revision"):
        ab.main(["nosuch", "."])
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "ops.cpp").write_text("no macro")
    with pytest.raises(SystemExit, match="no QUANTKIT_NAMESPACE"):
        ab.main([str(builds.ROOT), str(tmp_path)])
    with pytest.raises(SystemExit, match="no cell has 'quantise'"):
        ab.main([".", ".", "--only", "quantise"])
    for wrong in (["."], [".", ".", "--threads", "0"], [".", ".", "--repeats", "1,2"]):
        with pytest.raises(SystemExit) as stopped:
            ab.main(wrong)
        assert stopped.value.code == 2


def test_sources_are_written_where_they_differ(tmp_path):
    label, files = builds.sources(root := str(builds.ROOT))
    assert label == root and "csrc/ops/static.cpp" in files and "quantkit/ops.py" in files
    assert not [name for name in files if name.endswith((".so", ".pyc"))]
    builds.export(files, tmp_path)
    kept = (tmp_path / "setup.py").stat()
    (tmp_path / "quantkit" / "libquantkit.so").write_text("built")
    (tmp_path / "csrc" / "stale.h").write_text("")
    builds.export(files | {"setup.py": files["setup.py"], "README.md": b"other"}, tmp_path)
    assert (tmp_path / "setup.py").stat().st_mtime_ns == kept.st_mtime_ns
    assert (tmp_path / "README.md").read_bytes() == b"other"
    assert not (tmp_path / "csrc" / "stale.h").exists()
    assert (tmp_path / "quantkit" / "libquantkit.so").exists()


# ---- one thing of some schemes ------------------------------------------------------------------------


@pytest.mark.parametrize("module, share", [(measures, "of a read"), (stochastic, "of a copy")])
def test_a_module_measures_each_scheme_beside_others(module, share, tmp_path, capsys):
    tiny = [
        "--shapes",
        "8x32",
        "--seconds",
        "0",
        "--schemes",
        "int8_channel",
        "--dtypes",
        "float32",
    ]
    assert module.main([*tiny, "--json", str(tmp_path / "run.json")]) == 0
    found = json.loads((tmp_path / "run.json").read_text())["cells"]
    assert [c["threads"] for c in found] == [1, 2]
    job = schemes.Job("int8_channel", (8, 32), torch.float32)
    assert {tuple(c["contestants"]) for c in found} == {tuple(module.calls_of(job))}
    assert share in capsys.readouterr().out


def test_sums_in_torch_are_those_of_measure():
    job = schemes.Job("int8_channel", (8, 32), torch.float32)
    ours = measures.calls_of(job)[measures.OURS]()
    for a, b in zip(ours, measures.sums(job.x, job.x_hat), strict=False):
        assert a.item() == pytest.approx(b.item())


@pytest.mark.parametrize("scheme", stochastic.SCHEMES)
def test_stochastic_rounding_by_hand_makes_the_same_neighbours(scheme):
    job = schemes.Job(scheme, (16, 512), torch.float32)
    by_hand = torch.stack([stochastic.by_hand(job).float() for _ in range(50)])
    calls = [quantize_tensor(job.x, job.p, seed=seed).float() for seed in range(50)]
    ours = torch.stack(calls)
    for a, b in ((by_hand, ours), (ours, by_hand)):
        assert ((b >= a.amin(0)) & (b <= a.amax(0))).float().mean() > 0.98


# ---- linear layers ------------------------------------------------------------------------------------


def test_linear_layers_stand_beside_float32_and_others(tmp_path, capsys):
    tiny = ["--shapes", "16x64", "--tokens", "1,3", "--threads", "1", "--seconds", "0"]
    arguments = [*tiny, "--skip", "torchao", "--json", str(tmp_path / "run.json")]
    assert linear.main(arguments) == 0
    found = json.loads((tmp_path / "run.json").read_text())["cells"]
    assert [c["tokens"] for c in found] == [1, 3]
    for cell in found:
        names = {n for n in linear.CONTESTANTS if not n.startswith("torchao")}
        assert {*cell["contestants"], *cell["absent"]} == names
        assert 30 < cell["sqnr_db"]["W8A8"] < cell["sqnr_db"][linear.FLOAT]
        assert cell["sqnr_db"]["weight only, int8"] > cell["sqnr_db"]["weight only, int4"]
    assert "times faster than float32" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        linear.main(["--tokens", "0"])
    assert "expected numbers such as 1,16,256, got '0'" in capsys.readouterr().err


# ---- the pages that quote a run ---------------------------------------------------------------------


def test_publish_replaces_the_sections(run, tmp_path):
    report = copy.deepcopy(run[0])
    for cell in report["cells"]:
        cell["shape"] = [4096, 4096]
    path, readme, docs = tmp_path / "run.json", tmp_path / "README.md", tmp_path / "docs"
    docs.mkdir()
    path.write_text(json.dumps(report))
    for page in (readme, docs / "performance.md"):
        page.write_text("before\n<!-- speed: begin -->\nold\n<!-- speed: end -->\nafter\n")
    assert main("publish", path, "--root", tmp_path) == 0
    for page in (readme, docs / "performance.md"):
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert "| quantize 4096×4096" in text
    assert (docs / "speedup-light.png").exists() and (docs / "speedup-dark.png").exists()
    path.write_text(json.dumps(run[0]))  # no cell of a quoted shape
    with pytest.raises(SystemExit, match="none of the cells"):
        main("publish", path, "--root", tmp_path)
    path.write_text(json.dumps(report))
    readme.write_text("no markers\n")
    with pytest.raises(SystemExit, match="expected the markers"):
        main("publish", path, "--root", tmp_path)
    assert readme.read_text() == "no markers\n"


def test_publish_takes_runs_of_schemes(run, tmp_path):
    """Shares of each instruction set, then the rivals of the first run's float32."""

    def cell(dtype, share, **others):
        times = {name: {"min": time} for name, time in {schemes.OURS: 2.0, **others}.items()}
        common = {"scheme": "mxfp8", "operation": "dequantize", "shape": [4096, 4096]}
        notes = {name: "=" if name == "torchao" else "12 ppm" for name in others}
        own = {"dtype": dtype, "of_yardstick": share, "contestants": times, "notes": notes}
        return common | own

    paths = []
    for isa, measured in {
        "avx512": [cell("float32", 0.5, torchao=9.0, reference=3.0), cell("bfloat16", 0.25)],
        "avx2": [cell("float32", 0.125)],
    }.items():
        machine = {**run[0]["machine"], "quantkit": {"isa": isa}}
        paths.append(tmp_path / f"{isa}.json")
        paths[-1].write_text(json.dumps({"machine": machine, "cells": measured}))
    main_run = copy.deepcopy(run[0])
    main_run["cells"] = [c | {"shape": [4096, 4096]} for c in main_run["cells"]]
    (tmp_path / "run.json").write_text(json.dumps(main_run))
    (tmp_path / "docs").mkdir()
    sections = (
        "<!-- speed: begin -->\n<!-- speed: end -->\n",
        "<!-- formats: begin -->\n<!-- formats: end -->\n",
    )
    (tmp_path / "README.md").write_text(sections[0])
    (tmp_path / "docs" / "performance.md").write_text("".join(sections))
    arguments = (tmp_path / "run.json", "--schemes", *paths, "--root", tmp_path)
    assert main("publish", *arguments) == 0
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert "avx512, float32 | avx512, bfloat16 | avx2, float32 | plain" in page
    paths[1].write_text("{}")
    with pytest.raises(SystemExit, match="expected runs of it, one has no 'machine'"):
        main("publish", *arguments)
    paths[0].write_text('{"machine": {"quantkit": {"isa": "avx2"}}, "cells": []}')
    with pytest.raises(SystemExit, match="expected cells of shape"):
        main("publish", tmp_path / "run.json", "--schemes", paths[0], "--root", tmp_path)
    assert "| `mxfp8` dequantize | 0.50 | 0.25 | 0.12 | 1.5×\\* | - | 4.5× | - | - |" in page


def test_the_readme_has_five_rows(run):
    made = copy.deepcopy(run[0])
    made["cells"] = [
        made["cells"][0] | {"op": op, "shape": shape, "granularity": "tensor"} | more
        for op, shape, more in report.PAGE
    ]
    assert len(report.quoted(made)) == 23 and len(report.quoted(made, report.README)) == 5
    rows = [line for line in report.markdown(made, report.README).splitlines() if "×" in line]
    assert len(rows) == 5 and rows[-1].startswith("| quantize 64×1024 float32, per tensor |")


def test_memory_is_shown_without_the_outputs(run):
    console = Console(record=True, width=200)
    entry = {"op": "quantize", "granularity": "tensor"}
    measured = entry | {"peak_bytes": 18 << 20, "output_bytes": 16 << 20}
    console.print(report.memory_table({"memory": [measured, entry | {"reason": "no [proc]"}]}))
    assert "2.00" in console.export_text(clear=False) and "no [proc]" in console.export_text()


# ---- a GPU ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"--device cuda: (torch sees no|quantkit was built)"):
        main("--device", "cuda", "--json", tmp_path / "bench.json", "--png", tmp_path)
    assert not (tmp_path / "bench.json").exists()


def test_cases_for_a_gpu_are_beyond_its_caches():
    args = program.parser().parse_args(["--device", "cuda"])
    cases = program.chosen(args)
    assert {case.shape for case in cases} == {(131072, 4096), (16384, 4096)}
    assert all(case.shape[0] * case.shape[1] * 2 >= 128 << 20 for case in cases)
    assert not program.extras(args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_tiny_run_on_a_gpu(tmp_path):
    shown = [
        "--device",
        "cuda",
        "--shapes",
        "64x128",
        "--ops",
        "quantize",
        "--rivals",
        "eager,copy",
    ]
    assert main(*shown, "--json", tmp_path / "bench.json", "--png", tmp_path) == 0
    cell = json.loads((tmp_path / "bench.json").read_text())["cells"][0]
    assert cell["device"] == "cuda" and cell["contestants"]["eager"]["seconds"]
