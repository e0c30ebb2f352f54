"""How the tasks of a proof are run, and what is done is kept."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

from work import perform, prepare


class Journal:
    """What is done, one line of JSON for each task: an interrupted run goes on from there."""

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


def run_all(tasks, journal, jobs, sources, say=print):
    """Runs what is not done yet; the errors. sources() tells what results depend on."""
    before, errors = sources(), []
    complete = all(task.key in journal.done for task in tasks)
    # The files that phase 0 makes may be gone.
    left = [t for t in tasks if t.key not in journal.done or (t.phase == 0 and not complete)]
    if count := len(tasks) - len(left):
        say(f"{count} of {len(tasks)} tasks were done before")
    for phase, fallback in sorted({(task.phase, task.fallback) for task in left}):
        some = [task for task in left if (task.phase, task.fallback) == (phase, fallback)]
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, spawn, prepare, (fallback,))
        try:
            running = {pool.submit(perform, task): task for task in some}
            for finished in as_completed(running):
                task, result = running[finished], finished.result()
                if sources() != before:
                    raise SourcesChanged
                count += 1
                if "error" in result:
                    errors.append(f"{task.key}\n{result['error']}")
                    say(errors[-1])
                else:
                    journal.add(task.key, result)
                if count % 100 == 0 or count == len(tasks) or result["cpu_s"] > 60:
                    say(f"{count} of {len(tasks)} tasks: {task.name}, {result['cpu_s']:.0f} s")
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if errors and phase == 0:
            break  # the others would take the files that an earlier run has left
    return errors
