"""Compiles every .cu of csrc/ for sm_80, sm_90 and sm_100, without a GPU; reads the machine code.

`python -m benchmarks.tools.kernels_report`: registers, stack, spills and 128-bit accesses of each
kernel, and for sm_90 what sass.py says of its speed. Fails if a kernel spills or has a stack, or if
one that streams over the list does not load (and store) 16 bytes at once, takes too many
instructions for that, or keeps too few bytes in flight. Says so and succeeds where nvcc is missing.
`make kernels` (kernels_table.py) puts these rows beside those of the Triton kernels.
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
from math import prod
from pathlib import Path

from . import sass
from .sass_loops import Loop, streaming

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/*/*.cu"))
ARCHS = ("80", "90", "100")
TIMED = "90"  # whose processor sass.py knows
# as setup.py
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-ftz=false",
    "-Icsrc",
]
# dtypes are known at run time only: the longest way through their loop is that of single elements,
# which tells nothing of the speed of aligned ones
AT_RUN_TIME = ("adamw_compact_kernel", "sgd_compact_kernel")
READ_ONLY = ("masked_grad_norm_kernel", "saliency_mask_kernel")  # write scalars or bytes of a mask


@dataclass
class Kernel:
    """What ptxas and the machine code say of one kernel for one architecture."""

    arch: str
    name: str
    registers: int = 0
    stack: int = 0
    spills: int = 0  # bytes stored and loaded
    shared: int = 0
    threads: int = 0  # of a block
    accesses: dict[str, int] = field(default_factory=dict)
    # that stream, one for each combination of element types
    loops: list[Loop] = field(default_factory=list)

    @property
    def streams(self) -> bool:
        return bool(self.accesses)

    @property
    def blocks(self) -> int:
        """That one processor holds."""
        return sass.resident(self.threads, self.registers, self.shared)

    @property
    def issue_load(self) -> float:
        return max(loop.issue_load for loop in self.loops)

    @property
    def special_load(self) -> float:
        return max(sass.special_load(loop.special, loop.moved) for loop in self.loops)

    @property
    def flight(self) -> int:
        """Bytes that one processor waits for at a time."""
        return self.blocks * self.threads * min(loop.loaded for loop in self.loops)

    def problems(self) -> list[str]:
        """Why this kernel is not good enough."""
        found = [
            f"{n} bytes of {what}"
            for what, n in (("stack", self.stack), ("spills", self.spills))
            if n
        ]
        if self.streams:
            found += ["no 128-bit load"] * (not self.accesses["ld128"])
            found += ["no 128-bit store"] * (
                not self.accesses["st128"] and self.name.split("<")[0] not in READ_ONLY
            )
            if self.arch == TIMED and self.name.split("<")[0] not in AT_RUN_TIME:
                found += (
                    sass.slow(self.issue_load, self.flight)
                    if self.loops
                    else ["no loop that streams"]
                )
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
    plain = subprocess.run(
        [tool], input="\n".join(names), text=True, capture_output=True, check=True
    ).stdout
    return {name: short_name(text) for name, text in zip(names, plain.splitlines(), strict=True)}


def find_cuobjdump(nvcc: str) -> str | None:
    """The disassembler: on PATH, beside nvcc, or the one in Triton's package."""
    places = [shutil.which("cuobjdump"), Path(nvcc).resolve().parent / "cuobjdump"]
    if spec := find_spec("triton"):
        places += [
            Path(folder) / "backends/nvidia/bin/cuobjdump"
            for folder in spec.submodule_search_locations or ()
        ]
    return next((str(place) for place in places if place and Path(place).exists()), None)


def read_ptxas(text: str) -> list[Kernel]:
    """The report of `-Xptxas -v`, one kernel after the other, with mangled names."""
    kernels = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)\w?'", line):
            kernels.append(Kernel(match.group(2), match.group(1)))
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            kernels[-1].stack, kernels[-1].spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def read_sass(text: str) -> dict[tuple[str, str], list[sass.Instruction]]:
    """(arch, mangled name) -> its machine code."""
    found = {}
    for part in re.split(r"^\s*arch = sm_", text, flags=re.MULTILINE)[1:]:
        for function in part.split("Function : ")[1:]:
            found[re.match(r"\d+", part)[0], function.split(maxsplit=1)[0]] = sass.read(function)
    return found


