"""Timing and bookkeeping: arms of a case alternate, medians are compared, every row says where it comes from."""

import csv
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Arm:
    """One way of doing a case's work. ``check`` returns what the work left behind, to compare arms before timing."""

    name: str
    run: Callable[[], Any]
    check: Callable[[], list[torch.Tensor]] | None = None


@dataclass
class Row:
    case: str
    arm: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    repetitions: int
    bytes: int  # the least the work must move; 0 = not a streaming case
    gb_per_s: float


def time_case(case: str, arms: list[Arm], moved: int = 0, seconds: float = 8.0, most: int = 200) -> list[Row]:
    """Check that the arms agree, then run them in turn for about ``seconds``, at least 7 times each."""
    _agree(case, arms)
    for arm in arms:
        arm.run()
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    began, rounds = time.perf_counter(), 0
    while rounds < 7 or (time.perf_counter() - began < seconds and rounds < most):
        for arm in arms if rounds % 2 == 0 else arms[::-1]:  # both orders: nobody always runs on a warm cache
            start = time.perf_counter()
            arm.run()
            times[arm.name].append(time.perf_counter() - start)
        rounds += 1
    return [_row(case, name, seconds_, moved) for name, seconds_ in times.items()]


def _agree(case: str, arms: list[Arm]) -> None:
    results = {arm.name: arm.check() for arm in arms if arm.check is not None}
    names = list(results)
    for name in names[1:]:
        for i, (a, b) in enumerate(zip(results[names[0]], results[name], strict=True)):
            if not torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6):
                raise AssertionError(f"{case}: {name} and {names[0]} disagree in tensor {i}; nothing was timed")


def _row(case: str, arm: str, seconds: list[float], moved: int) -> Row:
    low, *_, high = statistics.quantiles(seconds, n=5)
    middle = statistics.median(seconds)
    return Row(case, arm, low * 1e3, middle * 1e3, high * 1e3, len(seconds), moved, moved / middle / 1e9)


def provenance() -> dict[str, Any]:
    """Machine, versions, commit, threads and date of a measurement."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return {
        "device": f"{cpu or platform.processor()}, {os.cpu_count()} logical cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def save(rows: list[Row], out: Path) -> None:
    """Write ``<out>.json`` (this run) and append to ``<out>.csv`` (every run)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    origin = provenance()
    out.with_suffix(".json").write_text(json.dumps({"provenance": origin, "rows": [asdict(r) for r in rows]}, indent=1))
    table = out.with_suffix(".csv")
    fresh = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *origin])
        if fresh:
            writer.writeheader()
        writer.writerows({**asdict(r), **origin} for r in rows)


def show(rows: list[Row]) -> str:
    """Aligned table: the last arm of a case is ours; speed-up of it over each other arm."""
    lines = [f"{'case':34} {'arm':34} {'p50 ms':>9} {'p20':>9} {'p80':>9} {'GB/s':>7} {'ours is':>8}"]
    for case in dict.fromkeys(r.case for r in rows):
        mine = [r for r in rows if r.case == case]
        ours = mine[-1]
        for r in mine:
            speed = f"{r.p50_ms / ours.p50_ms:7.2f}x" if r is not ours else ""
            rate = f"{r.gb_per_s:7.1f}" if r.bytes else f"{'':7}"
            lines.append(f"{case:34} {r.arm:34} {r.p50_ms:9.3f} {r.p20_ms:9.3f} {r.p80_ms:9.3f} {rate} {speed:>8}")
    return "\n".join(lines)
