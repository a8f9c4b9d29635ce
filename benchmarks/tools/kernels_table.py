"""`make kernels`: a table of what the machine code of every GPU kernel says, without a GPU.

CUDA C++ (kernels_report.py, for sm_80, sm_90 and sm_100) and Triton (triton_report.py, for sm_90);
sass.py says what issue load and bytes in flight are. Fails if a kernel spills or has a stack, if a
streaming one does not move 16 bytes at once, if its issue load is above 0.8, or if less than 30 KB
are in flight a processor. Writes benchmarks/results/kernels.md unless nvcc or Triton is missing,
and says so.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .. import harness
from . import kernels_report, sass, triton_launches, triton_report

RESULT = Path(__file__).parents[1] / "results/kernels.md"
# bytes of a launch that is judged: four times what must be in flight on the whole card
LEAST_READ = 16_000_000
COLUMNS = (
    "kernel",
    "of",
    "registers",
    "spills",
    "issue load",
    "MUFU load",
    "KB in flight",
    "misses",
)
ABOUT = f"""# Machine code of the GPU kernels

Compiled for sm_90 with {{tools}}, commit {{commit}}. **Nothing was run**; `make kernels` writes
this file.

- issue load: instructions of all threads at the speed of a copy ({sass.COPY / 1e12:g} TB/s), as a
  part of what an H100's schedulers issue ({sass.PROCESSORS} processors x {sass.LANES} lanes x
  {sass.CLOCK / 1e9:g} GHz); should be at most {sass.MOST_LOAD}.
- MUFU load: the same of exponentials, roots and reciprocals, for which there is an eighth of the
  lanes.
- KB in flight: of one processor, resident threads x bytes that each loads before it waits; should
  be at least {sass.LEAST_FLIGHT // 1000}.

CUDA C++ kernels hold a loop for every combination of dtypes; told is the worst, on its longest way.
Of Triton kernels the launches in use are told, and those that read less than
{LEAST_READ // 1_000_000} MB are not judged by load and bytes in flight: they are over before the
card is full. Nor are those with numbers of classes: two more in registers, and six operations more
for each logit, keep most of the launches in bf16 above that load. No numbers: the kernel does not
stream.

"""
Row = dict[str, Any]


def cuda_rows(nvcc: str, workers: int) -> list[Row]:
    """Compiles, prints the report, gives the rows; other architectures' problems too."""
    kernels = kernels_report.compile_all(
        nvcc, kernels_report.SOURCES, kernels_report.ARCHS, workers
    )
    print(kernels_report.table(kernels), flush=True)
    rows: dict[str, Row] = {}
    for kernel in sorted(kernels, key=lambda k: k.arch != kernels_report.TIMED):
        row = rows.setdefault(kernel.name, cuda_row(kernel))
        if kernel.arch != kernels_report.TIMED:
            row["misses"] += [f"sm_{kernel.arch}: {problem}" for problem in kernel.problems()]
    return list(rows.values())


def cuda_row(kernel: kernels_report.Kernel) -> Row:
    row = {
        "kernel": kernel.name,
        "of": "any list",
        "registers": kernel.registers,
        "spills": kernel.spills,
    }
    if kernel.loops:
        row |= {
            "issue load": kernel.issue_load,
            "MUFU load": kernel.special_load,
            "KB in flight": kernel.flight / 1000,
        }
    return {**row, "misses": kernel.problems()}


def triton_rows(workers: int) -> list[Row]:
    """The same of the Triton kernels."""
    launches = triton_launches.all_launches()
    found = triton_report.analysis(launches, workers)
    return [triton_row(launch, row) for launch, row in zip(launches, found, strict=True)]


def triton_row(launch: triton_launches.Launch, found: Row) -> Row:
    complaints = [
        complaint.partition("): ")[2] for complaint in triton_report.complaints(launch, found)
    ]
    row = {
        "kernel": found["kernel"].strip("_"),
        "of": f"{found['for']}, {found['dtype']}",
        "spills": found["spills"],
    }
    row |= {"registers": found["registers"], "misses": complaints}
    if found["issue_load"] == "":
        return row
    row |= {"issue load": found["issue_load"], "MUFU load": found["mufu_load"]}
    row["KB in flight"] = found["bytes_in_flight"] / 1000
    tensors, _ = triton_report.STREAMS[launch.kernel]
    if triton_report.of_classes(launch):
        return row
    if tensors * launch.elements * getattr(torch, launch.dtype).itemsize >= LEAST_READ:
        row["misses"] += sass.slow(found["issue_load"], found["bytes_in_flight"])
    return row


def markdown(rows: list[Row]) -> str:
    """The table, a row a kernel."""
    digits = {"issue load": ".2f", "MUFU load": ".2f", "KB in flight": ".0f"}
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * 5 + " --- |"]
    for row in rows:
        told = {**row, "misses": "; ".join(row["misses"])}
        cells = (format(told[c], digits.get(c, "")) if c in told else "" for c in COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def judge(rows: list[Row]) -> int:
    """Say which kernels miss; the exit status."""
    missing = [row for row in rows if row["misses"]]
    for row in missing:
        print(f"FAILED: {row['kernel']} ({row['of']}): {'; '.join(row['misses'])}")
    print(
        f"{len(rows)} kernels and launches, {len(missing)} miss; compiled only, nothing ran on"
        " a GPU"
    )
    return int(bool(missing) or not rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    nvcc, rows, tools = shutil.which("nvcc"), [], []
    if nvcc is None:
        print("skipped: the CUDA kernels, as nvcc is not on PATH")
    else:
        rows += cuda_rows(nvcc, options.workers)
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        tools.append("nvcc " + re.search(r"release ([\d.]+)", said)[1])
    try:
        import triton
    except ImportError as error:
        print(
            f"skipped: the Triton kernels, as Triton cannot be imported ({error}); to get it: pip"
            " install triton"
        )
    else:
        rows += triton_rows(options.workers)
        tools.append(f"Triton {triton.__version__}")
    if len(tools) == 2:
        about = ABOUT.format(tools=" and ".join(tools), commit=harness.commit())
        options.out.write_text(about + markdown(rows))
    else:
        print(f"{options.out} is left as it was")
    return judge(rows) if tools else 0


if __name__ == "__main__":
    sys.exit(main())
