"""What the tasks of a proof have covered, as a page."""

import hashlib
import platform
import sys
from datetime import date

import sweeps as s
import torch
from work import provenance

import quantkit

SWEEPS = {
    "floats": (
        "every float32",
        f"all 2^32 patterns × {len(s.FLOAT_SETS)} parameter sets: quantize, dequantize of its result, "
        "fake_quantize",
    ),
    "dynamic": (
        "every float32, chosen parameters",
        f"all patterns up to the greatest × {len(s.DYNAMIC_SETS)} sets (symmetric, asymmetric, rows): "
        "dynamic_quantize, quantize_dequantize",
    ),
    "halves": (
        "every half precision number",
        "all 2^16 patterns of float16 and of bfloat16 × {sets} parameter sets × "
        f"{len(s.GRANULARITIES)} granularities ({', '.join(s.GRANULARITIES)}): quantize, dequantize, "
        "fake_quantize",
    ),
    "dynamic_halves": (
        "half precision, chosen parameters",
        "all patterns up to each of 496 maxima of float16 and 510 of bfloat16 × 3 forms (symmetric, "
        "asymmetric, rows of 129): dynamic_quantize, quantize_dequantize",
    ),
    "codes": (
        "every code",
        "all of int8, uint8 and int16 × {scales} scales drawn from each float dtype: dequantize, by row "
        "and by column",
    ),
    "pairs": (
        "pairs of half precision",
        f"every {s.PAIR_STRIDE}th number beside every other, each beside itself, its negative and its "
        f"neighbour; float16 and bfloat16 × {len(s.CHOICES)} schemes: choose_qparams",
    ),
    "extents": (
        "extents of float32",
        f"every significand × {len(s.EXPONENTS)} exponents × {len(s.CHOICES)} schemes (divisions by 127, "
        "254, 255), from 0 on and with a least value half way between codes: choose_qparams",
    ),
}
BEGIN, END = "<!-- begin: written by make proof -->", "<!-- end -->"


