"""Bookkeeping of measurements: medians are compared, every row says where it comes from."""

import csv
import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Arm:
    """One way of doing a case's work.

    ``check`` runs it and returns what it did, to compare arms before timing.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[], list[torch.Tensor]] | None = None
    tolerance: float = 1e-3  # of the norm of all tensors together; 0 = equal values
    values: Callable[[], list[torch.Tensor]] | None = None  # what ``run`` changes in place


@dataclass
class Case:
    """``arms`` are made one by one, so that one that fails costs only itself; ours is the last."""

    name: str
    arms: Sequence[Callable[[], Arm]]
    bytes: int = 0
    seconds: float = 2.0
    needs: float = 0.0  # seconds, for what cannot be interrupted
    held: Sequence[int] = ()  # bytes that each arm keeps on the device; () = far below any limit
    more: int = 0  # bytes for a comparison of two arms, and for what a run allocates

    def together(self) -> int:
        """Bytes for all arms at once."""
        return sum(self.held) + self.more

    def groups(self, limit: float) -> list[list[int]]:
        """Arms timed in turn: all, or as many rivals as fit ``limit`` bytes beside first and last.

        [] where not even one fits.
        """
        if self.together() <= limit:
            return [list(range(len(self.arms)))]
        found: list[list[int]] = []
        last, room = len(self.arms) - 1, limit - self.more - self.held[0] - self.held[-1]
        # the largest first: fewest groups
        for i in sorted(range(1, last), key=lambda i: -self.held[i]):
            fitting = (group for group in found if sum(self.held[j] for j in (*group, i)) <= room)
            if (group := next(fitting, None)) is not None:
                group.append(i)
            elif self.held[i] > room:
                return []
            else:
                found.append([i])
        return [[0, *sorted(group), last] for group in found]


class Uncounted:
    """Time that is no part of the work: what a backward pass would do in between."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


uncounted = Uncounted()


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
    host_ms: float = 0.0  # median, until the call returns; 0 = the CPU does the work itself
    wall_ms: float = 0.0  # median, until the device is done, with nothing queued before
    launches: int = -1  # kernels and copies on the device; -1 = not counted
    peak_mb: float = -1.0  # what one call allocates at most; -1 = not counted
    of_probe: float = 0.0  # the probe's time over this one; 0 = the case has no probe


def is_ours(arm: str) -> bool:
    return arm.startswith("sfron_fast")


def failures(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Whole cases, and arms of this package; the others may lack what they need."""
    words = ("ours", "in_place", "sfron_fast")
    own = [m for m in messages if m["arm"] == "" or any(word in m["arm"] for word in words)]
    return [m for m in own if not m["message"].startswith(("skipped", "launches not counted"))]


def difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm of ``wanted``, in few launches; NaN stays NaN.

    ``found`` is written over: for the longest lists there is no room for a difference beside both.
    """
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("nan")
    found, wanted = [t.detach().float() for t in found], [t.detach().float() for t in wanted]
    torch._foreach_sub_(found, wanted)
    norms = [
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(ts))).item()
        for ts in (found, wanted)
    ]
    return norms[0] / norms[1] if norms[1] > 0 else norms[0]


def make_row(case: str, arm: str, seconds: list[float], moved: int) -> Row:
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    middle = statistics.median(seconds)
    return Row(
        case, arm, low * 1e3, middle * 1e3, high * 1e3, len(seconds), moved, moved / middle / 1e9
    )


def provenance() -> dict[str, Any]:
    """Machine, versions, commit, threads and date of a measurement."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "device": f"{cpu or platform.processor()}, {os.cpu_count()} logical cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of the machine before: what else was running
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),  # in torch's own allocations
        "isa": torch.backends.cpu.get_cpu_capability(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S"),
    }


def commit() -> str:
    """HEAD, marked if there are changes; without a repository ``$COMMIT`` or a digest."""
    head = _output("git", "rev-parse", "--short", "HEAD")
    if head:
        return head + ("+changes" if _output("git", "status", "--porcelain", "-uno") else "")
    root, sha = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(
        p for folder in ("csrc", "sfron_fast") for p in (root / folder).rglob("*.*")
    ):
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
            sha.update(path.read_bytes())
    return os.environ.get("COMMIT") or f"sources {sha.hexdigest()[:12]}"


def gpu_provenance() -> dict[str, Any]:
    """As ``provenance``, of the current CUDA device; the driver as the driver itself says."""
    try:
        import triton
    except ImportError:
        triton = None
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        **provenance(),
        "gpu": f"{gpu.name}, {gpu.multi_processor_count} processors, {gpu.total_memory >> 20} MiB",
        "driver": (_output(*query).splitlines() or ["?"])[0],
        "cuda": torch.version.cuda or "none",
        "triton": triton.__version__ if triton else "none",
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def write_json(rows: list[Row], origin: dict[str, Any], out: Path, **more: Any) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"provenance": origin, "rows": [asdict(r) for r in rows], **more}
    out.with_suffix(".json").write_text(json.dumps(whole, indent=1))


def write_csv(rows: list[Row], origin: dict[str, Any], out: Path) -> None:
    """The rows of one run, each with where it comes from."""
    if not rows:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *origin], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(r), **origin} for r in rows)


def show(rows: list[Row]) -> str:
    """Aligned table with the speed-up of ours, the last arm of a case, over each other."""
    device = any(r.wall_ms for r in rows)
    more = f" {'host ms':>9} {'wall ms':>9} {'launches':>8}" if device else ""
    wide, name = (max([34, *(len(getattr(r, key)) for r in rows)]) for key in ("case", "arm"))
    lines = [
        f"{'case':{wide}} {'arm':{name}} {'p50 ms':>9} {'p20':>9} {'p80':>9} {'GB/s':>7}"
        f" {'ours is':>8}{more}"
    ]
    for case in dict.fromkeys(r.case for r in rows):
        mine = [r for r in rows if r.case == case]
        ours = mine[-1]
        for r in mine:
            speed = f"{r.p50_ms / ours.p50_ms:7.2f}x" if r is not ours and is_ours(ours.arm) else ""
            rate = f"{r.gb_per_s:7.1f}" if r.bytes else f"{'':7}"
            counted = str(r.launches) if r.launches >= 0 else "?"
            more = f" {r.host_ms:9.3f} {r.wall_ms:9.3f} {counted:>8}" if device else ""
            times = f"{r.p50_ms:9.3f} {r.p20_ms:9.3f} {r.p80_ms:9.3f}"
            lines.append(f"{case:{wide}} {r.arm:{name}} {times} {rate} {speed:>8}{more}")
    return "\n".join(lines)
