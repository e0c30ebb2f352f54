"""Whole checkpoints: quantize one, compare it with its source, turn it back."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .. import _checks
from .._checks import wrong
from . import reports
from .convert import FIGURES, Converter, row_of
from .files import CheckpointError, Path_, path_of, shown
from .output import Comparer, DiskFull, Writer, as_json, free_space, no_space_for
from .plan import OutputFile, Plan, plan_to_dequantize, plan_to_quantize
from .rules import Options
from .rules import options as make_options
from .source import Source
from .state import FOLDER, State, are_rows, is_count, read_json

LAST = "config.json"  # whose lock is that of all small files
INDEX = "model.safetensors.index.json"
MOST_THREADS = 4095


class Event(NamedTuple):
    """What a run tells while it works.

    Attributes:
        kind: "plan" (size: bytes to read), "file" (name, which begins), "read" (size: bytes),
            "done" (name, which is whole), "before" (name, which was whole), "note" (name: a sentence).
    """

    kind: str
    name: str = ""
    size: int = 0


Progress = Callable[[Event], None]


def _quiet(event: Event) -> None:
    pass


# ---- arguments ----------------------------------------------------------------------------------------


def _check(
    threads: int | None, progress: Progress, restart: bool = False, png: bool = True
) -> None:
    count: object = _checks.number(threads)
    if type(count) not in (int, type(None)):  # bool is none of them
        raise wrong(TypeError, "threads", "an int or None", type(threads).__name__)
    if isinstance(count, int) and not 0 < count <= MOST_THREADS:
        raise wrong(ValueError, "threads", f"1 to {MOST_THREADS}", _checks.shown(count))
    if not callable(progress):
        raise wrong(TypeError, "progress", "a function of an Event", type(progress).__name__)
    _checks.flag("restart", restart)
    _checks.flag("png", png)


def _options(options: Options | None, scheme: Any, keywords: dict[str, Any]) -> Options:
    if options is None:
        return make_options(scheme, **keywords)
    if not isinstance(options, Options):
        raise wrong(TypeError, "options", "checkpoint.Options or None", type(options).__name__)
    for name, value in (keywords if scheme is None else {"scheme": scheme}).items():
        text = "none beside options=, which holds scheme and rules already"
        raise wrong(ValueError, name, text, _checks.shown(value))
    return options


# ---- quantize, dequantize -----------------------------------------------------------------------------


def quantize(
    src: Path_, dst: Path_, scheme: Any = None, *, restart: bool = False, threads: int | None = None,
    progress: Progress = _quiet, png: bool = True, options: Options | None = None, **keywords: Any,
) -> dict[str, Any]:  # fmt: skip
    """Quantize the weights of a checkpoint into a new folder, in bounded memory.

    Files that an earlier, ended run has made whole stay. With RANK and WORLD_SIZE in the environment, as
    torchrun sets them, several processes share the files.

    Args:
        src: a folder, or a file: see docs/checkpoints.md.
        dst: a folder that is new, empty, or of an earlier run with the same source and options.
        scheme, keywords: of :func:`quantkit.checkpoint.options`; or ``options`` alone, made by it.
        restart: forget what an earlier run left in dst.
        threads: how many compute; None is torch's number. torch's own are 1 until it returns.
        progress: called with each Event.
        png: whether report.png is drawn, which takes seconds.

    Returns:
        The report, as report.json has it.

    Raises:
        CheckpointError, which says in one line what is wrong. DiskFull is one. TypeError or ValueError
        for a wrong argument, before anything is written.
    """
    src, dst = path_of("src", src), path_of("dst", dst)
    _check(threads, progress, restart, png)
    chosen = _options(options, scheme, keywords)
    with Source(src) as source:
        plan = plan_to_quantize(source, chosen)
        for note in plan.notes:
            progress(Event("note", note))

        def last(state: State) -> dict[str, Any]:
            return _finish_quantized(source, plan, chosen, state, progress, png)

        return _run(source, dst, plan, restart, threads, progress, last, chosen.allow_nonfinite)


def dry_run(
    src: Path_, dst: Path_, scheme: Any = None, *, options: Options | None = None, **keywords: Any
) -> tuple[Plan, Source]:
    """What :func:`quantize` would do; nothing is written.

    Returns:
        The plan, and the closed source: ``others`` are copied, ``left_out`` are not.
    """
    src, dst = path_of("src", src), path_of("dst", dst)
    chosen = _options(options, scheme, keywords)
    with Source(src) as source:
        _check_places(source, dst)
        return plan_to_quantize(source, chosen), source


def dequantize(
    src: Path_,
    dst: Path_,
    *,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress = _quiet,
) -> dict[str, Any]:
    """Turn a checkpoint that :func:`quantize` wrote into floats again, in the dtypes it had.

    Each weight equals ``quantkit.dequantize(q, qparams)``, cast to its dtype. The other arguments and
    errors are those of :func:`quantize`.

    Returns:
        Bytes before and after, and how many weights were quantized.
    """
    src, dst = path_of("src", src), path_of("dst", dst)
    _check(threads, progress, restart)
    with Source(src) as source:
        plan = plan_to_dequantize(source)

        def last(state: State) -> dict[str, Any]:
            config = {k: v for k, v in source.config.items() if k != "quantization_config"}
            _write_all(source, state, _config_and_index(config, plan), progress)
            before, after = _sizes(plan)
            weights = sum(item.back for item in plan.items)
            return {"weights": weights, "bytes_before": before, "bytes_after": after}

        return _run(source, dst, plan, restart, threads, progress, last, True)


def _run(
    source: Source, dst: Path, plan: Plan, restart: bool, threads: int | None, progress: Progress,
    last: Callable[[State], dict[str, Any]], allow_nonfinite: bool,
) -> dict[str, Any]:  # fmt: skip
    _check_places(source, dst)
    rank, world = _ranks()
    who = f"rank {rank} of {world}, process {os.getpid()}"

    def waits(text: str) -> None:
        progress(Event("note", text))

    state = State(dst, plan.stamp, world > 1, restart)
    with no_space_for(dst), state.locked():
        todo = [file for file in plan.files if state.rows(file.name) is None]
        _check_space(dst, todo)
        progress(Event("plan", size=sum(map(_bytes_to_read, todo))))
        for file in plan.files:
            if file not in todo:
                progress(Event("before", file.name))
        with (
            Converter(source, plan, threads=threads, allow_nonfinite=allow_nonfinite) as converter,
            _Finisher(state, progress) as finisher,
        ):
            # Each process begins elsewhere; then it takes what no one has, then what is not whole.
            first = len(todo) * rank // world
            for tell in (None, waits):
                for file in [*todo[first:], *todo[:first]]:
                    with contextlib.ExitStack() as held:
                        mine = held.enter_context(state.file(file.name, who, tell))
                        if not mine or state.rows(file.name) is not None:
                            continue
                        progress(Event("file", file.name))
                        writer = Writer(dst / file.name, file.layout)
                        held.callback(writer.abandon)
                        rows = converter.convert(file, writer, functools.partial(_read, progress))
                        finisher.take(file.name, writer, rows, held)
            finisher.take_none()
        with state.file(LAST, who, waits):
            return last(state)


def _read(progress: Progress, size: int) -> None:
    progress(Event("read", size=size))


class _Finisher:
    """Brings a file to the disk and gives it its name, while the next one is made."""

    def __init__(self, state: State, progress: Progress) -> None:
        self._state, self._progress = state, progress
        self._pool = ThreadPoolExecutor(1)
        self._running: tuple[str, Future[None]] | None = None

    def __enter__(self) -> _Finisher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def take(self, name: str, writer: Writer, rows: list[Any], held: contextlib.ExitStack) -> None:
        """held: what is given back when the file is whole, or cannot be."""
        self.take_none()
        self._running = name, self._pool.submit(self._finish, name, writer, rows, held.pop_all())

    def take_none(self) -> None:
        """Wait for the last file."""
        if self._running is not None:
            (name, future), self._running = self._running, None
            future.result()
            self._progress(Event("done", name))

    def _finish(
        self, name: str, writer: Writer, rows: list[Any], held: contextlib.ExitStack
    ) -> None:
        with held:
            writer.finish()
            self._state.add(name, rows)


def _ranks() -> tuple[int, int]:
    found = []
    for name, default in ("RANK", "0"), ("WORLD_SIZE", "1"):
        text = os.environ.get(name, default)
        try:
            found.append(int(text))
        except ValueError:
            raise CheckpointError(f"{name}: expected a number, got {shown(repr(text))}") from None
    rank, world = found
    if not 0 <= rank < world:
        raise CheckpointError(
            "RANK and WORLD_SIZE: expected a rank below the number of processes, "
            f"got {rank} of {world}"
        )
    return rank, world


def _check_places(source: Source, dst: Path) -> None:
    there = Path(os.path.realpath(dst))
    around = _identities(there)
    if there.exists() and there.samefile(source.path):
        raise CheckpointError(f"{shown(dst)}: is the source itself")
    if _identity(source.path) in around:
        raise CheckpointError(f"{shown(dst)}: lies inside the source")
    if dst.exists() and not dst.is_dir():
        raise CheckpointError(f"{shown(dst)}: is a file, expected a folder")
    if dst.exists() and any(around[0] in _identities(folder) for folder in source.folders()):
        raise CheckpointError(f"{shown(dst)}: holds the source")
    if dst.is_dir() and os.listdir(dst) and not (dst / FOLDER).is_dir():
        raise CheckpointError(f"{shown(dst)}: has files that quantkit did not write")


def _identity(path: Path) -> tuple[int, int]:
    """The same by every name, link and mount."""
    info = path.stat()
    return info.st_dev, info.st_ino


def _identities(path: Path) -> list[tuple[int, int]]:
    """Of a folder and those around it, as far as they exist."""
    return [_identity(folder) for folder in (path, *path.parents) if folder.exists()]


def _check_space(dst: Path, todo: list[OutputFile]) -> None:
    needed = sum(file.layout.size for file in todo)
    for file in todo:
        part = dst / f"{file.name}.part"
        if part.exists():  # its space is taken already
            needed -= min(file.layout.size, part.stat().st_blocks * 512)
    free = free_space(dst)
    if needed > free:
        raise DiskFull(f"{shown(dst)}: no space: it needs {needed} bytes, {free} are free")


def _bytes_to_read(file: OutputFile) -> int:
    passes = [
        2 if i.weight is not None and not i.back and i.weight.scheme.whole else 1
        for i in file.items
    ]
    sizes = [sum(region.nbytes for region in item.inputs) for item in file.items]
    return sum(p * s for p, s in zip(passes, sizes, strict=True))


def _sizes(plan: Plan) -> tuple[int, int]:
    before = sum(region.nbytes for item in plan.items for region in item.inputs)
    return before, sum(item.bytes_after for item in plan.items)


# ---- what comes last ----------------------------------------------------------------------------------


# Files of ours, which are made anew whatever a source has under these names.
_OWN = ("config.json", "report.json", "report.png")


def _small_files(source: Source, plan: Plan, chosen: Options, rows: list[Any]) -> dict[str, bytes]:
    """What a quantized checkpoint has beside the weights, what is copied, and the picture."""
    config = dict(source.config)
    if plan.config is not None:
        config["quantization_config"] = plan.config
    kept = [(item.name, item.reason) for item in plan.items if item.weight is None]
    summary = reports.summary(rows, kept, chosen.scheme.name, _sizes(plan))
    return {"report.json": as_json(summary), **_config_and_index(config, plan)}


def _config_and_index(config: dict[str, Any], plan: Plan) -> dict[str, bytes]:
    made = {"config.json": as_json(config)} if config else {}
    return made if plan.index is None else {**made, INDEX: as_json(plan.index)}


def _finish_quantized(
    source: Source, plan: Plan, chosen: Options, state: State, progress: Progress, png: bool
) -> dict[str, Any]:
    rows = [row for file in plan.files for row in state.rows(file.name) or ()]
    made = _small_files(source, plan, chosen, rows)
    report: dict[str, Any] = json.loads(made["report.json"])
    if png and rows and not (state.complete and (state.dst / "report.png").exists()):
        picture = reports.picture(report)
        if picture is None:
            progress(Event("note", "no report.png: matplotlib is not installed"))
        else:
            made["report.png"] = picture
    _write_all(source, state, made, progress)
    return report


def _with_copies(
    source: Source, made: dict[str, bytes]
) -> list[tuple[str, Callable[[], Iterable[bytes]]]]:
    """All small files and their bytes; config.json last, as it makes the folder a model."""
    small: dict[str, Callable[[], Iterable[bytes]]] = {
        name: functools.partial(source.chunks, name) for name in source.others if name not in _OWN
    }
    small |= {name: functools.partial(iter, (data,)) for name, data in made.items()}
    return sorted(small.items(), key=lambda file: (file[0] == "config.json", file[0]))


def _write_all(source: Source, state: State, made: dict[str, bytes], progress: Progress) -> None:
    """The small files that are not there already, with these bytes."""
    small = _with_copies(source, made)
    state.plan_small(name for name, _ in small)
    for name, chunks in small:
        if _same(state.dst / name, chunks()):
            continue
        state.write(name, chunks())
        if state.complete:
            progress(Event("note", f"{shown(name)}: written again"))
    if not state.complete:
        state.set_complete()


# ---- verify, report -----------------------------------------------------------------------------------


def verify(
    src: Path_, dst: Path_, *, threads: int | None = None, progress: Progress = _quiet
) -> list[str]:
    """Quantize again, in memory, and compare every byte of dst but the picture.

    The options are those that dst remembers. The figures of report.json are not measured again.

    Returns:
        What differs: names of tensors and files, also of files that quantize would not write, unless
        they are hidden; empty where dst is what quantize would write. That dst was made
        from another source is no error: the list says what differs.

    Raises:
        CheckpointError where dst is no complete checkpoint of :func:`quantize`, or where src cannot be
        quantized by the options of dst. TypeError or ValueError for a wrong argument.
    """
    src, folder = path_of("src", src), path_of("dst", dst)
    _check(threads, progress)
    path = folder / FOLDER / "stamp.json"
    if not path.exists() or not (folder / FOLDER / "complete").exists():
        raise CheckpointError(f"{shown(folder)}: is no complete checkpoint of quantkit quantize")
    stamp = read_json(path)
    if stamp.get("what") != "quantize":
        raise CheckpointError(f"{shown(folder)}: was made by quantkit {shown(stamp.get('what'))}")
    chosen = Options.of_dict(stamp.get("options", {}))
    differing: list[str] = []
    with Source(src) as source:
        plan = plan_to_quantize(source, chosen)
        progress(Event("plan", size=sum(map(_bytes_to_read, plan.files))))
        with Converter(
            source, plan, threads=threads, allow_nonfinite=True, measured=False
        ) as converter:
            for file in plan.files:
                progress(Event("file", file.name))
                if not (folder / file.name).is_file():
                    differing.append(f"{file.name}: is missing")
                    continue
                try:
                    comparer = Comparer(folder / file.name, file.layout)
                except CheckpointError as error:
                    differing.append(str(error))
                    continue
                try:
                    converter.convert(file, comparer, functools.partial(_read, progress))
                finally:
                    comparer.close()
                differing += sorted(comparer.differing)
                progress(Event("done", file.name))
        try:
            said = {row["name"]: row for row in report(folder)["tensors"]}
        except CheckpointError:  # then report.json differs from one without figures
            said = {}
        rows = [
            row_of(item, {key: said.get(item.name, {}).get(key) for key in FIGURES})
            for item in plan.items
            if item.weight is not None
        ]
        small = _with_copies(source, _small_files(source, plan, chosen, rows))
        for name, chunks in small:
            if not (folder / name).is_file():
                differing.append(f"{name}: is missing")
            elif not _same(folder / name, chunks()):
                differing.append(name)
    expected = {"report.png", *(file.name for file in plan.files), *(name for name, _ in small)}
    there = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if not p.is_dir())
    return differing + [
        f"{path}: quantize writes no such file"
        for path in there
        if str(path) not in expected and not any(part.startswith(".") for part in path.parts)
    ]


def _same(path: Path, chunks: Iterable[bytes]) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return all(file.read(len(chunk)) == chunk for chunk in chunks) and not file.read(1)


def report(dst: Path_) -> dict[str, Any]:
    """report.json of a quantized checkpoint."""
    path = path_of("dst", dst) / "report.json"
    if not path.is_file():
        raise CheckpointError(f"{shown(dst)}: has no report.json")
    said = read_json(path)
    rows, kept = said.get("tensors"), said.get("kept")
    good = (
        all(is_count(said.get(key)) for key in ("bytes_before", "bytes_after"))
        and are_rows(rows)
        and isinstance(kept, list)
        and all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in kept)
    )
    if not good:
        raise CheckpointError(f"{shown(path)}: is no report of quantkit")
    return said