def short_hash(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def processor():
    with open("/proc/cpuinfo") as file:
        lines = [line for line in file if "model name" in line]
    return f"{lines[0].split(':')[1].strip()}, {len(lines)} cores" if lines else platform.machine()


def many(n):
    """A count that can be read: 4.3e9 is 4.3 billion."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if n >= size:
            return f"{n / size:.3g} {name}"
    return f"{n:,}"


class Summary:
    """The results of tasks, by part."""

    def __init__(self, tasks, done, sources, commit):
        self.tasks, self.done, self.sources, self.commit = tasks, done, sources, commit

    def results(self, part, function=None, fallback=False):
        return [
            (task, self.done[task.key])
            for task in self.tasks
            if task.part == part
            and task.fallback == fallback
            and (function is None or task.function == function)
            and task.key in self.done
        ]

    def hashes(self, part):
        """A hash of all results of a sweep, for each backend."""
        found = {}
        for _, result in self.results(part):
            for backend, digest in result["hashes"].items():
                found.setdefault(backend, []).append(digest)
        return {backend: short_hash(digests) for backend, digests in found.items()}

    def differences(self):
        """Hashes that should be equal and are not."""
        wrong = []
        for part in SWEEPS:
            kernels, fallback = (self.by_args(part, f) for f in (False, True))
            for args, hashes in kernels.items():
                hashes |= fallback.get(args, {})
                if len(set(hashes.values())) > 1:
                    wrong.append(f"{part}{args}: {hashes}")
        found = {}
        for _, result in self.results("machines", "machine"):
            found.setdefault(result["every"], set()).update(result["hashes"].values())
        wrong += [f"builds differ: {hashes}" for hashes in found.values() if len(hashes) > 1]
        return wrong

    def by_args(self, part, fallback):
        results = self.results(part, fallback=fallback)
        return {task.args: dict(result["hashes"]) for task, result in results}

    def seconds(self, part):
        return sum(
            result["seconds"]
            for fallback in (False, True)
            for _, result in self.results(part, fallback=fallback)
        )

    def text(self):
        return "\n".join(self.lines())

    def lines(self):
        minutes = (
            sum(self.done[task.key]["seconds"] for task in self.tasks if task.key in self.done) / 60
        )
        seed = self.done["seed"]["seed"]
        yield from provenance(self.commit, self.sources)
        python = platform.python_version()
        yield f"- {processor()}; Python {python}, torch {torch.__version__}; {quantkit.backend()}"
        yield f"- {date.today()}, tasks of {minutes:.0f} min in all, some side by side, seed {seed}"
        yield ""
        yield from self.sweep_lines()
        yield from self.machine_lines()
        yield from self.other_lines()

    def sweep_lines(self):
        if any(task.module == "sweeps" and 256 in task.args for task in self.tasks):
            yield "Samples only, not the whole of what is named."
            yield ""
        yield "| sweep | inputs | results on each backend | min | hash of all results | backends |"
        yield "|---|---|---|---|---|---|"
        for part, (title, what) in SWEEPS.items():
            results = [result for _, result in self.results(part)]
            if not results:
                continue
            sets = (
                s.SETS * len({t.args[2] for t, _ in self.results(part)}) if part == "halves" else 0
            )
            batches = len({t.args[2] for t, _ in self.results(part)}) if part == "codes" else 0
            what = what.format(sets=f"{sets:,}", scales=f"{s.SCALES_OF_A_TASK * batches:,}")
            found = self.hashes(part)
            fallback = {b for _, r in self.results(part, fallback=True) for b in r["hashes"]}
            same = ", ".join([*found, *fallback])
            if len(set(found.values())) != 1:
                same = f"DIFFER: {found}"
            inputs, each = (sum(r[name] for r in results) for name in ("inputs", "results"))
            yield (
                f"| **{title}**: {what} | {many(inputs)} | {many(each)} "
                f"| {self.seconds(part) / 60:.1f} | `{next(iter(found.values()))}` | {same} |"
            )
        yield ""
        emulated = {
            part: [result["emulated"] for _, result in self.results(part)] for part in SWEEPS
        }
        yield (
            f"The emulated CUDA kernels (`cuda_emu`) took one call in {s.EMULATED_EVERY} of each task; "
            "their hash is the reference's of the same calls:"
        )
        for part, samples in emulated.items():
            if samples:
                count = many(sum(sample["results"] for sample in samples))
                digest = short_hash(sample["hash"] for sample in samples)
                yield f"{part} {count}, `{digest}`;"
        yield ""

    def machine_lines(self):
        results = self.results("machines", "machine")
        if not results:
            return
        yield (
            "| build of the torch-free driver, or of the extension | compiler | recorded calls run "
            "| callers | between unreadable pages | min | hash | instruction sets |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        for task, result in results:
            every = f" (one in {result['every']})" if result["every"] > 1 else ""
            steps = f" (in steps of {result['step']} from 64 on)" if result["step"] > 1 else ""
            digest = next(iter(result["hashes"].values()))
            yield (
                f"| {task.args[0]} | {result['compiler']} | {many(result['calls'])}{every} "
                f"| {', '.join(result['callers'])} "
                f"| {many(result['guarded']) + steps if result['guarded'] else '–'} "
                f"| {result['seconds'] / 60:.1f} | `{digest}` | {', '.join(result['hashes'])} |"
            )
        yield ""
        yield (
            "Each build of the driver ran every recorded call on each instruction set, on five threads, "
            "once for the callers of each floating-point environment. The emulated kernels recorded "
            "theirs, which a driver ran again. Builds that ran all calls have one hash, those of one in "
            "some another. Minutes here are those of the tasks, which ran side by side."
        )
        yield ""

    def other_lines(self):
        division = [result for _, result in self.results("division", "division")]
        if division:
            total = {
                name: sum(result.get(name, 0) for result in division)
                for name in ("scales", "accepted", "refused_wrong", "pairs")
            }
            yield (
                f"- **division by multiplications**: {total['scales']:,} scales (some of them kept ones, "
                "again in each batch) × every significand "
                f"(some × every float32), {total['accepted']:,} of them without a correction, none "
                f"wrong; the scales refused would have been wrong for {total['refused_wrong']:,} x; "
                f"{many(total['pairs'])} pairs of half precision significands"
            )
        cases = [result for _, result in self.results("generated")]
        if cases:
            count, calls, gave = (sum(r[n] for r in cases) for n in ("cases", "calls", "results"))
            yield (
                f"- **generated cases**: {calls:,} calls of operators with {count:,} sets of arguments "
                f"that hypothesis drew; {gave:,} calls gave results, the others one refusal with the "
                f"reference's words; on {', '.join(quantkit.backend().isas)}"
            )
        for task, result in self.results("tests"):
            sanitized = task.function == "sanitized"
            what = "`make sanitize` with -k " if sanitized else ""
            what += ", ".join(task.args[0])
            how = " under AddressSanitizer and UBSan" if sanitized else ""
            long = f" (QUANTKIT_LARGE=1, {result['isa']})" if task.function == "large" else ""
            yield f"- **tests**{how}: {what}{long}: {result['passed']:,} passed"


def write(path, summary):
    """Puts the summary between the marks of the page."""
    text = path.read_text()
    head, mark, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not mark or not end:
        sys.exit(f"{path}: expected the marks {BEGIN} and {END} in it")
    path.write_text(f"{head}{BEGIN}\n{summary.text()}\n{END}{tail}")
