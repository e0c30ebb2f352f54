"""What nvcc makes of the CUDA kernels: PTX, registers, cubins. As a program: the table of registers."""

import concurrent.futures
import functools
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# Registers of a multiprocessor, and the threads it holds (CUDA C++ Programming Guide).
REGISTERS = 65536
THREADS = {"sm_75": 1024, "sm_89": 1536, "sm_120": 1536}


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True)


def nvcc_command():
    """nvcc as the build called it, up to the architectures."""
    files = sorted(ROOT.glob("build/*/build.ninja"), key=lambda path: path.stat().st_mtime)
    text = files[-1].read_text().replace("$\n", "") if files else ""
    found = re.search(r"rule nvcc\n\s+command = (.*?)-Xfatbin", text, re.DOTALL)
    return found and re.sub(r"\s+", " ", found[1])


@functools.cache
def ptx():
    """The PTX of all kernels, by the flags of the build."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.ptx"
        source = ROOT / "csrc/cuda/kernels.cu"
        command = f"{nvcc_command()} -arch=compute_75 --ptx {source} -o {file}"
        subprocess.run(command, shell=True, check=True, capture_output=True)
        return file.read_text()


def short(name):
    """quantize_kernel<bf16, float, 0, true> for a mangled name."""
    name = output("c++filt", name).stdout.strip()
    name = re.sub(
        r"\(anonymous namespace\)::|quantkit::|_GLOBAL__N__\w+?::|^void |\(Result\)|\(quantkit::Result\)",
        "",
        name,
    )
    return re.sub(r"\(\w+Args\)$", "", name)


def entries():
    """{name: body} of the PTX's kernels."""
    found = re.findall(r"\.entry (\w+)\(.*?\n\{\n(.*?)\n\}\n", ptx(), re.DOTALL)
    return {short(name): body for name, body in found}


def most_threads():
    """{name: the threads of a block that a kernel is compiled for}."""
    found = re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx())
    return {short(name): int(threads) for name, threads in found}


def ptxas():
    """Of the toolkit that nvcc belongs to: nvcc on PATH may be a wrapper elsewhere."""
    nvcc = nvcc_command().split()[0]
    here = re.search(r"_HERE_=(.*)", output(nvcc, "--dryrun", "-c", "x.cu").stderr)
    return Path(here[1]) / "ptxas"


def compiled(arch):
    """{name: (registers, bytes of stack, bytes spilled)} on one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.ptx"
        file.write_text(ptx())
        command = (ptxas(), "-v", "-O3", f"-arch={arch}", file, "-o", Path(folder) / "x")
        text = output(*command).stderr
    pattern = (
        r"Function properties for (\w+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
    )
    pattern += r"(\d+) bytes spill loads\nptxas info\s+: Used (\d+) registers"
    return {
        short(name): (int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in re.findall(pattern, text)
    }


def on_every_architecture():
    ptx()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHS, pool.map(compiled, ARCHS), strict=True))


def cubins(extension):
    """The architectures of the machine code in a file, and those of its PTX."""
    folders = [Path(sysconfig.get_path("purelib")) / "nvidia"]
    found = [path for folder in folders for path in folder.glob("**/bin/cuobjdump")]
    tool = found[0] if found else shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump: pip install nvidia-cuda-cuobjdump")
    elf, text = (output(tool, flag, extension).stdout for flag in ("-lelf", "-lptx"))
    return re.findall(r"\.(sm_\w+)\.cubin", elf), re.findall(r"\.(sm_\w+)\.ptx", text)


def main():
    made = on_every_architecture()
    families = sorted({name.split("<")[0] for name in made["sm_90"]})
    print("| kernel | " + " | ".join(ARCHS) + " |\n|---" * 1 + "|---" * len(ARCHS) + "|")
    for family in families:
        cells = []
        for arch in ARCHS:
            used = [r for name, (r, _, _) in made[arch].items() if name.split("<")[0] == family]
            block = 512 if family == "rows_kernel" else 256
            fit = REGISTERS // (-(-max(used) // 8) * 8 * block) * block
            limit = THREADS.get(arch, 2048)
            cells.append(f"{min(used)}–{max(used)}, {100 * min(fit, limit) // limit} %")
        print(f"| `{family}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
