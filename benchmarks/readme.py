"""`python -m benchmarks.readme`: put the table of benchmarks/results/cpu.json into README.md, between its markers."""

import json
from pathlib import Path

from . import plots
from .harness import is_ours

BEGIN, END = "<!-- benchmarks/readme.py: cpu -->", "<!-- end -->"
ROOT = Path(__file__).parent.parent


def table(results: dict) -> str:
    """Median times of every case, how many times faster this package is, where it is not, and whole cycles."""
    origin, rows = results["provenance"], results["rows"]
    ops, cycles = plots.kernels(rows), plots.phases(rows)
    lines = [
        f"{origin['device']}, {origin['threads']} threads, torch {origin['torch']}, commit {origin['commit']}, "
        f"{origin['date']}. Medians of one run, arms in turn; \"against\" is the other arm's time over ours, for the "
        "probe the share of its bandwidth that we reach.",
        "",
        "| case | other arm | its ms | ours, ms | against |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    slower = []
    for case, arms in plots.by_case(ops).items():
        *others, ours = arms
        if not is_ours(ours["arm"]):
            raise ValueError(f"{case}: expected this package's arm last, found {ours['arm']!r}; measure it again")
        for row in others:
            ratio = row["p50_ms"] / ours["p50_ms"]
            lines.append(f"| {case} | {row['arm']} | {row['p50_ms']:.2f} | {ours['p50_ms']:.2f} | {ratio:.2f}x |")
            if ratio < 1.0 and not row["arm"].startswith((plots.PROBE, plots.OURS)):
                slower.append(f"{case} ({ratio:.2f} of {row['arm']})")
    lines += [
        "",
        f"Slower than another arm: {'; '.join(slower) or 'nowhere'}.",
        "",
        "Whole cycles, forward and backward included: median, and 20th to 80th percentile. What is beside forward and "
        "backward (the loss is in them) is timed apart, phase by phase.",
        "",
        "| | arm | ms | p20 to p80 | beside forward and backward |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for cycle, arms in cycles.items():
        for arm, found in arms.items():
            whole = next(r for r in rows if r["case"].startswith(f"{cycle} (") and r["arm"] == arm)
            rest = sum(ms for phase, ms in found.items() if phase not in ("forward", "backward"))
            share = 100 * rest / sum(found.values())
            spread = f"{whole['p20_ms']:.1f} to {whole['p80_ms']:.1f}"
            lines.append(f"| {whole['case']} | {arm} | {whole['p50_ms']:.1f} | {spread} | {rest:.1f} ({share:.0f} %) |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the README's table."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END, 1)
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    readme.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
