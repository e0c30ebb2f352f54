"""How the tasks of a proof are run and what is done is kept."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from work import built_files, code_now, code_of, hash_of, perform, prepare, product_files


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
    errors, count = [], len(tasks) - len(left)
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
                    count += 1
                    if not console.is_terminal and count % 100 == 0:
                        console.print(f"{count} of {len(tasks)} tasks")
            except BaseException:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            if errors and group[0] == 0:
                break  # the others would take the files that an earlier run has left
    return errors
