"""Every torch that quantkit supports, one after the other: python tools/matrix.py WHEELS [--only 2.11.0].

Each gets an environment of its own, the wheel for its Python, and the quick tests. The library is also
compiled against its headers; what newer headers made runs in it too, as that breaks first.
An environment of a CUDA torch takes 8 GB, and the next one waits until it is removed. They share the
wheels of NVIDIA's libraries. The table goes into docs/installation.md; rows that did not run again stay.
"""

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

from requirements import requirements
from rich.console import Console
from rich.table import Table
from wheels import ROOT, copy_tests, pythons

# The newest first: what it compiles runs in every older one. Every Python appears.
MATRIX = {
    "2.15.0": "3.13",
    "2.14.1": "3.12",
    "2.13.0": "3.11",
    "2.12.1": "3.13",
    "2.11.0": "3.12",
    "2.10.0": "3.10",
}
TESTS = (
    "operators",
    "errors",
    "reference",
    "kernels",
    "out",
    "autograd",
    "compile",
    "private_names",
)
FEW_KERNELS = "not test_kernels or (float32 and not avx512)"
COPIED = ("csrc", "quantkit", "setup.py", "pyproject.toml", "README.md", "LICENSE")
WORK = ROOT / "build" / "matrix"
ROWS = WORK / "rows.json"
PAGE = ROOT / "docs" / "installation.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"

FIRST_BITS = """
import json, sys, torch, quantkit
from quantkit import reference
backend = quantkit.backend()
assert backend.extension, backend
names = ("quantize_dequant", "dynamic_quantize", "get_symmetric_qparams")
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    x = torch.randn(96, 1024).to(dtype)
    for per_channel in (False, True):
        q, x_hat, p = quantkit.quantize_dequant(x, per_channel, sym=False)
        right = reference.quantize_dequant(x, per_channel, sym=False)
        assert torch.equal(q, right[0]) and torch.equal(x_hat, right[1])
        assert torch.equal(p.scale, right[2].scale)
        assert torch.equal(quantkit.fake_quantize(x, p), reference.fake_quantize(x, p))
        out = torch.empty_like(q)
        limits = (-128, 127, torch.int8)
        torch.ops.quantkit.quantize.out(x, p.scale, p.zero_point, *limits, out=out)
        assert torch.equal(out, q)
print(json.dumps([torch.__version__, backend.isa, sys.version.split()[0]]))
"""

console = Console()


class Failed(Exception):
    """One line that a row of the table shows."""


def run(*command, what, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        text = f"{done.stdout}\n{done.stderr}".strip()
        console.print(text[-4000:], markup=False, highlight=False)
        raise Failed(f"{what}: {text.splitlines()[-1] if text else done.returncode}")
    return done.stdout


class Environment:
    """One torch in its Python."""

    def __init__(self, version, python):
        self.version, self.folder = version, WORK / "environment"
        shutil.rmtree(self.folder, ignore_errors=True)
        run(python, "-m", "venv", self.folder, what="venv")
        self.python = self.folder / "bin" / "python"
        no_limits = WORK / "no-constraints"  # ours alone decide which torch it is
        no_limits.touch()
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("QUANTKIT_", "PYTHON"))}
        self.variables = ours | {
            "PIP_CONSTRAINT": str(no_limits),
            "PIP_NO_CACHE_DIR": "1",
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
        }

    def run(self, *arguments, what, cwd=WORK, **variables):
        environment = self.variables | variables
        return run(self.python, *arguments, what=what, cwd=cwd, env=environment)

    def pip(self, *arguments, what):
        return self.run("-m", "pip", "--quiet", *arguments, what=what)

    def install_torch(self):
        """From a folder of wheels that keeps what the next torch may need as well."""
        house, report = WORK / "wheelhouse", WORK / "report.json"
        torch = f"torch=={self.version}"
        self.pip("download", torch, "--dest", house, what="download")
        local = ("install", torch, "--no-index", "--find-links", house)
        self.pip(*local, "--dry-run", "--report", report, what="resolve")
        installs = json.loads(report.read_text())["install"]
        needed = {each["download_info"]["url"].rsplit("/", 1)[1] for each in installs}
        for wheel in house.iterdir():
            if wheel.name.replace("+", "%2B") not in needed and wheel.name not in needed:
                wheel.unlink()
        self.pip(*local, "--no-compile", what="install")
        for wheel in house.glob("torch-*"):
            wheel.unlink()

    def install(self, *packages):
        """Beside torch, which no package of ours may change."""
        self.pip("install", *packages, what="install")
        version = self.torch("__version__")
        if version.split("+")[0] != self.version:
            raise Failed(f"installing quantkit changed torch to {version}")

    def torch(self, name):
        return self.run("-c", f"import torch; print(torch.{name})", what="import torch").strip()

    def test(self):
        """{"passed": n, "failed": n, "skipped": n} of the quick tests, on the wheel alone."""
        place, report = WORK / "tests-of-the-wheel", WORK / "tests.xml"
        shutil.rmtree(place, ignore_errors=True)
        copy_tests(place)
        files = [f"tests/test_{name}.py" for name in TESTS]
        options = ("--quiet", "-k", FEW_KERNELS, "--full", "--junitxml", report)
        report.unlink(missing_ok=True)
        try:
            self.run(
                "-m", "pytest", *options, *files, what="pytest", cwd=place,
                QUANTKIT_REQUIRE_EXTENSION="1",
            )  # fmt: skip
        except Failed:
            if not report.exists():
                raise
        suite = ElementTree.parse(report).getroot().find("testsuite").attrib
        counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
        failed = counts["failures"] + counts["errors"]
        passed = counts["tests"] - failed - counts["skipped"]
        return {"passed": passed, "failed": failed, "skipped": counts["skipped"]}

    def compile(self):
        """The library made of this torch's headers; the kernels' objects are shared between torches."""
        source = WORK / "source"
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            options = {"dirs_exist_ok": True} if (ROOT / name).is_dir() else {}
            copy(ROOT / name, source / name, **options)
        for old in source.glob("quantkit/*.so"):
            old.unlink()
        build = ("setup.py", "--quiet", "build_ext", "--inplace")
        self.run(*build, what="compile", cwd=source, FORCE_CPU="1")
        library = WORK / "libraries" / f"{self.version}.so"
        library.parent.mkdir(exist_ok=True)
        shutil.copy(source / "quantkit" / "libquantkit.so", library)

    def runs(self, library):
        """Whether the wheel with another torch's library returns the reference's bits."""
        where = "import quantkit; print(quantkit.__path__[0])"
        package = self.run("-c", where, what="import quantkit").strip()
        place = WORK / "exchanged"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(package, place / "quantkit")
        shutil.copy(library, place / "quantkit" / "libquantkit.so")
        self.run("-c", FIRST_BITS, what=f"library of {library.stem}", PYTHONPATH=str(place))


