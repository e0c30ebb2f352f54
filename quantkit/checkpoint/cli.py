"""The command ``quantkit``: arguments, what the terminal shows, exit codes (docs/checkpoints.md)."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from .._load import backend
from .._version import __version__
from . import reports
from .files import CheckpointError, shown
from .layouts import SCHEMES
from .output import DiskFull
from .plan import Plan
from .reader import Checkpoint
from .rules import options
from .run import (
    MOST_THREADS,
    Event,
    Progress,
    dequantize,
    dry_run,
    quantize,
    report,
    verify,
)
from .source import Source

DIFFERS, REFUSED, FULL = 1, 2, 3  # exit codes; 130 and 143 are those of signals


class _Stopped(BaseException):
    """SIGTERM."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def stop(_: int, __: FrameType | None) -> NoReturn:
        raise _Stopped

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `2>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    args = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no locale makes a name an error
            stream.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, stop)
    try:
        run: Callable[[argparse.Namespace], int] = args.run
        code = run(args)
        sys.stdout.flush()
        return code
    except DiskFull as error:
        return _failed(error, FULL)
    except CheckpointError as error:
        return _failed(error, REFUSED)
    except BrokenPipeError:  # of `quantkit report DST | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}", REFUSED)
    except KeyboardInterrupt:
        return _failed("interrupted: the same command goes on from here", 128 + signal.SIGINT)
    except _Stopped:
        return _failed("terminated: the same command goes on from here", 128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def _failed(why: object, code: int) -> int:
    with contextlib.suppress(OSError):  # the code says it too
        print(f"quantkit: {_rank()}error: {shown(why, 1000)}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Its errors are one line: the usage is what --help prints."""

    def error(self, message: str) -> NoReturn:
        self.exit(_failed(message, REFUSED))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="quantkit", description="Quantize whole checkpoints.")
    parser.add_argument("--version", action="version", version=f"quantkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, run: Callable[..., int], *places: str) -> Any:
        made = commands.add_parser(name, help=text, description=text)
        for place in places:
            made.add_argument(place, type=Path, metavar=place.upper())
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        if "src" in places:  # it computes
            text = "how many threads compute"
            made.add_argument("--threads", type=_count, metavar="N", help=text)
        made.set_defaults(run=run)
        return made

    made = command("quantize", "quantize the weights of SRC into DST", _quantize, "src", "dst")
    names = f"of what no rule names: {', '.join(SCHEMES)} (w8a8)"
    made.add_argument("--scheme", metavar="NAME", help=names)
    made.add_argument("--config", type=Path, metavar="FILE.toml", help="rules and other options")
    made.add_argument(
        "--include", action="append", default=[], metavar="P", help="quantize these too"
    )
    made.add_argument("--exclude", action="append", default=[], metavar="P", help="keep these")
    made.add_argument("--shard-size", metavar="SIZE", help="of output files, such as 2GB")
    made.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinities")
    made.add_argument("--dry-run", action="store_true", help="list what would be done")
    made.add_argument("--restart", action="store_true", help="forget an earlier run in DST")
    made.add_argument("--no-png", action="store_true", help="draw no report.png")
    command("verify", "quantize SRC again and compare every byte of DST", _verify, "src", "dst")
    command("report", "show the errors of a quantized checkpoint", _report, "dst")
    back = command("dequantize", "turn a quantized checkpoint back", _dequantize, "src", "dst")
    back.add_argument("--restart", action="store_true", help="forget an earlier run in DST")
    info = command("info", "show what runs here, or what a checkpoint holds", _info)
    info.add_argument("path", type=Path, nargs="?", metavar="PATH")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 0 < int(text) <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MOST_THREADS}, got {text!r}")
    return int(text)


# ---- commands -----------------------------------------------------------------------------------------


def _quantize(args: argparse.Namespace) -> int:
    chosen = options(
        args.scheme, config=args.config, include=args.include, exclude=args.exclude,
        shard_size=args.shard_size, allow_nonfinite=args.allow_nonfinite,
    )  # fmt: skip
    if args.dry_run:
        _show_plan(*dry_run(args.src, args.dst, options=chosen), args.json)
        return 0
    with _progress(args.json) as progress:
        made = quantize(
            args.src,
            args.dst,
            options=chosen,
            restart=args.restart,
            threads=args.threads,
            progress=progress,
            png=not args.no_png,
        )
    if _first():
        _show_report(made, args.json)
    return 0


def _verify(args: argparse.Namespace) -> int:
    with _progress(args.json) as progress:
        differing = verify(args.src, args.dst, threads=args.threads, progress=progress)
    if args.json:
        _print_json({"differing": differing})
    elif differing:
        for name in differing:
            print(f"differs: {shown(name, 1000)}")
    else:
        print("every byte is the same")
    return DIFFERS if differing else 0


def _report(args: argparse.Namespace) -> int:
    made = report(args.dst)
    if not args.json:
        _print_table(reports.table(made["tensors"]))
    _show_report(made, args.json, beside_all=True)
    return 0


def _dequantize(args: argparse.Namespace) -> int:
    with _progress(args.json) as progress:
        made = dequantize(
            args.src, args.dst, restart=args.restart, threads=args.threads, progress=progress
        )
    if args.json and _first():
        _print_json(made)
    elif _first():
        before, after = reports.size(made["bytes_before"]), reports.size(made["bytes_after"])
        print(f"{made['weights']} weights dequantized, {before} -> {after}")
    return 0


def _info(args: argparse.Namespace) -> int:
    said: dict[str, Any] = {
        "quantkit": __version__,
        "torch": torch.__version__,
        "backend": str(backend()),
        "threads": torch.get_num_threads(),
    }
    if args.path is not None:
        with Source(args.path) as source:
            dtypes = Counter(str(r.dtype).removeprefix("torch.") for r in source.tensors.values())
            total = sum(region.nbytes for region in source.tensors.values())
            files = [f.name for f in source.files]
        with Checkpoint(args.path) as checkpoint:
            schemes = Counter(weight.scheme.name for weight in checkpoint.weights.values())
        said = {
            "files": files, "tensors": dict(dtypes), "bytes": total, "quantized": dict(schemes),
        }  # fmt: skip
    if args.json:
        _print_json(said)
    else:
        for key, value in said.items():
            if isinstance(value, dict):
                value = ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
            elif isinstance(value, list):
                value = ", ".join(value)
            print(f"{key}: {shown(value, 1000)}")
    return 0


# ---- what is shown ------------------------------------------------------------------------------------


def _first() -> bool:
    """Of several processes one shows the result."""
    return os.environ.get("RANK", "0") == "0"


def _rank() -> str:
    """Of several processes the one that says something."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return f"rank {shown(rank)} of {world}: " if world.isdecimal() and world != "1" else ""


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def _show_report(made: dict[str, Any], as_json: bool, beside_all: bool = False) -> None:
    lost = sum(row["left_out"] > 0 for row in made["tensors"])
    if lost:
        text = f"quantkit: {_rank()}warning: weights with errors that are not finite: {lost}"
        print(text, file=sys.stderr)
    if as_json:
        _print_json(made)
        return
    print(reports.totals(made))
    if made["kept"]:
        print(f"kept: {reports.reasons(made)}")
    rows = reports.worst(made)
    if rows and not (beside_all and len(made["tensors"]) <= reports.WORST):
        print(f"the {len(rows)} worst:")
        _print_table(reports.table(rows))


def _show_plan(made: Plan, source: Source, as_json: bool) -> None:
    for note in made.notes:
        print(note, file=sys.stderr)
    if as_json:
        files = [
            {
                "name": file.name,
                "bytes": file.layout.size,
                "tensors": [
                    {
                        "name": i.name,
                        "shape": list(i.inputs[0].shape),
                        "dtype": str(i.inputs[0].dtype).removeprefix("torch."),
                        "scheme": i.weight and i.weight.scheme.as_dict(),
                        "kept": i.reason or None,
                        "bytes_before": i.inputs[0].nbytes,
                        "bytes_after": i.bytes_after,
                    }
                    for i in file.items
                ],
            }
            for file in made.files
        ]
        _print_json({"files": files, "copied": source.others, "left_out": source.left_out})
        return
    for file in made.files:
        print(f"{file.name}: {file.layout.size:,} bytes")
        for item in file.items:
            region = item.inputs[0]
            kind = f"{list(region.shape)} {str(region.dtype).removeprefix('torch.')}"
            what = f"kept: {item.reason}"
            if item.weight is not None:
                scheme = shown(item.weight.scheme.name)
                what = f"{scheme}: {region.nbytes:,} -> {item.bytes_after:,} bytes"
            print(f"  {shown(item.name)} {kind} {what}")
    for name in source.others:
        print(f"copied: {shown(name)}")
    for name, reason in source.left_out.items():
        print(f"left out: {shown(name)}: {reason}")


def _print_table(cells: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty() and (rich := _rich()):
        table = rich.table.Table(box=None, pad_edge=False)
        for i, title in enumerate(cells[0]):
            table.add_column(title, justify="left" if i < 3 else "right")
        for row in cells[1:]:
            table.add_row(*map(rich.text.Text, row))
        rich.console.Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(
            c.ljust(w) if i < 3 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        print(line.rstrip())


def _rich() -> Any:
    """rich with what is used of it, or None where it is not installed."""
    try:
        import rich.console
        import rich.progress
        import rich.table
        import rich.text
    except ImportError:
        return None
    return rich


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Progress]:
    """Lines on stderr; on a terminal a bar too, where rich is installed."""
    began: dict[str, float] = {}
    bar: Any = None
    task: Any = None

    def line(text: str) -> None:
        text = _rank() + text
        if bar is not None:
            bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def told(event: Event) -> None:
        if event.kind == "plan" and bar is not None:
            bar.update(task, total=event.size)
        elif event.kind == "read" and bar is not None:
            bar.advance(task, event.size)
        elif event.kind == "file":
            began[event.name] = time.monotonic()
        elif event.kind == "done":
            line(f"{event.name}: done in {time.monotonic() - began[event.name]:.1f} s")
        elif event.kind == "before":
            line(f"{event.name}: was done before")
        elif event.kind == "note":
            line(event.name)

    terminal = sys.stderr.isatty() and not as_json and os.environ.get("TERM") != "dumb"
    rich = _rich() if terminal else None
    if rich is None:
        yield told
        return
    columns = (
        rich.progress.BarColumn(), rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(), rich.progress.TimeRemainingColumn(),
    )  # fmt: skip
    bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))
    with bar:
        task = bar.add_task("", total=None)
        yield told
