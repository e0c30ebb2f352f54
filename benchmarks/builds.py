"""Builds of the library from revisions or folders of sources, side by side in one process.

Each is built without CUDA in a namespace of its own, so torch.ops.quantkit_<build> has its operators.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import torch

# Before the builds: its library has the same soname, and the loader would take theirs for it.
import quantkit  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("csrc", "quantkit", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILT = (".so", ".partial", ".pyc")
MACRO = "QUANTKIT_NAMESPACE"


def git(*arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def sources(name: str) -> tuple[str, dict[str, bytes]]:
    """What to call them, and every file of the sources that a build needs."""
    folder = Path(name)
    if (folder / "csrc").is_dir():
        paths = [p for part in PARTS for p in (folder / part, *(folder / part).rglob("*"))]
        files = {
            str(p.relative_to(folder)): p.read_bytes()
            for p in paths
            if p.is_file() and p.suffix not in BUILT
        }
        label = name
    else:
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        archive = commit and git("archive", commit.decode().strip(), "--", *PARTS)
        if not archive:
            raise SystemExit(
                f"ab: {name}: expected a git revision of quantkit or a folder with csrc/ in it"
            )
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}
        label = f"{name} ({commit.decode()[:12]})"
    if not any(MACRO.encode() in text for path, text in files.items() if path.startswith("csrc/")):
        raise SystemExit(
            f"ab: {label}: its csrc has no {MACRO}, so its operators cannot be renamed; take the commit "
            "that brought the macro, or a newer one"
        )
    return label, files


def export(files: dict[str, bytes], folder: Path) -> None:
    """Writes what differs: ninja builds no more than that again."""
    for part in ("csrc", "quantkit"):
        for path in (folder / part).rglob("*"):
            stale = path.is_file() and path.suffix not in BUILT
            if stale and str(path.relative_to(folder)) not in files:
                path.unlink()
    for name, text in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)


def namespace(build: str) -> str:
    return f"quantkit_{build}"


def operators_of(build: str):
    return getattr(torch.ops, namespace(build))


def compile_library(folder: Path, build: str, label: str) -> Path:
    environment = os.environ | {
        "FORCE_CPU": "1",
        "FORCE_CUDA": "0",
        "QUANTKIT_BUILD_EMU": "0",
        "CXXFLAGS": f"-D{MACRO}={namespace(build)}",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=folder, env=environment).returncode != 0:
        raise SystemExit(f"ab: {label} does not build; the messages are above")
    return folder / "quantkit" / "libquantkit.so"


def load(library: Path, build: str, operators: Iterable[str]) -> torch.library.Library:
    """torch.ops.<namespace> is there afterwards, and costs what quantkit's own operators cost."""
    torch.ops.load_library(library)
    fragment = torch.library.Library(namespace(build), "FRAGMENT")
    for op in operators:
        if hasattr(operators_of(build), op):
            for name in (op, f"{op}.out"):  # as quantkit/_load.py does
                fragment.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return fragment


def made(
    build: str, label: str, files: dict[str, bytes], operators: Iterable[str]
) -> torch.library.Library:
    """Sources written, compiled and loaded; the operators are there as long as the result is."""
    folder = ROOT / "build" / "ab" / build
    export(files, folder)
    return load(compile_library(folder, build, label), build, operators)
