"""`python -m benchmarks.readme`: put the table of benchmarks/results/cpu.json into README.md, between its markers."""

import json
from pathlib import Path

from . import plots

BEGIN, END = "<!-- benchmarks/readme.py: cpu -->", "<!-- end -->"
ROOT = Path(__file__).parent.parent


def table(results: dict) -> str:
    """Median times of every case, how many times faster this package is, and what that is worth in a whole cycle."""
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
    for case, arms in plots.by_case(ops).items():
        *others, ours = arms
        for row in others:
            ratio = row["p50_ms"] / ours["p50_ms"]
            lines.append(f"| {case} | {row['arm']} | {row['p50_ms']:.2f} | {ours['p50_ms']:.2f} | {ratio:.2f}x |")
    lines += ["", "Whole cycles, forward and backward included:", "",
              "| | arm | ms | of it beside forward and backward |", "| --- | --- | ---: | ---: |"]  # fmt: skip
    for cycle, arms in cycles.items():
        for arm, found in arms.items():
            size = next(r["case"] for r in rows if r["case"].startswith(f"{cycle} ("))
            rest = sum(ms for phase, ms in found.items() if phase not in ("forward", "backward"))
            whole = sum(found.values())
            lines.append(f"| {size} | {arm} | {whole:.1f} | {rest:.1f} ({100 * rest / whole:.0f} %) |")
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
