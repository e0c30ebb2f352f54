"""Each named scheme beside its rivals: scales given, chosen, and the way back.

python -m benchmarks.schemes [--schemes int8_channel,fp8_token] [--dtypes float32,bfloat16]

For every scheme of quantkit.SCHEMES: GB/s of what the operation must read and write, as a share of
y.copy_(x)'s, and how many times longer others take. Every call of a row runs in turn with the others.
`=` says that a rival's codes are ours, bit for bit; else how many of a million differ.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from rich.table import Table

import quantkit
from quantkit import reference
from quantkit.formats import OF_DTYPE, scale_numbers
from quantkit.schemes import default_eps, keywords_of

from .command import cells_parser, contestants, numbers, reason_of, run, table, threads, words

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPERATIONS = ("quantize", "dynamic_quantize", "dequantize")
COPY, OURS = "copy", "quantkit out="
Calls = dict[str, Callable[[], torch.Tensor | tuple]]


class Job:
    """x in one scheme: codes, parameters, and memory for results."""

    def __init__(self, scheme: str, shape: tuple[int, ...], dtype: torch.dtype):
        torch.manual_seed(0)
        self.scheme = scheme
        self.x = torch.randn(shape).to(dtype)
        self.q, self.p = quantkit.quantize(self.x, scheme)
        self.x_hat = quantkit.dequantize(self.q, self.p)
        self.format = OF_DTYPE[self.p.dtype]
        self.is_float = not self.format.has_zero_point
        self.symmetric = not scheme.startswith("uint8")
        # A global scale is chosen before: what is measured takes it.
        options = keywords_of(scheme)
        self.choosing = {k: options.get(k) for k in ("scale_dtype", "scale_rule")}
        self.options = {"global_scale": self.p.global_scale}
        self.blocks = [
            size if block == -1 else block
            for size, block in zip(shape, self.p.block_size or [-1] * len(shape), strict=True)
        ]

    def bytes(self, operation: str) -> int:
        """What the operation must read and write."""
        ends = [self.x_hat if operation == "dequantize" else self.x, self.q, self.p.scale]
        return sum(t.numel() * t.element_size() for t in ends)


# ---- how each does it -------------------------------------------------------------------------------


def ours(job: Job, operation: str) -> Callable[[], object]:
    """The operator into memory that stays."""
    ops, p = torch.ops.quantkit, job.p
    zero_point = None if job.is_float else p.zero_point
    limits = (p.q_min, p.q_max)
    if operation == "quantize":
        q = torch.empty_like(job.q)
        call = functools.partial(
            ops.quantize.format_out, job.x, p.scale, zero_point, *limits, job.format.name,
            block_size=p.block_size, out=q, **job.options,
        )  # fmt: skip
    elif operation == "dequantize":
        call = functools.partial(
            ops.dequantize.format_out, job.q, p.scale, zero_point, job.format.name,
            block_size=p.block_size, out=torch.empty_like(job.x_hat), **job.options,
        )  # fmt: skip
    else:
        outs = {name: torch.empty_like(t) for name, t in
                (("q", job.q), ("scale", p.scale), ("zero_point", p.zero_point))}  # fmt: skip
        eps = default_eps(job.format, **job.choosing)
        call = functools.partial(
            ops.dynamic_quantize.format_out, job.x, p.block_size, *limits, eps, job.symmetric,
            job.format.name, include_zero=not job.symmetric, **outs, **job.choosing, **job.options,
        )  # fmt: skip
    return call


def plain(job: Job, operation: str) -> Callable[[], object]:
    """The formula in a few torch operations, with torch's own cast: what one writes by hand."""
    p = job.p
    repeats = [
        b if s > 1 else 1
        for b, s in zip(job.blocks, p.scale.shape or [1] * job.x.dim(), strict=True)
    ]

    def spread(t: torch.Tensor) -> torch.Tensor:
        for dim, count in enumerate(repeats if t.dim() else []):
            if count > 1:
                t = t.repeat_interleave(count, dim).narrow(dim, 0, job.x.shape[dim])
        return t

    if job.format.name == "float4_e2m1fn":
        raise LookupError("torch has no cast to float4")
    scale, zero_point = spread(scale_numbers(p.scale)), spread(p.zero_point)
    packed = p.dtype == torch.int4

    def quantize(x):
        v = x.float() / scale + zero_point
        v = v.clamp(p.q_min, p.q_max) if job.is_float else v.round().clamp(p.q_min, p.q_max)
        if not packed:
            return v.to(p.dtype)
        codes = v.to(torch.int8).view(torch.uint8) & 15
        return codes[..., ::2] | (codes[..., 1::2] << 4)

    def dequantize(q):
        if packed:
            q = torch.stack([(q << 4).view(torch.int8) >> 4, q.view(torch.int8) >> 4], -1).flatten(
                -2
            )
        return (q.float() - zero_point) * scale

    functions = {"quantize": (quantize, job.x), "dequantize": (dequantize, job.q)}
    if operation not in functions:
        raise LookupError("two passes by hand")
    function, argument = functions[operation]
    return lambda: function(argument)


