"""Compiles every Triton kernel for sm_90 as it would be launched; reads the machine code.

`python -m benchmarks.tools.triton_report`, which needs no GPU: registers, stack, spills, how wide
the loads and stores are, and what ``sass.py`` says of the speed, for the shapes in use. Fails if a
kernel spills, or if one that could move 16 bytes at once does not. ``analysis`` gives the same rows
to other reports.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.tools import sass
from benchmarks.tools.triton_launches import Launch, all_launches

COLUMNS = ["kernel", "for", "dtype", "tile", "warps", "programs", "registers", "stack", "spills"]
COLUMNS += ["ld128", "ld", "st128", "st"]
SPEED = ["instructions_per_element", "mufu_per_element", "issue_load", "blocks", "bytes_in_flight"]
COLUMNS += SPEED
# tensors that a kernel reads, and reads or writes, for each element; others walk over samples, not
# elements
STREAMS = {
    "_adaptive_cross_entropy_fwd_kernel": (1, 1),
    "_adaptive_cross_entropy_long_fwd_kernel": (1, 1),
    "_adaptive_cross_entropy_bwd_kernel": (1, 2),
    "_adaptive_cross_entropy_scale_kernel": (1, 2),
    "_adaptive_mse_fwd_kernel": (2, 2),
    "_adaptive_mse_bwd_kernel": (2, 3),
    "_soft_target_kl_fwd_kernel": (2, 2),
    "_soft_target_kl_long_fwd_kernel": (2, 2),
    "_soft_target_kl_bwd_kernel": (2, 3),
}


def compiled(launch: Launch) -> Any:
    """The kernel for sm_90, every pointer aligned to 16 bytes as torch allocates."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = launch.signature.values()
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.startswith("*")
    }
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, launch.signature, constexprs=launch.constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)


def of_classes(launch: Launch) -> int:
    """How many numbers of each class a kernel reads beside the logits, in fp32."""
    return sum(launch.constants.get(f"CLASS_{n}", False) for n in ("BIAS", "WEIGHTS"))


def compiled_row(launch: Launch) -> dict[str, Any]:
    """One row of the table."""
    from triton import knobs

    made = compiled(launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage, text = (
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, flag, cubin.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    moves = Counter((one.op, one.bytes == 16) for one in sass.read(text))
    summed = launch.constants.get("GRADIENT", False)
    tile = [
        str(launch.constants[n])
        for n in ("ROWS", "DEPTH", "BLOCK", "LANES")
        if n in launch.constants
    ]
    row = {
        "kernel": launch.kernel,
        "for": launch.purpose + (", sum" if summed else ""),
        "dtype": launch.dtype,
        "tile": "x".join(tile),
        "warps": launch.options["num_warps"],
        "programs": launch.programs,
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],
        "spills": sum(n for (op, _), n in moves.items() if op in ("LDL", "STL")),
        "ld128": moves["LDG", True],
        "ld": moves["LDG", False],
        "st128": moves["STG", True],
        "st": moves["STG", False],
        **dict.fromkeys(SPEED, ""),
    }
    if launch.kernel in STREAMS:
        reads, moved = STREAMS[launch.kernel]
        size = getattr(torch, launch.dtype).itemsize
        row |= sass.speed(
            text,
            programs=launch.programs,
            threads=32 * launch.options["num_warps"],
            registers=used["REG"],
            shared=made.metadata.shared,
            elements=launch.elements,
            itemsize=size,
            read_tensors=reads,
            moved_tensors=moved + summed,
            cached_tensors=of_classes(launch) * 4 / size,
        )
    return row


def analysis(launches: list[Launch], workers: int = 1) -> list[dict[str, Any]]:
    """A row for each launch with the keys of COLUMNS; SPEED's are "" for kernels over samples."""
    if workers == 1:
        return [compiled_row(launch) for launch in launches]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compiled_row, launches))


def complaints(launch: Launch, row: dict[str, Any]) -> list[str]:
    found = [
        f"{row['kernel']} ({row['for']}, {row['dtype']}): {row[w]} {w}"
        for w in ("stack", "spills")
        if row[w]
    ]
    size = getattr(torch, row["dtype"]).itemsize
    wide = max(launch.constants.get(name, 1) * size for name in ("ALIGN", "PEEL")) >= 16
    if wide and not row["ld128"]:
        found.append(f"{row['kernel']} ({row['for']}, {row['dtype']}): no 16-byte loads")
    return found


def report(launches: list[Launch], workers: int = 1) -> int:
    """Print the table; returns the number of complaints."""
    start = time.perf_counter()
    rows = analysis(launches, workers)
    table = [COLUMNS, *([str(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
    wrong = [c for launch, row in zip(launches, rows, strict=True) for c in complaints(launch, row)]
    print(
        f"{len(rows)} kernels compiled for sm_90 in {time.perf_counter() - start:.0f} s; none"
        " was run"
    )
    for complaint in wrong:
        print(f"FAILED: {complaint}", file=sys.stderr)
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    try:
        launches = all_launches()
    except ImportError as error:
        print(
            f"Triton cannot be imported ({error}); to get it: pip install triton", file=sys.stderr
        )
        return 1
    return int(report(launches, parser.parse_args().workers) > 0)


if __name__ == "__main__":
    sys.exit(main())
