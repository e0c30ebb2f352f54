"""The frame of each command that measures: options, threads, tables, the file with every time."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import machine
from .measure import interleaved, summary

# ---- types of options -----------------------------------------------------------------------------


def words(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A comma-separated list of known names."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        wrong = [name for name in names if name not in known]
        if wrong or not names:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(known)}, got {', '.join(wrong) or 'nothing'}"
            )
        return tuple(dict.fromkeys(names))

    return parse


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        found = tuple(tuple(int(n) for n in part.split("x")) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or any(len(s) != 2 or min(s) < 1 for s in found):
        raise argparse.ArgumentTypeError(
            f"expected matrices such as 4096x4096,64x1024, got {text!r}"
        )
    return found


def numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,16,256, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(name, description=description, formatter_class=kind)


def cells_parser(
    name: str, description: str | None, sizes=((4096, 4096), (512, 1024)), seconds: float = 1.0
) -> argparse.ArgumentParser:
    """With the options that all commands have which measure some cells and print tables."""
    p = parser(name, description)
    p.add_argument("--shapes", type=shapes, default=sizes)
    p.add_argument(
        "--seconds", type=float, default=seconds, help=f"for each cell; default: {seconds:g}"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="writes every time")
    return p


# ---- measuring ------------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def contestants(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, dict]:
    """Times of each, measured in turn."""
    return {k: {**summary(v), "seconds": v} for k, v in interleaved(calls, budget).items()}


def reason_of(error: Exception) -> str:
    """Why a rival is absent, in one line."""
    return str(error).splitlines()[0][:120] if str(error) else repr(error)


def table(title: str, left: Iterable[str], right: Iterable[str], rows: Iterable[Iterable]) -> Table:
    """Columns of words, then those of numbers. The shapes of tensors are lists."""
    grid = Table(title=title, title_justify="left")
    for name in left:
        grid.add_column(name)
    for name in right:
        grid.add_column(name, justify="right")
    for row in rows:
        grid.add_row(*("×".join(map(str, v)) if isinstance(v, list) else str(v) for v in row))
    return grid


def run(
    args: argparse.Namespace, cell: Callable[..., dict], entries: Iterable[tuple],
    tables: Callable[[list[dict]], Iterable[Table]], total: int | None = None,
) -> list[dict]:  # fmt: skip
    """Measures each entry, prints the tables, and writes the file."""
    warnings.filterwarnings("ignore")
    console = Console(width=None if sys.stdout.isatty() else 200)
    work = track(entries, description="measuring", total=total, console=console)
    found = [cell(*entry, args.seconds) for entry in work]
    console.print(*tables(found), sep="\n")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.description(), "cells": found}) + "\n")
    return found
