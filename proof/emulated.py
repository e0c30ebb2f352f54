"""The emulated CUDA kernels, and the operators in front of them, by a second compiler."""

import os
import re
import shutil
import sys

from machines import FOLDER, ROOT, calls_file, compile_driver, numbers, run
from work import copy_sources


def machine(name, compiler, short):
    """An extension by another compiler records the same calls; a driver says whether they are.

    Each recorded call is compared with the reference too.
    """
    copy = FOLDER / re.sub(r"\W+", "_", name)
    shutil.rmtree(copy, ignore_errors=True)
    copy_sources(copy)
    build = ("setup.py", "--quiet", "build_ext", "--inplace")
    chosen = {"CXX": compiler, "FORCE_CPU": "1", "QUANTKIT_BUILD_EMU": "1"}
    run("env", "-C", copy, sys.executable, *build, **chosen)
    library = (copy / "quantkit" / "libquantkit.so").read_bytes()
    assert compiler.strip("+").encode() + b" version" in library, f"{compiler} did not compile it"
    run(
        sys.executable,
        "-c",
        f"import machines; machines.record({short})",
        PYTHONPATH=os.pathsep.join(map(str, (copy / "proof", copy))),
    )
    calls = copy / calls_file(short).relative_to(ROOT)
    text = run(compile_driver("g++ -O3"), "cases", calls, "isa=baseline", "threads=2", "every=1")
    calls.unlink()
    return {
        "every": 1,
        "calls": numbers(text)["calls"],
        "guarded": 0,
        "step": 0,
        "callers": ["usual"],
        "hashes": {"cuda_emu": re.search(r"hash (\w+)", text)[1]},
        "compiler": run(compiler, "--version").splitlines()[0],
    }
