"""Compare two builds of the library in one process.

python -m benchmarks.ab OLD NEW [options]

OLD and NEW are git revisions or folders of sources. `.` is the working tree with its uncommitted changes.
Both are built in build/ab without CUDA, each in a namespace of its own: torch.ops.quantkit_old and
torch.ops.quantkit_new. First their results are compared bit for bit. Then their calls alternate.

The ratios are old / new: above 1, new is faster. A cell whose minima give less than 0.95 is slow. Slow
cells are measured again, and all times count. The exit status is 1 if results differ or a cell is slow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from quantkit import QuantizationParams

from . import builds
from .builds import operators_of
from .cases import (
    CHOOSERS,
    DTYPES,
    GRANULARITIES,
    OPS,
    SCHEMES,
    SHAPES,
    Call,
    Case,
    Job,
    Results,
    differing,
)
from .command import numbers, table
from .command import parser as parser_of
from .measure import interleaved, summary

BUILDS = ("old", "new")
SLOW = 0.95
AGAIN = 3  # times as many repeats for a slow cell
BACKWARD = "_fake_quantize_backward"
OPERATORS = (*OPS, BACKWARD)
SMALL, MIDDLE, LARGE = sorted(SHAPES)
CALL = (8,)


# ---- cells ----------------------------------------------------------------------------------------

# From the sizes of x to those of its memory, and x as a view of that.
Sizes = tuple[int, ...]
View = Callable[[torch.Tensor, Sizes], torch.Tensor]
LAYOUTS: dict[str, tuple[Callable[[Sizes], Sizes], View]] = {
    "contiguous": (lambda sizes: sizes, lambda t, sizes: t),
    "transposed": (lambda sizes: sizes[::-1], lambda t, sizes: t.t()),
    # The keys of grouped-query attention, four heads for one.
    "expanded": (lambda sizes: (*sizes[:2], 1, *sizes[3:]), lambda t, sizes: t.expand(sizes)),
    "every second": (lambda sizes: (sizes[0], 2 * sizes[1]), lambda t, sizes: t[:, ::2]),
}


@dataclass(frozen=True)
class Cell:
    """A case on x of some layout. Results go to out=, or to new memory where fresh."""

    case: Case
    layout: str = "contiguous"
    fresh: bool = False

    def __str__(self) -> str:
        case = self.case
        words = [case.op, "x".join(map(str, case.shape)), case.dtype]
        words += [self.layout] if self.layout != "contiguous" else []
        words += [case.granularity, case.scheme] + (["fresh"] if self.fresh else [])
        return " ".join(words)


def layouts() -> Iterator[Cell]:
    """x in other strides, and the same groups of W where they are W.t()'s."""
    keys = (1, 8, 4, 512, 128)
    blocks = {"tensor": None, "token": (1, 1, 1, 1, -1), "group32": (1, 1, 1, 1, 32)}
    for dtype in ("float32", "bfloat16"):
        for name, block in blocks.items():
            for op in (*CHOOSERS, "quantize", "fake_quantize", BACKWARD):
                yield Cell(Case(op, keys, dtype, name, block_size=block), "expanded")
        for size in (32, 128):
            for op in OPERATORS:
                along = Case(op, MIDDLE[::-1], dtype, f"group{size} of W", block_size=(size, 1))
                yield Cell(along, "transposed")
    for op in OPS:
        yield Cell(Case(op, MIDDLE[::-1], granularity="group32"), "transposed")
    shapes = [((1 << 20) // last, last) for last in (2, 3, 4, 8, 16)]
    for shape in (*shapes, MIDDLE, LARGE):
        for op in OPERATORS:
            yield Cell(Case(op, shape, granularity="channel_last"))


EVERY, FEW = (*GRANULARITIES, "token"), ("tensor", "channel", "group32")
USUAL = (
    (SMALL, "float32", ("tensor", "channel"), "symmetric"),
    (SMALL, "bfloat16", ("tensor",), "symmetric"),
    (MIDDLE, "float32", EVERY, "symmetric"),
    (MIDDLE, "float32", FEW, "asymmetric"),
    (MIDDLE, "bfloat16", EVERY, "symmetric"),
    (MIDDLE, "float16", FEW, "symmetric"),
    (MIDDLE, "float64", ("tensor", "channel"), "symmetric"),
    (LARGE, "float32", ("tensor", "channel", "group128"), "symmetric"),
    (LARGE, "bfloat16", ("tensor",), "symmetric"),
)
ALL = (
    *(
        (shape, dtype, EVERY, scheme)
        for shape in (SMALL, MIDDLE, LARGE)
        for dtype in DTYPES
        for scheme in ("symmetric", "asymmetric")
    ),
    (MIDDLE, "float64", EVERY, "symmetric"),
)


def matrices(rows) -> Iterator[Cell]:
    """Every operator on matrices: their sizes, their dtype, granularities, and the scheme."""
    for shape, dtype, granularities, scheme in rows:
        for granularity in granularities:
            blocks = GRANULARITIES.get(granularity) or ()
            if any(size % max(b, 1) for size, b in zip(shape, blocks, strict=False)):
                continue
            case = Case("", shape, dtype, granularity, scheme)
            if granularity == "token":  # of a batch: in a matrix it is the channel
                batch = (8, shape[0] // 8, shape[1])
                case = replace(case, shape=batch, block_size=(1, 1, -1))
            for op in OPERATORS:
                yield Cell(replace(case, op=op))


def cells(everything: bool) -> list[Cell]:
    """In an order in which neighbours share their data."""
    found = [Cell(Case(op, CALL), fresh=fresh) for op in OPERATORS for fresh in (True, False)]
    for shape in (SMALL, MIDDLE, LARGE) if everything else (MIDDLE,):
        found += [Cell(Case(op, shape), fresh=True) for op in OPERATORS]
    found += matrices(ALL if everything else USUAL)
    found += layouts()
    for granularity in ("tensor", "channel", "channel_last", "group32"):
        for op in OPERATORS:
            found.append(Cell(Case(op, MIDDLE, granularity=granularity), "every second"))
    return list(dict.fromkeys(found))


def chosen(args) -> list[Cell]:
    found = cells(args.all or bool(args.only))
    if args.only:
        found = [cell for cell in found if all(words in str(cell) for words in args.only)]
    if not found:
        raise SystemExit(f"ab: no cell has {' and '.join(map(repr, args.only))}: see --list --all")
    return found


# ---- calls ----------------------------------------------------------------------------------------


def of_layout(cell: Cell, make: Callable[[Sizes], torch.Tensor]) -> torch.Tensor:
    sizes, view = LAYOUTS[cell.layout]
    return view(make(sizes(cell.case.shape)), cell.case.shape)


_data: dict[tuple, torch.Tensor] = {}  # of the last cell: neighbours share it


def data(cell: Cell) -> torch.Tensor:
    key = cell.case.shape, cell.case.dtype, cell.layout
    if key not in _data:
        _data.clear()
        torch.manual_seed(0)
        dtype = getattr(torch, cell.case.dtype)
        _data[key] = of_layout(cell, lambda sizes: torch.randn(sizes).to(dtype))
    return _data[key]


def job_of(cell: Cell) -> Job:
    """Parameters and codes come from the old build."""
    case, ops, x = cell.case, operators_of("old"), data(cell)
    scheme = SCHEMES[case.scheme]
    limits = torch.iinfo(scheme["dtype"])
    given = (limits.min, limits.max)
    symmetric, include_zero = scheme["sym"], scheme.get("include_zero", False)
    parameters = ops.choose_qparams.default(x, case.blocks(), *given, 1e-8, symmetric, include_zero)
    qparams = QuantizationParams(*parameters, *given, dtype=scheme["dtype"])
    q, grad = torch.empty(0, dtype=scheme["dtype"]), None
    if case.op == "dequantize":
        codes = ops.quantize.default(x, *parameters, *given, scheme["dtype"])
        q = of_layout(cell, lambda sizes: torch.empty(sizes, dtype=codes.dtype)).copy_(codes)
    if case.op == BACKWARD:
        grad = x.clone()
    job = Job(case, x, qparams, q, (), (), scheme, grad)
    job.outs = job.expected = results_of(job, "old")
    return job


def fresh(job: Job, build: str) -> Call:
    operator = getattr(operators_of(build), job.case.op).default
    arguments = job.arguments()
    return lambda: operator(*arguments)


def results_of(job: Job, build: str) -> Results:
    results = fresh(job, build)()
    return results if isinstance(results, tuple) else (results,)


def call_of(cell: Cell, job: Job, build: str) -> Call:
    return fresh(job, build) if cell.fresh else job.out(operators_of(build))


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def difference(old: Results, new: Results) -> str:
    """How the results differ; empty where they have the same bits."""
    if len(old) != len(new):
        return f"{len(old)} results became {len(new)}"
    for a, b in zip(old, new, strict=True):
        for what in ("dtype", "shape"):
            if getattr(a, what) != getattr(b, what):
                return f"{what} {getattr(a, what)} became {getattr(b, what)}"
        if a.stride() != b.stride():
            return f"strides {a.stride()} became {b.stride()}"
    integers = [INTEGERS[t.element_size()] for t in old]
    pairs = zip(old, new, integers, strict=True)
    if all(torch.equal(a.view(dtype), b.view(dtype)) for a, b, dtype in pairs):
        return ""
    found = differing(new, old)
    return found if found != "same bits" else "bits of NaN differ"


def compare(cell: Cell) -> str:
    """The difference of the two builds in a cell, with fresh results and with out=."""
    job = job_of(cell)
    found = difference(job.expected, results_of(job, "new"))
    expected = tuple(t.clone() for t in job.expected)
    for build in BUILDS:
        for t in job.outs:
            t.fill_(1)
        job.out(operators_of(build))()
        found = found or difference(expected, job.outs)
    return found


# ---- measuring ------------------------------------------------------------------------------------


def measure(cell: Cell, repeats: int) -> dict:
    """Seconds of every call of both builds."""
    job = job_of(cell)
    calls = {build: call_of(cell, job, build) for build in BUILDS}
    if cell.case.shape == CALL:
        absolute, x = torch.ops.aten.abs.default, job.x
        calls["abs"] = lambda: absolute(x)
    seconds = interleaved(calls, budget=0, rounds=repeats, alike=True)
    return {"cell": str(cell), "threads": torch.get_num_threads(), "seconds": seconds}


def pooled(one: dict, two: dict) -> dict:
    seconds = {name: one["seconds"][name] + times for name, times in two["seconds"].items()}
    return one | {"seconds": seconds}


def ratios(found: dict) -> tuple[float, float]:
    """old / new, of minima and of medians."""
    old, new = (summary(found["seconds"][build]) for build in BUILDS)
    return old["min"] / new["min"], old["median"] / new["median"]


def is_slow(found: dict) -> bool:
    return ratios(found)[0] < SLOW


def run(args, console: Console) -> list[dict]:
    spaces = [operators_of(build) for build in BUILDS]
    if missing := [op for op in OPERATORS if not all(hasattr(space, op) for space in spaces)]:
        console.print(f"[bold yellow]not in both builds:[/] {', '.join(missing)}")
    wanted = [cell for cell in chosen(args) if cell.case.op not in missing]
    todo = [(threads, cell) for threads in args.threads for cell in wanted]

    def each(what: str, entries: list) -> Iterator:
        for threads, *rest in track(entries, what, console=console, transient=True):
            torch.set_num_threads(threads)
            yield (threads, *rest)

    different = [(cell, text) for _, cell in each("comparing", todo) if (text := compare(cell))]
    for cell, text in different:
        console.print(f"[bold red]{cell}: {escape(text)}", soft_wrap=True)
    if different:
        raise SystemExit(f"ab: {len(different)} of {len(todo)} cells have other bits")
    console.print(f"the same bits in {len(todo)} cells")
    found = {entry: measure(entry[1], args.repeats) for entry in each("measuring", todo)}
    slow = [entry for entry in todo if is_slow(found[entry])]
    for entry in each("measuring again", slow):
        again = measure(entry[1], AGAIN * args.repeats)
        found[entry] = pooled(found[entry], again)
    return list(found.values())


# ---- output ---------------------------------------------------------------------------------------


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-4 else f"{seconds * 1e6:.2f}"


def show(found: list[dict], labels: tuple[str, str], console: Console) -> int:
    """Prints the tables and the last line; returns how many cells are slow."""

    def common(entry: dict) -> tuple[str, ...]:
        low, median = ratios(entry)
        return f"{low:.3f}", f"{median:.3f}", "slow" if is_slow(entry) else ""

    def minima(entry: dict, less: float = 0.0) -> tuple[str, ...]:
        return tuple(microseconds(min(entry["seconds"][build]) - less) for build in BUILDS)

    last = ("old/new, minima", "old/new, medians", "")
    calls = [entry for entry in found if "abs" in entry["seconds"]]
    rest = [entry for entry in found if "abs" not in entry["seconds"]]
    title = f"old: {labels[0]}, new: {labels[1]}"
    if rest:
        rows = [(e["cell"], e["threads"], *minima(e), *common(e)) for e in rest]
        console.print(table(title, ("cell",), ("threads", "old µs", "new µs", *last), rows))
    if calls:
        rows = []
        for entry in calls:
            least = min(entry["seconds"]["abs"])
            above = minima(entry, least)
            rows.append((entry["cell"], *above, microseconds(least), *common(entry)))
        columns = ("old µs above abs", "new µs above abs", "abs µs", *last)
        console.print(table(f"Calls on 8 elements. {title}", ("cell",), columns, rows))
    slow = sum(map(is_slow, found))
    console.print(f"{slow} of {len(found)} cells below {SLOW}")
    return slow


def number(text: str) -> int:
    if len(found := numbers(text)) != 1:
        raise argparse.ArgumentTypeError(f"expected one number, got {text!r}")
    return found[0]


def parser() -> argparse.ArgumentParser:
    p = parser_of("benchmarks.ab", __doc__)
    p.add_argument("old", nargs="?", metavar="OLD")
    p.add_argument("new", nargs="?", metavar="NEW")
    p.add_argument("--all", action="store_true", help="every cell, not the usual ones")
    p.add_argument(
        "--only",
        action="append",
        metavar="SUBSTRING",
        help="those of all cells with it in the name; given more than once: with each of them",
    )
    p.add_argument("--list", action="store_true", help="print the cells, measure nothing")
    p.add_argument("--repeats", type=number, default=40, help="default: 40")
    p.add_argument("--threads", type=numbers, help="such as 1,2; default: torch's")
    return p


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(arguments)
    if args.list:
        print(*chosen(args), sep="\n")
        return 0
    if args.new is None:
        p.error("expected OLD and NEW")
    args.threads = args.threads or (torch.get_num_threads(),)
    chosen(args)  # says now that there is none
    found = [builds.sources(name) for name in (args.old, args.new)]
    labels = (found[0][0], found[1][0])
    loaded = []
    for build, (label, files) in zip(BUILDS, found, strict=True):
        loaded.append(builds.made(build, label, files, OPERATORS))
    console = Console(width=None if sys.stdout.isatty() else 160)
    measured = run(args, console)
    return 1 if show(measured, labels, console) else 0


if __name__ == "__main__":
    sys.exit(main())