def count_accesses(code: list[sass.Instruction]) -> dict[str, int]:
    """Loads and stores of global memory: all, those of 16 bytes and more; and local ones."""
    counts = dict.fromkeys(("ld128", "ld", "st128", "st", "local"), 0)
    for one in code:
        counts["local"] += one.op in ("LDL", "STL")
        if one.op in ("LDG", "LD", "STG", "ST"):
            kind = one.op[:2].lower()
            counts[kind] += 1
            counts[f"{kind}128"] += one.bytes >= 16
    return counts


def read_threads(text: str) -> dict[str, int]:
    """Mangled name -> the largest block it may be launched with, from `cuobjdump -elf`."""
    found = {}
    for part in re.split(r"^\.nv\.info\.", text, flags=re.MULTILINE)[1:]:
        if match := re.search(r"EIATTR_MAX_THREADS\s.*\s.*Value:\s+(0x\w+) (0x\w+) (0x\w+)", part):
            found[part.split(maxsplit=1)[0]] = prod(int(n, 16) for n in match.groups())
    return found


def compile_one(
    nvcc: str, cuobjdump: str | None, source: Path, archs: tuple[str, ...], folder: str
) -> list[Kernel]:
    """All kernels of a file, for all architectures."""
    target = f"{folder}/{source.stem}.fatbin"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    made = subprocess.run(
        [nvcc, *FLAGS, *targets, "-Xptxas", "-v", "-fatbin", str(source), "-o", target],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    if made.returncode:
        raise SystemExit(f"{source} does not compile:\n{made.stderr}")
    kernels = read_ptxas(made.stderr + made.stdout)
    codes, threads = {}, {}
    if cuobjdump:
        dumped = (
            subprocess.run(
                [cuobjdump, what, target], text=True, capture_output=True, check=True
            ).stdout
            for what in ("-sass", "-elf")
        )
        codes, threads = read_sass(next(dumped)), read_threads(next(dumped))
    names = demangle([kernel.name for kernel in kernels])
    for kernel in kernels:
        if code := codes.get((kernel.arch, kernel.name)):
            kernel.accesses, kernel.threads = count_accesses(code), threads.get(kernel.name, 1024)
            kernel.loops = streaming(code) if kernel.arch == TIMED else []
        kernel.name = names[kernel.name]
    return kernels


def table(kernels: list[Kernel]) -> str:
    """As text, a row per kernel and architecture."""
    head = [
        "kernel",
        "arch",
        "registers",
        "stack",
        "spills",
        "ld128",
        "ld",
        "st128",
        "st",
        "load",
        "KB",
        "",
    ]
    rows = [head]
    for k in kernels:
        counts = [str(k.accesses.get(column, "?")) for column in head[5:9]]
        numbers = [str(k.registers), str(k.stack), str(k.spills)]
        speed = [f"{k.issue_load:.2f}", f"{k.flight / 1000:.0f}"] if k.loops else ["", ""]
        rows.append([k.name, f"sm_{k.arch}", *numbers, *counts, *speed, "; ".join(k.problems())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def compile_all(nvcc: str, sources: list[Path], archs: tuple[str, ...], jobs: int) -> list[Kernel]:
    """Every kernel of these files by name and architecture; says where no code could be read."""
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        print(
            "kernels_report: no cuobjdump (install triton to get one), so the machine code is not"
            " looked at"
        )
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        made = [
            pool.submit(compile_one, nvcc, cuobjdump, source.resolve(), archs, folder)
            for source in sources
        ]
        kernels = [kernel for job in made for kernel in job.result()]
    return sorted(kernels, key=lambda k: (k.name, int(k.arch)))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status says whether every kernel is good enough."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="+", default=ARCHS, help="compute capabilities without the dot"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "sources", nargs="*", type=Path, default=SOURCES, help="default: every .cu of csrc/"
    )
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("kernels_report: skipped, nvcc is not on PATH")
        return 0
    kernels = compile_all(nvcc, options.sources, tuple(options.arch), options.jobs)
    print(table(kernels))
    bad = sum(bool(kernel.problems()) for kernel in kernels)
    print(f"{len(kernels)} kernels, {bad} with problems; compiled only, nothing ran on a GPU")
    return int(bad > 0 or not kernels)


if __name__ == "__main__":
    sys.exit(main())
