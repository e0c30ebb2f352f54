"""make proof: every input that can be tried, on every backend, compared with the reference.

Each part leaves a file in proof/results, which says what it was run on. Parts whose sources, code,
compiler and torch are still those of their file are not run again. README.md has the parts.
"""

import argparse
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

from run import Journal, SourcesChanged, run_all
from work import ROOT, prepare

FOLDER = ROOT / "build" / "proof"


def build():
    """The extension of the sources as they are."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = os.environ | {"QUANTKIT_BUILD_EMU": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)


def arguments():
    parser = argparse.ArgumentParser(prog="make proof", description=__doc__.split("\n")[0])
    parser.add_argument("--part", action="append", metavar="NAME", help="this one")
    parser.add_argument("--status", action="store_true", help="tells what is current, runs nothing")
    parser.add_argument("--short", action="store_true", help="samples, for CI; leaves no file")
    parser.add_argument("--keep", action="store_true", help="with --short: adds to short.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    return parser


def prove(label, names, options, isas):
    """Runs parts together; how many tasks failed."""
    import kept
    import report

    def sources():
        return {name: report.identity(name, options.short) for name in names}

    own = sources()
    tasks = [task for name in names for task in report.tasks_of(name, options.short)]
    journal = Journal(FOLDER / f"{label}-{report.short_hash([repr(own)])}.jsonl")
    errors = run_all(tasks, journal, options.jobs, sources)
    differences = report.differences(tasks, journal.done)
    if options.short or label == "samples":
        hashes = list(kept.found(tasks, journal.done))
        wrong, notes = kept.compare(hashes, kept.read(), whole=len(names) == len(report.PARTS))
        print(*notes, sep="\n", end="\n" if notes else "")
        differences += wrong
        if options.keep and not wrong:
            kept.write(kept.added(hashes, kept.read()))
    for difference in differences:
        errors.append(difference)
        print(difference)
    if not errors and not options.short:
        (name,) = names
        report.write(name, own[name], isas, tasks, journal.done)
        print(f"written: {report.path_of(name)}")
    return len(errors)


def main():
    parser = arguments()
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    prepare(in_pool=False)
    if not options.status:
        build()
    import report

    names = options.part or list(report.PARTS)
    unknown = set(names) - report.PARTS.keys()
    if unknown:
        parser.error(f"the parts are {', '.join(report.PARTS)}, not {', '.join(sorted(unknown))}")
    states = {name: report.state(name) for name in names}
    if options.status:
        for name, state in states.items():
            print(f"{name:10} {state}")
        return 0
    import quantkit

    backend = quantkit.backend()
    if not backend.extension or "cuda_emu" not in backend.isas:
        parser.error(f"it needs the development build of the extension: make build ({backend})")
    print(backend)
    FOLDER.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.short:
        runs = {"short": names}
    else:
        runs = {n: [n] for n in names if options.part or states[n] != "current"}
    failed = 0
    try:
        for label, parts in runs.items():
            print(f"{label}: {', '.join(parts)}" if options.short else f"{label}: {states[label]}")
            failed += prove(label, parts, options, backend.isas)
    except SourcesChanged:
        print("the sources changed meanwhile: what was found belongs to no commit")
        return 1
    except KeyboardInterrupt:  # SIGTERM too
        print("interrupted: the same command goes on from here")
        return 130
    except BrokenProcessPool:
        print("a process was killed (out of memory?): the same command goes on from here")
        return 1
    if failed:
        print(f"{failed} tasks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
