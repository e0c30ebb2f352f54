"""make proof: every input that can be tried, on every backend, compared with the reference.

Finished tasks are kept in build/proof, under the hash of the sources: what was interrupted goes on,
and nothing is taken over from other sources. The long form writes its summary into docs/proof.md.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from work import (
    ROOT,
    built_files,
    code_now,
    code_of,
    commit,
    hash_of,
    perform,
    prepare,
    product_files,
    tasks_of,
)

FOLDER = ROOT / "build" / "proof"


class Journal:
    """What is done, one line of JSON for each task."""

    def __init__(self, path):
        self.path, self.done = path, {}
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    self.done[entry.pop("key")] = entry
                except (ValueError, TypeError, AttributeError, KeyError):  # cut off, or no entry
                    continue

    def add(self, key, entry):
        self.done[key] = entry
        with open(self.path, "a") as file:
            file.write("\n" + json.dumps({"key": key, **entry}))


class SourcesChanged(Exception):
    pass


def product_now():
    return hash_of(product_files()), hash_of(built_files())


def run_all(tasks, journal, jobs, product, console):
    """Runs what is not done yet; the errors."""
    complete = all(task.key in journal.done for task in tasks)
    # The files that phase 0 makes may be gone.
    left = [t for t in tasks if t.key not in journal.done or (t.phase == 0 and not complete)]
    errors = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        parts = {}
        for task in tasks:
            if task.part not in parts:
                total = sum(t.part == task.part for t in tasks)
                done = total - sum(t.part == task.part for t in left)
                parts[task.part] = progress.add_task(task.part, total=total, completed=done)
        groups = sorted({(task.phase, task.fallback) for task in left})
        for group in groups:
            some = [task for task in left if (task.phase, task.fallback) == group]
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(jobs, spawn, prepare, (group[1],))
            try:
                running = {pool.submit(perform, task): task for task in some}
                for finished in as_completed(running):
                    task, result = running[finished], finished.result()
                    if (product_now(), code_now(task.code)) != (product, code_of(task.code)):
                        raise SourcesChanged
                    if "error" in result:
                        errors.append(f"{task.key}\n{result['error']}")
                        progress.console.print(errors[-1], style="red", markup=False)
                    else:
                        journal.add(task.key, result)
                    progress.advance(parts[task.part])
                    if not console.is_terminal and len(journal.done) % 100 == 0:
                        console.print(f"{len(journal.done)} of {len(tasks)} tasks")
            except BaseException:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            if errors and group[0] == 0:
                break  # the others would take the files that an earlier run has left
    return errors


def build():
    """The extension of the sources as they are: results are kept under their hash."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = os.environ | {"QUANTKIT_BUILD_EMU": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)


def main():
    parser = argparse.ArgumentParser(prog="make proof", description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="samples of every part, for CI")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--parts", help="only these, by their names with commas between")
    parser.add_argument("--seed", type=int, help="of the generated cases (default: a new one)")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "proof.md")
    options = parser.parse_args()
    build()
    prepare(False, in_pool=False)
    import report

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(width=None if sys.stdout.isatty() else 120)
    import torch

    import quantkit

    backend = quantkit.backend()
    if not backend.extension or "cuda_emu" not in backend.isas:
        parser.error(f"it needs the development build of the extension: make build ({backend})")
    sources, built = product = product_now()
    form = "short" if options.short else "long"
    folder = FOLDER / f"{sources[:16]}-{built[:16]}-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / f"{form}.jsonl")
    if options.seed is None:
        options.seed = journal.done.get("seed", {}).get(
            "seed", random.SystemRandom().randrange(2**31)
        )
    if journal.done.get("seed", {}).get("seed") != options.seed:
        journal.add("seed", {"seed": options.seed})
    console.print(f"{backend}\nsources {sources[:16]}, seed {options.seed} (--seed repeats it)")

    tasks = list(tasks_of(options.short, options.seed))
    if options.parts:
        names = options.parts.split(",")
        unknown = set(names) - {task.part for task in tasks}
        if unknown:
            parser.error(f"no part is called {', '.join(sorted(unknown))}")
        tasks = [task for task in tasks if task.part in names]
    before = commit()
    try:
        errors = run_all(tasks, journal, options.jobs, product, console)
    except SourcesChanged:
        console.print("the sources changed meanwhile: what was found belongs to no commit")
        return 1
    except KeyboardInterrupt:  # SIGTERM too
        console.print("interrupted: the same command goes on from here")
        return 130
    except BrokenProcessPool:
        console.print("a process was killed (out of memory?): the same command goes on from here")
        return 1
    summary = report.Summary(tasks, journal.done, sources, before)
    for difference in summary.differences():
        errors.append(difference)
        console.print(difference, style="red", markup=False)
    console.print(summary.text(), markup=False, highlight=False, soft_wrap=True)
    if errors:
        console.print(f"{len(errors)} tasks failed", style="red")
        return 1
    if not options.short and not options.parts:
        report.write(options.report, summary)
        console.print(f"written: {options.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
