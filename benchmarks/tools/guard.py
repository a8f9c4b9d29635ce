"""`make guard`: measure again and say which ratios fell against the committed result.

Times themselves are a machine's affair, and are not compared.

    python -m benchmarks.tools.guard NEW.json OLD.json [--tolerance 0.25] [--again 2]

exits with 1 if a ratio fell, if an arm of this package is gone or failed, or if there was nothing
to compare. A process may be unlucky in its memory and its neighbours, so the cases that fell are
measured again, and have fallen if they do so every time.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from ..harness import failures, is_ours
from ..rows import PROBE, Rows, fractions, kernels, speedups

# of the probe's bandwidth: below it the work computes, and the ratio is the processor's
STREAMING = 0.5


def of_the_same_kind(new: Path, old: Path) -> Path:
    """The committed result of the new one's instruction set (cpu_avx2.json beside cpu.json), or
    ``old`` where there is none.
    """
    isa = json.loads(new.read_text())["provenance"].get("isa")
    other = old.with_name(f"{old.stem}_{str(isa).lower()}.json")
    return other if isa is not None and other.exists() else old


def ratios(rows: Rows) -> dict[tuple[str, str], float]:
    """(case, arm) -> the other's time over ours, or ours against the probe; larger is better."""
    rows = kernels(rows)  # the phases of a whole cycle are too noisy
    found = {
        (case, arm): value for case, arms in speedups(rows).items() for arm, value in arms.items()
    }
    for case, arms in fractions(rows).items():
        found |= {(case, f"probe / {arm}"): value for arm, value in arms.items() if is_ours(arm)}
    return found


def fallen(new: Rows, old: Rows, tolerance: float) -> list[tuple[str, str]]:
    """The (case, arm) of what fell by more than ``tolerance``, a fraction."""
    now, before = ratios(new), ratios(old)
    telling = [
        key
        for key in before
        if key in now and (not key[1].startswith(PROBE) or before[key] >= STREAMING)
    ]
    return [key for key in telling if not now[key] >= before[key] * (1.0 - tolerance)]


def compare(new: Rows, old: Rows, tolerance: float) -> tuple[list[str], list[str]]:
    """What fell by more than ``tolerance`` or is gone; what could not be compared. A line each."""
    now, before = ratios(new), ratios(old)
    fell = [
        f"{case}, against {arm}: {before[case, arm]:.2f} -> {now[case, arm]:.2f}"
        for case, arm in fallen(new, old, tolerance)
    ]
    mine, ran = ({(r["case"], r["arm"]) for r in rows if is_ours(r["arm"])} for rows in (old, new))
    cases = {r["case"] for r in new}
    fell += [f"{case}: {arm} is gone" for case, arm in sorted(mine - ran) if case in cases]
    return fell, [
        f"{case}, against {arm}: only in one of the results"
        for case, arm in before.keys() ^ now.keys()
    ]


def again(cases: set[str], out: Path) -> list[Rows]:
    """The rows of these cases, each from a process of its own."""
    found = []
    for case in sorted(cases):
        print(f"measured again: {case}", flush=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks.run",
            "--no-plots",
            "--only",
            case,
            "--out",
            str(out),
        ]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        rows = json.loads(out.with_suffix(".json").read_text())["rows"]
        found.append([r for r in rows if r["case"] == case])
    return found


def main(arguments: list[str] | None = None) -> int:
    """0 = something was compared, and nothing fell, is gone or failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path)
    parser.add_argument(
        "--tolerance", type=float, default=0.25, help="a ratio may be this fraction lower: noise"
    )
    parser.add_argument(
        "--again", type=int, default=0, help="how often to measure what fell once more"
    )
    chosen = parser.parse_args(arguments)
    committed = of_the_same_kind(chosen.new, chosen.old)
    new, old = (json.loads(path.read_text()) for path in (chosen.new, committed))
    for name, result in (("new", new), ("old", old)):
        print(
            f"{name}: {', '.join(f'{key} {value}' for key, value in result['provenance'].items())}"
        )
    if new["provenance"].get("rehearsal") or old["provenance"].get("rehearsal"):
        print("a rehearsal measures nothing")
        return 1
    for _ in range(chosen.again):
        cases = {case for case, _ in fallen(new["rows"], old["rows"], chosen.tolerance)}
        for rows in again(cases, chosen.new.with_name("again")):
            # this time all of the case is as it was
            if rows and not fallen(rows, old["rows"], chosen.tolerance):
                new["rows"] = [r for r in new["rows"] if r["case"] != rows[0]["case"]] + rows
    fell, alone = compare(new["rows"], old["rows"], chosen.tolerance)
    failed = [f"{m['case']}: {m['arm']}: {m['message']}" for m in failures(new.get("messages", []))]
    for line in sorted(alone):
        print(f"not compared: {line}")
    common = ratios(new["rows"]).keys() & ratios(old["rows"]).keys()
    print(f"{len(common)} of {len(ratios(old['rows']))} ratios compared; fell or failed:")
    print("\n".join(f"  {line}" for line in [*fell, *failed]) or "  none")
    return int(bool(fell) or bool(failed) or not common)


if __name__ == "__main__":
    sys.exit(main())
