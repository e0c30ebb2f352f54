"""One task of a proof, the hashes of what it depends on, and the process that does it."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Task:
    """One call of a function of the modules here, with the kernels or with the fallback."""

    name: str  # of its row in the results
    module: str
    function: str
    args: tuple = ()
    fallback: bool = False
    phase: int = 1  # of phase 0: whenever something is left to do

    @property
    def key(self):
        where = "fallback" if self.fallback else "kernels"
        return f"{where} {self.module}.{self.function}{self.args}"


class Missing(Exception):
    """A tool that a task needs is not installed."""


# ---- what results depend on -----------------------------------------------------------------------


def hash_of(paths):
    """sha256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


# Parts of quantkit that no task imports (test_run.py checks it), and its version: no result depends on
# them.
BESIDE = {"__main__", "_shards", "_version", "checkpoint", "distributed", "nn", "observers", "onnx"}


def product_files():
    """What is proved, and the emulator that stands in for a GPU."""
    kinds = {".c", ".cpp", ".h", ".cu", ".cuh", ".py"}
    for folder in ("csrc", "quantkit", "proof/emu"):
        for path in (ROOT / folder).rglob("*"):
            top = Path(path.relative_to(ROOT / folder).parts[0]).stem
            if path.suffix in kinds and not (folder == "quantkit" and top in BESIDE):
                yield path
    yield ROOT / "setup.py"


def drawn_seed():
    """The seed of what is drawn: other sources, other cases."""
    return int(hash_of(product_files())[:7], 16)


def git(*arguments):
    command = ["git", "-C", ROOT, *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def commit():
    """The commit, and whether the files on disk are it."""
    proved = ("csrc", "quantkit", "tests", "proof", "benchmarks")
    files = ("setup.py", "pyproject.toml", "Makefile", ":!proof/results", ":!proof/README.md")
    changed = git("status", "--porcelain", "--", *proved, *files)
    return git("rev-parse", "HEAD") + (", with changes that are not committed" if changed else "")


def copy_sources(folder):
    """What an extension can be built from and tested with, in another place."""
    for name in ("csrc", "quantkit", "tests", "proof"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


# ---- doing it -------------------------------------------------------------------------------------


def prepare(fallback=False, in_pool=True):
    """A process that does tasks: one thread, and the fallback where it is asked for."""
    if in_pool:  # an interruption is the parent's to handle, whose end is this one's
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=end_with, args=(parent_process(),), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    if fallback:
        os.environ |= {"QUANTKIT_REFERENCE": "1", "QUANTKIT_ISA": ""}
    sys.path[:0] = [str(HERE), str(ROOT)]


def end_with(process):
    process.join()
    os._exit(1)


def cpu_s():
    """Of this process and of those it has run: what else the machine does counts little."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def perform(task):
    start = cpu_s()
    try:
        result = getattr(__import__(task.module), task.function)(*task.args)
    except Missing as missing:
        result = {"error": str(missing)}
    except Exception as error:
        result = {"error": "".join(traceback.format_exception(error))}
    return result | {"cpu_s": round(cpu_s() - start, 2)}
