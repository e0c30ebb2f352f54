"""The result file of each part of a proof, and the page that is made of them."""

import hashlib
import json
import os
import platform
from datetime import date
from functools import cache
from importlib import metadata

from machines import build_rules, version
from parts import PARTS
from work import HERE, ROOT, commit, drawn_seed, hash_of, product_files

PAGE = ROOT / "docs" / "proof.md"
COUNTED = {
    "inputs": "inputs", "results": "results", "cases": "drawn cases", "calls": "calls",
    "guarded": "calls between unreadable pages", "scales": "divisors", "pairs": "quotients",
    "passed": "tests",
}  # fmt: skip
BEGIN, END = "<!-- begin: written by make proof -->", "<!-- end -->"


def short_hash(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@cache
def compiler():
    command = build_rules().find_compiler()
    return f"{version(command)} {os.environ.get('CXXFLAGS', '')}".strip()


@cache
def tasks_of(part, short=False):
    return list(PARTS[part].tasks(short))


def identity(part, short=False):
    """What the results of a part depend on; not the library's bytes, which nvcc makes anew."""
    files = (path for pattern in PARTS[part].code for path in ROOT.glob(pattern))
    return {
        "sources": hash_of(product_files())[:16],
        "code": short_hash([hash_of(files), *(task.key for task in tasks_of(part, short))]),
        "compiler": compiler(),
        "torch": metadata.version("torch"),
    }


# ---- results --------------------------------------------------------------------------------------


def differences(tasks, done):
    """Hashes that should be equal and are not: of backends, of the fallback, of builds."""
    found = {}
    for task in tasks:
        result = done.get(task.key, {})
        what = f"{task.name}{task.args}"
        if "every" in result:
            what = f"recorded calls, one in {result['every']}"
        for backend, digest in result.get("hashes", {}).items():
            found.setdefault(what, {})[f"{task.name} {backend}"] = digest
    return [f"{what}: {them}" for what, them in found.items() if len(set(them.values())) > 1]


def merged(values):
    """Numbers are added, what is the same stays, and of different hashes there is one of all."""
    first = values[0]
    if isinstance(first, dict):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: merged([v[name] for v in values if name in v]) for name in names}
    if isinstance(first, int | float):
        return round(sum(values), 2)
    return first if all(value == first for value in values) else short_hash(map(str, values))


def rows(tasks, done):
    """What each name covered. The fallback's tasks are the kernels' again: it adds its hash."""
    found = {}
    for name in dict.fromkeys(task.name for task in tasks):
        by_kernels, by_fallback = (
            [done[t.key] for t in tasks if (t.name, t.fallback) == (name, fallback)]
            for fallback in (False, True)
        )
        found[name] = merged(by_kernels)
        if by_fallback:
            found[name]["hashes"] |= merged(by_fallback)["hashes"]
    return found


def processor():
    with open("/proc/cpuinfo") as file:
        lines = [line for line in file if "model name" in line]
    return f"{lines[0].split(':')[1].strip()}, {len(lines)} cores" if lines else platform.machine()


def path_of(part):
    return HERE / "results" / f"{part}.json"


def write(part, own, isas, tasks, done):
    """The result file of a part that is done."""
    result = {
        **own,
        "commit": commit(),
        "date": str(date.today()),
        "processor": processor(),
        "instruction_sets": isas,
        "seed": drawn_seed(),
        "cpu_minutes": round(sum(done[task.key]["cpu_s"] for task in tasks) / 60, 1),
        "rows": rows(tasks, done),
    }
    path_of(part).parent.mkdir(exist_ok=True)
    path_of(part).write_text(json.dumps(result, indent=1) + "\n")
    write_page()


def read(part):
    return json.loads(path_of(part).read_text()) if path_of(part).exists() else None


def state(part):
    """ "current", or why a part is to be run."""
    result = read(part)
    if result is None:
        return "no results"
    others = [name for name, value in identity(part).items() if result[name] != value]
    return f"results of other {', '.join(others)}" if others else "current"


# ---- the page -------------------------------------------------------------------------------------


def many(n):
    """A count that can be read: 4.3e9 is 4.3 billion."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if n >= size:
            return f"{n / size:.3g} {name}"
    return f"{n:,}"


def covered(rows):
    """What the tasks of a part counted, added up."""
    counts = merged([
        {key: value for key, value in row.items() if type(value) is int and key in COUNTED}
        for row in rows
    ])  # fmt: skip
    words = [f"{many(counts[key])} {word}" for key, word in COUNTED.items() if counts.get(key)]
    emulated = sum(row["emulated"]["results"] for row in rows if "emulated" in row)
    return ", ".join([*words, *([f"{many(emulated)} of them emulated"] if emulated else [])])


def page_lines():
    results = {part: read(part) for part in PARTS if path_of(part).exists()}
    if not results:
        yield "No part has results of its own yet."
        return
    yield "| part | covered | commit | date | CPU minutes |"
    yield "|---|---|---|---|---|"
    for part, r in results.items():
        where = f"{r['commit'][:10]}{r['commit'][40:]} | {r['date']} | {r['cpu_minutes']}"
        yield f"| {part} | {covered(list(r['rows'].values()))} | {where} |"
    yield ""
    for what in ("processor", "compiler", "torch"):
        names = dict.fromkeys(r[what] for r in results.values())
        yield f"- {what.capitalize() if what != 'torch' else what}: {'; '.join(names)}."
    isas = dict.fromkeys(isa for r in results.values() for isa in r["instruction_sets"])
    yield f"- Instruction sets: {', '.join(isas)}."


def write_page():
    """Puts the tables between the marks of the page."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert end, f"{PAGE}: expected the marks {BEGIN} and {END} in it"
    PAGE.write_text("\n".join([head + BEGIN, *page_lines(), END + tail]))
