"""Compiles every .cu of csrc/ for sm_80, sm_90 and sm_100, without a GPU, and reads the machine code.

`python -m benchmarks.kernels_report`: registers, stack, spills and 128-bit accesses of each kernel. Fails if a kernel
spills or has a stack, or if one that streams over the list does not load (and store) 16 bytes at once. Says so and
succeeds where nvcc is missing.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("csrc/*/*.cu"))
ARCHS = ("80", "90", "100")
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "-Icsrc"]  # as setup.py
SINGLE_BLOCK = ("masked_grad_norm_finish_kernel",)  # a handful of partial sums: nothing to stream
READ_ONLY = ("masked_grad_norm_kernel", "saliency_mask_kernel")  # write scalars or bytes of a mask


@dataclass
class Kernel:
    """What ptxas and the machine code say of one kernel for one architecture."""

    arch: str
    name: str
    registers: int = 0
    stack: int = 0
    spills: int = 0  # bytes stored and loaded
    accesses: dict[str, int] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Why this kernel is not good enough."""
        found = [f"{n} bytes of {what}" for what, n in (("stack", self.stack), ("spills", self.spills)) if n]
        short = self.name.split("<")[0]
        if short not in SINGLE_BLOCK and self.accesses:
            found += ["no 128-bit load"] * (not self.accesses["ld128"])
            found += ["no 128-bit store"] * (not self.accesses["st128"] and short not in READ_ONLY)
        found += [f"{n} accesses to local memory" for n in [self.accesses.get("local", 0)] if n]
        return found


def short_name(demangled: str) -> str:
    """adamw_step_kernel<true, false> from the whole demangled signature."""
    match = re.search(r"(\w+_kernel(?:<[^()]*>)?)\(", demangled)
    return match.group(1) if match else demangled


def demangle(names: list[str]) -> dict[str, str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return dict(zip(names, names, strict=True))
    plain = subprocess.run([tool], input="\n".join(names), text=True, capture_output=True, check=True).stdout
    return {name: short_name(text) for name, text in zip(names, plain.splitlines(), strict=True)}


def find_cuobjdump(nvcc: str) -> str | None:
    """The disassembler: on PATH, beside nvcc, or the one in Triton's package."""
    places = [shutil.which("cuobjdump"), Path(nvcc).resolve().parent / "cuobjdump"]
    if spec := find_spec("triton"):
        places += [Path(folder) / "backends/nvidia/bin/cuobjdump" for folder in spec.submodule_search_locations or ()]
    return next((str(place) for place in places if place and Path(place).exists()), None)


def read_ptxas(text: str) -> list[Kernel]:
    """The report of `-Xptxas -v`, one kernel after the other, with mangled names."""
    kernels = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)\w?'", line):
            kernels.append(Kernel(match.group(2), match.group(1)))
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[-1].stack, kernels[-1].spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(match[1])
    return kernels


def read_sass(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """(arch, mangled name) -> how many global loads and stores there are, how many of 16 bytes, how many local."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    arch, here = "", None
    for line in text.splitlines():
        if match := re.search(r"^\s*arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            here = counts[(arch, match[1])] = dict.fromkeys(("ld128", "ld", "st128", "st", "local"), 0)
        elif here is not None and (match := re.search(r"\b(LDG|LD|STG|ST|LDL|STL)\.?([A-Z0-9.]*) ", line)):
            if match[1] in ("LDL", "STL"):
                here["local"] += 1
            else:
                kind = "ld" if match[1].startswith("LD") else "st"
                here[kind] += 1
                here[f"{kind}128"] += "128" in match[2] or "256" in match[2]
    return counts


def compile_one(nvcc: str, cuobjdump: str | None, source: Path, archs: tuple[str, ...], folder: str) -> list[Kernel]:
    """All kernels of a file, for all architectures."""
    target = f"{folder}/{source.stem}.fatbin"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    made = subprocess.run([nvcc, *FLAGS, *codes, "-Xptxas", "-v", "-fatbin", str(source), "-o", target],
                          cwd=ROOT, text=True, capture_output=True)  # fmt: skip
    if made.returncode:
        raise SystemExit(f"{source} does not compile:\n{made.stderr}")
    kernels = read_ptxas(made.stderr + made.stdout)
    sass = {}
    if cuobjdump:
        dump = subprocess.run([cuobjdump, "-sass", target], text=True, capture_output=True, check=True)
        sass = read_sass(dump.stdout)
    names = demangle([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.accesses = sass.get((kernel.arch, kernel.name), {})
        kernel.name = names[kernel.name]
    return kernels


def table(kernels: list[Kernel]) -> str:
    """As text, a row per kernel and architecture."""
    head = ["kernel", "arch", "registers", "stack", "spills", "ld128", "ld", "st128", "st", ""]
    rows = [head]
    for k in kernels:
        counts = [str(k.accesses.get(column, "?")) for column in head[5:9]]
        numbers = [str(k.registers), str(k.stack), str(k.spills)]
        rows.append([k.name, f"sm_{k.arch}", *numbers, *counts, "; ".join(k.problems())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status says whether every kernel is good enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, help="compute capabilities without the dot")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("sources", nargs="*", type=Path, default=SOURCES, help="default: every .cu of csrc/")
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("kernels_report: skipped, nvcc is not on PATH")
        return 0
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        print("kernels_report: no cuobjdump (install triton to get one), so the widths of the accesses are not checked")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(compile_one, nvcc, cuobjdump, source.resolve(), tuple(options.arch), folder)
                for source in options.sources]  # fmt: skip
        kernels = [kernel for job in jobs for kernel in job.result()]
    kernels.sort(key=lambda k: (k.name, int(k.arch)))
    print(table(kernels))
    bad = sum(bool(kernel.problems()) for kernel in kernels)
    print(f"{len(kernels)} kernels, {bad} with problems; compiled only, nothing ran on a GPU")
    return int(bad > 0 or not kernels)


if __name__ == "__main__":
    sys.exit(main())
