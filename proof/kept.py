"""Compares the short form with the hashes that contract 1 gave for the same inputs (proof/short.json).

A key tells the inputs in words, with no name of the code's files or structs: the code may change, the
hash of a key may not. Inputs that are drawn anew in each run have no key.
"""

import json
from dataclasses import dataclass

import sweeps as s
from work import ROOT

FILE = ROOT / "proof" / "short.json"


def choice_words(choice):
    q_min, q_max, symmetric, include_zero = s.CHOICES[choice]
    kind = "symmetric" if symmetric else "asymmetric"
    return f"{kind} in [{q_min}, {q_max}]{' with 0' if include_zero else ''}"


def slice_words(index, every):
    return f"slice {index} of {s.FLOAT_SLICES}, one chunk in {every}"


def floats_words(which, index, every):
    scale, zero_point, q_min, q_max, code, _ = s.FLOAT_SETS[which]
    code = str(code).removeprefix("torch.")
    parameters = f"scale {scale}, zero point {zero_point}, {code} in [{q_min}, {q_max}]"
    return f"{parameters}, {slice_words(index, every)}"


def dynamic_words(which, index, every):
    most, row, symmetric = s.DYNAMIC_SETS[which]
    given = f"scale {most}" if isinstance(most, str) else f"greatest {most}"
    kind = "symmetric" if symmetric else "asymmetric"
    return f"{given}, rows of {row}, {kind}, {slice_words(index, every)}"


def format_words(which):
    name, scale, zero_point, round_first, _ = s.FORMAT_SETS[which]
    first = ", rounded first" if round_first else ""
    return f"{name}, scale {scale}, zero point {zero_point}{first}, corners and strides of float32"


def scale_words(which):
    name, rule, dtype, global_scale = s.SCALE_SETS[which]
    dtype = str(dtype).removeprefix("torch.")
    return f"{name}, scales by rule {rule} in {dtype}, global scale {global_scale}"


WORDS = {
    "floats": floats_words,
    "dynamic": dynamic_words,
    "halves": lambda dtype, granularity, batch: f"{dtype}, {granularity}, sets {batch}",
    "dynamic_halves": lambda dtype, batch: f"{dtype}, maxima {batch}",
    "codes": lambda code, dtype, batch: f"{code}, scales of {dtype}, sets {batch}",
    "pairs": lambda dtype, choice, begin, end: (
        f"{dtype}, {choice_words(choice)}, numbers {begin} to {end - 1}, one in {s.PAIR_STRIDE}"
    ),
    "format_samples": format_words,
    "format_draws": format_words,
    "format_sums": format_words,
    "format_scales": scale_words,
    "format_codes": lambda name, batch: f"{name}, scales of float32, sets {batch}",
    "format_chosen": lambda name: f"{name}, parameters chosen from half precision and float32",
    "extents": lambda choice, exponent, part, parts: (
        f"{choice_words(choice)}, exponent {s.EXPONENTS[exponent]}, part {part} of {parts}"
    ),
}


@dataclass(frozen=True)
class Found:
    """One backend's hash."""

    key: str
    drawn: str | None  # a hash of the parameters, where another machine may draw others
    backend: str
    hash: str


def found(tasks, done):
    """The hashes of the tasks that are done."""
    for task in tasks:
        result = done.get(task.key)
        if result is None:
            continue
        if task.module == "sweeps":
            key = f"{task.name}: {WORDS[task.name](*task.args)}"
            for backend, digest in result["hashes"].items():
                yield Found(key, result["drawn"], backend, digest)
        elif task.function == "record":
            yield Found("recorded: results of operators", None, "cuda_emu", result["results"])
        elif task.function == "machine":
            some = f", one call in {result['every']}" if result["every"] > 1 else ""
            for isa, digest in result["hashes"].items():
                backend = f"{isa} of {task.args[0]}"
                yield Found(
                    f"recorded: memory that kernels wrote, sums too{some}", None, backend, digest
                )


def read():
    return json.loads(FILE.read_text())["hashes"]


def compare(given, kept, whole):
    """What differs, and what could not be compared; whole: whether every key should be there."""
    wrong, notes = [], set()
    for one in given:
        entry = kept.get(one.key)
        if entry is None:
            continue
        if one.drawn != entry["drawn"]:
            notes.add(f"{one.key}: not compared, this machine's torch draws other parameters")
        elif one.hash != entry["hash"]:
            wrong.append(f"{one.key}: {one.backend} gave {one.hash}, contract 1 {entry['hash']}")
    if whole:
        missing = kept.keys() - {one.key for one in given}
        wrong += [f"{key}: in {FILE.name}, but not run" for key in sorted(missing)]
    return wrong, sorted(notes)


def added(given, kept):
    """`kept` with the keys and backends of a run that does not differ."""
    kept = {key: dict(entry) for key, entry in kept.items()}
    for one in given:
        new = {"hash": one.hash, "drawn": one.drawn, "backends": []}
        entry = kept.setdefault(one.key, new)
        if (entry["drawn"], entry["hash"]) == (one.drawn, one.hash):
            entry["backends"] = sorted({*entry["backends"], one.backend})
    return kept


def write(kept):
    """One key a line."""
    lines = (f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in kept.items())
    FILE.write_text('{"contract": 1, "hashes": {\n' + ",\n".join(lines) + "\n}}\n")