def eager(job: Job, operation: str) -> Callable[[], object]:
    """quantkit's own reference."""
    return {
        "quantize": lambda: reference.quantize_tensor(job.x, job.p),
        "dynamic_quantize": lambda: reference.quantize(job.x, job.scheme)[0],
        "dequantize": lambda: reference.dequantize(job.q, job.p),
    }[operation]


def torchao(job: Job, operation: str) -> Callable[[], object]:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    primitives = importlib.import_module("torchao.quantization.quant_primitives")
    x, q, p = job.x, job.q, job.p
    if job.scheme.startswith(("mx", "nv")):
        return torchao_mx(job, operation)
    if job.is_float:

        def choose(x):
            return primitives._choose_scale_float8(x.float(), job.blocks, p.dtype)

        def quantize(x, scale):
            return primitives._quantize_affine_float8(x.float(), scale, p.dtype)

        def dequantize(q, scale):
            return primitives._dequantize_affine_float8(q, scale, torch.float32)

        given = (p.scale if p.scale.dim() else p.scale.view(1, 1),)
    else:
        if p.dtype == torch.int4:
            raise LookupError("its int4 codes are not packed here")
        kind = primitives.MappingType
        mapping = kind.SYMMETRIC_NO_CLIPPING_ERR if job.symmetric else kind.ASYMMETRIC
        limits = (p.dtype, p.q_min, p.q_max)

        def choose(x):
            return primitives.choose_qparams_affine(
                x, mapping, job.blocks, *limits, 1e-8, torch.float32, torch.int32
            )

        def quantize(x, *parameters):
            return primitives.quantize_affine(x.float(), job.blocks, *parameters, *limits)

        def dequantize(q, *parameters):
            return primitives.dequantize_affine(
                q, job.blocks, *parameters, *limits, output_dtype=torch.float32
            )

        given = (p.scale, p.zero_point.to(torch.int32))

    def dynamic(x):
        parameters = choose(x)
        return quantize(x, *(parameters if isinstance(parameters, tuple) else (parameters,)))

    return {
        "quantize": lambda: quantize(x, *given),
        "dynamic_quantize": lambda: dynamic(x),
        "dequantize": lambda: dequantize(q, *given),
    }[operation]


def torchao_mx(job: Job, operation: str) -> Callable[[], object]:
    module = "torchao.prototype.mx_formats."
    if operation == "quantize":
        raise LookupError("it chooses scales and codes in one call")
    if job.scheme == "nvfp4":
        nvfp4 = importlib.import_module(module + "nvfp4_tensor")
        if operation == "dequantize":
            raise LookupError("it dequantizes tensors of its own class")
        return lambda: nvfp4.nvfp4_quantize(job.x, 16, job.p.global_scale)[1].view(job.q.dtype)
    mx = importlib.import_module(module + "mx_tensor")
    kind = torch.float8_e4m3fn if job.scheme == "mxfp8" else torch.float4_e2m1fn_x2
    mode = mx.ScaleCalculationMode
    rule = mode.RCEIL if job.scheme == "mxfp8" else mode.EVEN
    if operation == "dequantize":
        return lambda: mx.to_dtype(job.q, job.p.scale, kind, 32, torch.float32)
    return lambda: mx.to_mx(job.x, kind, 32, rule)[1].view(job.q.dtype)