def row(version, python, wheel):
    """What the table says of one torch."""
    begin = time.monotonic()
    found = {"python": python, "torch": version, "date": datetime.date.today().isoformat()}
    try:
        environment = Environment(version, pythons()[python])
        environment.install_torch()
        needed = ("pytest", "hypothesis", "numpy", "safetensors")
        environment.install(wheel, *needed, *requirements("build"))
        found["build"] = environment.torch("version.cuda")
        found["torch"], found["isa"], found["python"] = json.loads(
            environment.run("-c", FIRST_BITS, what="first bits")
        )
        console.print(f"{found['torch']}: installed, first bits, {time.monotonic() - begin:.0f} s")
        found |= environment.test()
        environment.compile()
        newest_first = sorted((WORK / "libraries").iterdir(), key=number, reverse=True)
        libraries = [path for path in newest_first if number(path) >= number(Path(version + ".so"))]
        for library in libraries:
            environment.runs(library)
        found["libraries"] = [".".join(path.stem.split(".")[:2]) for path in libraries]
    except Failed as failure:
        found["failure"] = str(failure)
    found["seconds"] = round(time.monotonic() - begin)
    return found


def number(library):
    return tuple(map(int, library.stem.split(".")))


def cells(r):
    cuda = r.get("build", "None")
    tests = f"{r['passed']} passed" if "passed" in r else ""
    tests += f", {r['failed']} failed" if r.get("failed") else ""
    return (
        r["torch"].split("+")[0],
        "CPU" if cuda == "None" else f"CUDA {cuda}",
        r["python"],
        r.get("failure") or tests,
        ", ".join(r.get("libraries", [])),
        r["date"],
    )


HEAD = ("torch", "its build", "Python", "quick tests", "runs a library compiled against", "date")


def library_of(wheel):
    with zipfile.ZipFile(wheel) as file:
        return hashlib.sha256(file.read("quantkit/libquantkit.so")).hexdigest()


def markdown(rows, digest):
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nEvery row has the same `libquantkit.so` (SHA-256 `{digest[:16]}`).\n"


def write(text):
    marked = re.escape(BEGIN) + ".*" + re.escape(END)
    page = re.sub(marked, lambda _: f"{BEGIN}\n{text}{END}", PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheels", type=Path, help="the folder that `make wheels` fills")
    parser.add_argument(
        "--only", nargs="+", choices=MATRIX, default=list(MATRIX), metavar="VERSION"
    )
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    wheels = {p: next(args.wheels.glob(f"*-cp{p.replace('.', '')}-*.whl"), None) for p in pythons()}
    if missing := {MATRIX[v] for v in args.only} - {p for p, wheel in wheels.items() if wheel}:
        sys.exit(f"{args.wheels} has no wheel for Python {', '.join(missing)}; first: make wheels")
    digests = {library_of(wheel) for wheel in wheels.values() if wheel}
    if len(digests) != 1:
        sys.exit(f"the wheels in {args.wheels} have different libraries; first: make wheels")
    (digest,) = digests

    kept = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    rows = {v: r for v, r in kept.items() if r["library"] == digest and v not in args.only}
    for version in args.only:
        python = MATRIX[version]
        console.print(f"torch {version} in Python {python}")
        rows[version] = row(version, python, wheels[python].resolve()) | {"library": digest}
        ROWS.write_text(json.dumps(rows, indent=1))
        console.print(*cells(rows[version]), f"{rows[version]['seconds']} s", sep=" | ")
    shutil.rmtree(WORK / "environment", ignore_errors=True)
    shutil.rmtree(WORK / "wheelhouse", ignore_errors=True)

    ordered = [rows[version] for version in reversed(MATRIX) if version in rows]
    table = Table(*HEAD)
    for r in ordered:
        table.add_row(*cells(r))
    console.print(table)
    write(markdown(ordered, digest))
    sys.exit(any(r.get("failure") or r["failed"] for r in ordered))


if __name__ == "__main__":
    main()
