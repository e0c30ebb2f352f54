"""What a half-done folder remembers, in DST/.quantkit, so that a run can go on where another one ended.

Files that are whole stay. A lock of the system, which ends with its process, keeps two of them from
writing one file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from .files import CheckpointError, shown
from .output import as_json, no_space_for, write_whole

FOLDER = ".quantkit"
PATIENCE = 5.0  # seconds of waiting in silence


class State:
    """The folder of a run.

    Args:
        dst: the folder to write, which is new, empty, or of an earlier run.
        stamp: what the files follow from: those of another stamp are not mixed with them.
        several: whether other processes of this run work in the folder too.
        restart: forget what is there.

    Raises:
        CheckpointError in one line.
    """

    def __init__(self, dst: Path, stamp: dict[str, Any], several: bool, restart: bool) -> None:
        self.dst, self.folder = dst, dst / FOLDER
        if several and restart:
            raise CheckpointError(
                "--restart: is for one process: several would delete files of each other"
            )
        self._stamp = stamp
        self._restart = restart
        self._several = several

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The folder belongs to this run."""
        if self.folder.is_symlink():
            raise CheckpointError(f"{shown(self.folder)}: is a link")
        self.folder.mkdir(parents=True, exist_ok=True)
        how = fcntl.LOCK_SH if self._several else fcntl.LOCK_EX
        with self._lock("lock", how | fcntl.LOCK_NB) as mine:
            if not mine:
                raise CheckpointError(f"{shown(self.dst)}: another process works here")
            if self._restart:
                self._forget()
            with self._lock("stamp.lock", fcntl.LOCK_EX):
                self._check_stamp()
            yield

    @contextlib.contextmanager
    def file(
        self, name: str, who: str = "", tell: Callable[[str], None] | None = None
    ) -> Iterator[bool]:
        """An output file belongs to this process; False where it is another's and tell is None.

        who: this process, for others. tell: called once where another one's work takes long.
        """
        with self._lock(f"{name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB, tell, who) as mine:
            yield mine

    @contextlib.contextmanager
    def _lock(
        self, name: str, how: int, tell: Callable[[str], None] | None = None, who: str = ""
    ) -> Iterator[bool]:
        """With tell it waits, whatever how says."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.folder / name, flags, 0o666)
        try:
            began, mine = time.monotonic(), self._takes(fd, how)
            while tell is not None and not mine and time.monotonic() < began + PATIENCE:
                time.sleep(0.05)
                mine = self._takes(fd, how)
            if tell is not None and not mine:
                holder = os.pread(fd, 100, 0).decode(errors="replace") or "another process"
                tell(f"{shown(self.dst / name.removesuffix('.lock'))}: waits for {shown(holder)}")
                mine = self._takes(fd, how & ~fcntl.LOCK_NB)
            if mine and who:
                with contextlib.suppress(OSError):  # a full disk
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, who.encode(), 0)
            yield mine
        finally:
            os.close(fd)

    def _takes(self, fd: int, how: int) -> bool:
        try:
            fcntl.flock(fd, how)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise CheckpointError(
                    f"{shown(self.dst)}: its file system has no locks: {error.strerror}"
                ) from None
            return False
        return True

    def _check_stamp(self) -> None:
        path = self.folder / "stamp.json"
        begun = self._several or any(self.folder.glob("*.safetensors.json"))
        if not path.exists() or not begun:
            for part in () if self._several else self._parts():
                part.unlink(missing_ok=True)  # of a plan that no one goes on with
            self._keep("stamp.json", as_json(self._stamp))
            return
        there = read_json(path)
        for key, value in self._stamp.items():
            if there.get(key) != value:
                difference = _difference(key, there.get(key), value)
                raise CheckpointError(
                    f"{shown(self.dst)}: was begun with {difference}: delete it, or pass --restart"
                )

    def _forget(self) -> None:
        """What an earlier run wrote goes; files of others stay."""
        parts = self._parts()
        small = [self._inside(name) for name in self._small()]
        for path in [*small, *parts, *(part.with_suffix("") for part in parts)]:
            path.unlink(missing_ok=True)
        for folder in sorted({p for path in small for p in path.parents}, reverse=True):
            if folder != self.dst and folder.is_relative_to(self.dst):
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
        for path in self.folder.iterdir():
            if not path.name.endswith("lock"):
                path.unlink()

    def _parts(self) -> list[Path]:
        """Where the files of weights that a run began gather their bytes."""
        locks = self.folder.glob("*.safetensors.lock")
        return [self.dst / f"{lock.stem}.part" for lock in locks]

    def _inside(self, name: str) -> Path:
        """The path of a name in dst, whose folders may be links."""
        path = self.dst / name
        if not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(self.dst)):
            raise CheckpointError(f"{shown(path)}: a link that leads out of the folder")
        return path

    # ---- small files ------------------------------------------------------------------------------

    def _small(self) -> list[str]:
        path = self.folder / "small.json"
        names = read_json(path).get("files") if path.exists() else []
        if not isinstance(names, list) or not all(map(_is_small, names)):
            raise CheckpointError(f"{shown(path)}: expected names of files")
        return names

    def plan_small(self, names: Iterable[str]) -> None:
        """Remember them, before one is written."""
        before = self._small()
        if now := sorted({*before, *names} - {*before}):
            self._keep("small.json", as_json({"files": before + now}))

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """A small file of dst."""
        path = self._inside(name)
        with no_space_for(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, chunks, self.folder / "small.part")

    def _keep(self, name: str, data: bytes) -> None:
        write_whole(self.folder / name, (data,), self.folder / f"{name}.part")

    # ---- what is done -----------------------------------------------------------------------------

    def rows(self, name: str) -> list[dict[str, Any]] | None:
        """The rows of the report that belong to a whole file; None where it is not whole."""
        path, file = self.folder / f"{name}.json", self.dst / name
        if not path.exists() or not file.exists():
            return None
        said = read_json(path)
        rows = said.get("rows")
        if not are_rows(rows):
            raise CheckpointError(f"{shown(path)}: expected rows of a report")
        return rows if said.get("size") == file.stat().st_size else None

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        size = (self.dst / name).stat().st_size
        self._keep(f"{name}.json", as_json({"size": size, "rows": rows}))

    @property
    def complete(self) -> bool:
        return (self.folder / "complete").exists()

    def set_complete(self) -> None:
        self._keep("complete", b"")


def _is_small(name: object) -> bool:
    """Whether it is a name that a source gives: relative, and no part of it is hidden."""
    if not isinstance(name, str) or not name or name.startswith("/") or "\0" in name:
        return False
    try:
        return not any(part.startswith(b".") for part in os.fsencode(name).split(b"/"))
    except UnicodeEncodeError:
        return False


def _difference(key: str, before: Any, now: Any) -> str:
    """What two stamps differ in, in words."""
    both = isinstance(before, dict) and isinstance(now, dict)  # options, and the scheme in them
    keys = [k for k in now if before.get(k) != now[k]] if both else []
    if keys:
        first = "name" if "name" in keys else keys[0]
        return _difference(key if first == "name" else first, before.get(first), now[first])
    words = {"source": "another source, or it changed", "options": "other options"}
    words |= {"rules": "other rules", "plan": "another plan"}
    if key in words:
        return words[key]
    key = {"what": "command", "quantkit": "version"}.get(key, key)
    return f"{key} {shown(before)}, now {shown(now)}"


def read_json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown(path)}: {shown(error)}") from None
    if not isinstance(said, dict):
        raise CheckpointError(f"{shown(path)}: expected a JSON object")
    return said


_ROW = {
    "name": str, "shape": list, "scheme": str, "sqnr_db": float | int | None, "max_error": float | int,
    "saturated": int, "left_out": int, "bytes_before": int, "bytes_after": int,
}  # fmt: skip


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def are_rows(rows: object) -> TypeGuard[list[dict[str, Any]]]:
    """Whether they are rows of a report."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(key), kind) for key, kind in _ROW.items())
        and all(is_count(row[key]) for key, kind in _ROW.items() if kind is int)
        and all(abs(row[key] or 0) < 1e300 for key in ("sqnr_db", "max_error"))  # no NaN
        and all(map(is_count, row["shape"]))
        for row in rows
    )