def compressed_tensors(job: Job, operation: str) -> Callable[[], object]:
    """int4 in its words of 8 codes, each of them 8 higher."""
    if not job.scheme.startswith(("int", "fp8")):
        raise LookupError("it has no function of this scheme here")
    package, is_packed = "compressed_tensors.", job.p.dtype == torch.int4
    words = importlib.import_module(package + "compressors.pack_quantized.helpers")
    forward = importlib.import_module(package + "quantization.lifecycle.forward")
    helpers = importlib.import_module(package + "quantization.utils.helpers")
    by = {"tensor": {"strategy": "tensor"}, "group128": {"strategy": "group", "group_size": 128}}
    by["block128"] = {"strategy": "block", "block_structure": [128, 128]}
    args = importlib.import_module(package + "quantization").QuantizationArgs(
        num_bits=job.format.bits, type="float" if job.is_float else "int",
        **by.get(job.scheme.split("_")[1], {"strategy": "channel"}),
    )  # fmt: skip
    scale, storage = job.p.scale, job.p.dtype if job.is_float else torch.int8

    def quantize(scale):
        q = forward.quantize(job.x, scale, None, args, dtype=storage)
        return words.pack_to_int32(q, 4) if is_packed else q

    def dynamic():
        (rows, columns), (m, n) = job.x.shape, job.blocks
        x = job.x.view(rows // m, m, columns // n, n)
        return quantize(helpers.calculate_qparams(x.amin((1, 3)), x.amax((1, 3)), args)[0])

    def dequantize(q):
        q = words.unpack_from_int32(q, 4, job.x.shape) if is_packed else q
        return forward.dequantize(q, scale, None, args, dtype=torch.float32)

    q = quantize(scale) if is_packed else job.q
    calls = (lambda: quantize(scale)), dynamic, (lambda: dequantize(q))
    return dict(zip(OPERATIONS, calls, strict=True))[operation]


def compiled(make: Callable[[Job, str], Callable[[], object]]):
    def made(job: Job, operation: str) -> Callable[[], object]:
        torch._dynamo.reset()
        return torch.compile(make(job, operation), dynamic=False)

    return made


RIVALS = {
    "reference": eager,
    "by hand": plain,
    "by hand, compiled": compiled(plain),
    "torchao": torchao,
    "torchao, compiled": compiled(torchao),
    "compressed-tensors": compressed_tensors,
}


# ---- measuring --------------------------------------------------------------------------------------


def agreement(result: object, job: Job, operation: str) -> str:
    ours = job.x_hat if operation == "dequantize" else job.q
    theirs = result[0] if isinstance(result, tuple) else result
    if theirs.shape != ours.shape or theirs.element_size() != ours.element_size():
        return "other form"
    kind = {1: torch.uint8, 4: torch.int32}[ours.element_size()]
    differing = int((ours.view(kind) != theirs.contiguous().view(kind)).sum())
    return "=" if differing == 0 else f"{differing * 1e6 / ours.numel():.0f} ppm"


def cell(job: Job, operation: str, rivals: Iterable[str], budget: float) -> dict:
    source = job.x_hat if operation == "dequantize" else job.x
    out = torch.empty_like(source)
    calls: Calls = {COPY: lambda: out.copy_(source), OURS: ours(job, operation)}
    notes, absent = {}, {}
    for name in rivals:
        try:
            call = RIVALS[name](job, operation)
            notes[name] = agreement(call(), job, operation)
        except Exception as error:  # whatever a rival cannot do
            absent[name] = reason_of(error)
            continue
        calls[name] = call
    measured = contestants(calls, budget)
    found = described(job, measured, 2 * source.nbytes, job.bytes(operation))
    return found | {"operation": operation, "notes": notes, "absent": absent}


def described(job: Job, measured: dict[str, dict], yardstick: int, moved: int) -> dict:
    """A cell: of the contestants the first is the yardstick, the second is ours, each with its bytes."""
    first, second = (c["min"] for c in list(measured.values())[:2])
    speed = moved / second
    return {
        "scheme": job.scheme,
        "dtype": str(job.x.dtype).removeprefix("torch."),
        "shape": list(job.x.shape),
        "threads": torch.get_num_threads(),
        "gigabytes_per_second": speed / 1e9,
        "of_yardstick": speed / (yardstick / first),
        "contestants": measured,
    }


def speeds(cell: dict) -> tuple[str, str]:
    return f"{cell['gigabytes_per_second']:.1f}", f"{cell['of_yardstick']:.2f}"


def cells(args) -> Iterator[tuple[Job, str, Iterable[str]]]:
    for shape in args.shapes:
        for dtype in args.dtypes:
            for scheme in args.schemes:
                job = Job(scheme, shape, DTYPES[dtype])
                for operation in args.ops:
                    yield job, operation, () if args.alone else RIVALS


def tables(run: list[dict]) -> Iterator[Table]:
    for shape, dtype in dict.fromkeys((tuple(c["shape"]), c["dtype"]) for c in run):
        rows = []
        for c in run:
            if (tuple(c["shape"]), c["dtype"]) == (shape, dtype):
                best = c["contestants"][OURS]["min"]
                others = (
                    f"{c['contestants'][name]['min'] / best:.1f}× {c['notes'][name]}"
                    if name in c["contestants"] else "–"
                    for name in RIVALS
                )  # fmt: skip
                rows.append((c["scheme"], c["operation"], *speeds(c), *others))
        title = f"{'×'.join(map(str, shape))} {dtype}: ours, and how many times longer others take"
        yield table(title, ("scheme", "operation"), ("GB/s", "of copy", *RIVALS), rows)


# ---- the page that quotes runs ----------------------------------------------------------------------

PAGE = ("int8_channel", "int4_group128", "fp8_token", "mxfp8", "mxfp4", "nvfp4")
COLUMNS = {n: n for n in RIVALS if n != "by hand"} | {"reference": "plain PyTorch"}


def markdown(runs: list[dict], shape: tuple[int, ...] = (4096, 4096)) -> str:
    """A page's section: shares of a copy, then how many times longer each rival takes.

    Each instruction set and dtype of x has a column. The rivals are those of the first column.
    """
    columns: dict[tuple[str, str], dict[tuple[str, str], dict]] = {}
    for measured in runs:
        isa = measured["machine"]["quantkit"]["isa"]
        for c in measured["cells"]:
            if tuple(c["shape"]) == shape:
                column = columns.setdefault((isa, c["dtype"]), {})
                column[c["scheme"], c["operation"]] = c
    if not columns:
        raise ValueError(f"expected cells of shape {shape} in the runs of schemes, got none")
    first, machine = next(iter(columns.values())), runs[0]["machine"]
    lines = [
        f"Minima of one run for each column on {machine['cpu']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, {'×'.join(map(str, shape))}, commit {machine['commit']}.",
        "",
        f"| scheme, operation | {' | '.join(map(', '.join, columns))} | {' | '.join(COLUMNS.values())} |",
        "|---" * (1 + len(columns) + len(COLUMNS)) + "|",
    ]

    def longer(cell: dict, rival: str) -> str:
        times = cell["contestants"]
        if rival not in times:
            return "-"
        star = "\\*" if cell["notes"][rival].endswith("ppm") else ""
        return f"{times[rival]['min'] / times[OURS]['min']:.1f}×{star}"

    for name in itertools.product(PAGE, OPERATIONS):
        if name in first:
            found = (column.get(name) for column in columns.values())
            shares = (f"{c['of_yardstick']:.2f}" if c else "-" for c in found)
            others = (longer(first[name], rival) for rival in COLUMNS)
            lines.append(f"| `{name[0]}` {name[1]} | {' | '.join((*shares, *others))} |")
    return "\n".join(lines) + "\n"


def options(name, description, known: Iterable[str], chosen: tuple[str, ...]):
    p = cells_parser(name, description)
    p.add_argument("--schemes", type=words(known), default=chosen)
    p.add_argument("--dtypes", type=words(DTYPES), default=tuple(DTYPES))
    return p


def run_jobs(
    name: str, description: str | None, known: Iterable[str], chosen: tuple[str, ...],
    calls_of: Callable[[Job], Calls], moved: Callable[[Job], tuple[int, int]],
    words: tuple[str, str], arguments: list[str] | None,
) -> int:  # fmt: skip
    """The command of a module that measures one thing of some schemes, by one thread and by two.

    calls_of: the yardstick, ours and the others; moved: bytes of the first two; words: for the table.
    """
    p = options(name, description, known, chosen)
    p.add_argument("--threads", type=numbers, default=(1, 2))
    args = p.parse_args(arguments)

    def cell(scheme, shape, dtype, count, budget):
        job = Job(scheme, shape, DTYPES[dtype])
        with threads(count):
            return described(job, contestants(calls_of(job), budget), *moved(job))

    def rows(run):
        for c in run:
            _, best, *others = (v["min"] for v in c["contestants"].values())
            longer = (f"{time / best:.2f}×" for time in others)
            yield c["shape"], c["dtype"], c["scheme"], c["threads"], *speeds(c), *longer

    def tables(run):
        left, right = ("shape", "dtype", "scheme"), ("threads", "GB/s", words[1])
        others = list(run[0]["contestants"])[2:]
        title = f"{words[0]}, and how many times longer others take"
        yield table(title, left, (*right, *others), rows(run))

    jobs = list(itertools.product(args.schemes, args.shapes, args.dtypes, args.threads))
    run(args, cell, jobs, tables)
    return 0


def main(arguments: list[str] | None = None) -> int:
    p = options("benchmarks.schemes", __doc__, quantkit.SCHEMES, tuple(quantkit.SCHEMES))
    p.add_argument("--ops", type=words(OPERATIONS), default=OPERATIONS)
    p.add_argument("--alone", action="store_true", help="without rivals")
    args = p.parse_args(arguments)
    total = len(args.shapes) * len(args.dtypes) * len(args.schemes) * len(args.ops)
    run(args, cell, cells(args), tables, total)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
