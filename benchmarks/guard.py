"""`make guard`: measure again and say which ratios fell against the committed result. Times are a machine's affair.

`python -m benchmarks.guard NEW.json OLD.json [--tolerance 0.15]` compares two results and exits with 1 if a ratio fell,
if an arm of this package is gone or failed, or if there was nothing to compare.
"""

import argparse
import json
import sys
from pathlib import Path

from .harness import failures, is_ours
from .plots import Rows, fractions, kernels, speedups


def ratios(rows: Rows) -> dict[tuple[str, str], float]:
    """(case, arm) -> the other arm's time over ours, or ours against the probe; larger is better for us."""
    rows = kernels(rows)  # the phases of a whole cycle are too noisy
    found = {(case, arm): value for case, arms in speedups(rows).items() for arm, value in arms.items()}
    for case, arms in fractions(rows).items():
        found |= {(case, f"probe / {arm}"): value for arm, value in arms.items() if is_ours(arm)}
    return found


def compare(new: Rows, old: Rows, tolerance: float) -> tuple[list[str], list[str]]:
    """(what fell by more than ``tolerance``, a fraction, or is gone; what could not be compared), a line each."""
    now, before = ratios(new), ratios(old)
    fell = [
        f"{case}, against {arm}: {before[case, arm]:.2f} -> {now[case, arm]:.2f}"
        for case, arm in before
        if (case, arm) in now and not now[case, arm] >= before[case, arm] * (1.0 - tolerance)
    ]
    mine, ran = ({(r["case"], r["arm"]) for r in rows if is_ours(r["arm"])} for rows in (old, new))
    cases = {r["case"] for r in new}
    fell += [f"{case}: {arm} is gone" for case, arm in sorted(mine - ran) if case in cases]
    return fell, [f"{case}, against {arm}: only in one of the results" for case, arm in before.keys() ^ now.keys()]


def main(arguments: list[str] | None = None) -> int:
    """0 = something was compared, and nothing fell, is gone or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.15, help="a ratio may be this fraction lower: noise")
    chosen = parser.parse_args(arguments)
    new, old = (json.loads(path.read_text()) for path in (chosen.new, chosen.old))
    for name, result in (("new", new), ("old", old)):
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in result['provenance'].items())}")
    if new["provenance"].get("rehearsal") or old["provenance"].get("rehearsal"):
        print("a rehearsal measures nothing")
        return 1
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
