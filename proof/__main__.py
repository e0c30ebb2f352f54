"""make proof: every input that can be tried, on every backend, compared with the reference.

Finished tasks are kept in build/proof, under the hash of the sources: what was interrupted goes on,
and nothing is taken over from other sources. The long form writes its summary into docs/proof.md.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from run import Journal, SourcesChanged, product_now, run_all
from work import ROOT, commit, prepare, tasks_of

FOLDER = ROOT / "build" / "proof"


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
    parser.add_argument(
        "--keep", action="store_true", help="with --short: add its hashes to proof/short.json"
    )
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "proof.md")
    options = parser.parse_args()
    if options.keep and not options.short:
        parser.error("--keep goes with --short")
    build()
    prepare(False, in_pool=False)
    import kept
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
    differences = summary.differences()
    if options.short:
        hashes = list(kept.found(tasks, journal.done))
        wrong, notes = kept.compare(hashes, kept.read(), whole=not options.parts)
        differences += wrong
        for note in notes:
            console.print(note, markup=False)
        if options.keep and not wrong:
            kept.write(kept.added(hashes, kept.read()))
    for difference in differences:
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
