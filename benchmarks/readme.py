"""`python -m benchmarks.readme`: put the table of benchmarks/results/cpu.json into README.md, between its markers."""

import json
from pathlib import Path

BEGIN, END = "<!-- benchmarks/readme.py: cpu -->", "<!-- end -->"
ROOT = Path(__file__).parent.parent


def table(results: dict) -> str:
    """Median times of every case, and how many times faster this package is than each other arm."""
    origin, rows = results["provenance"], results["rows"]
    lines = [
        f"{origin['device']}, {origin['threads']} threads, torch {origin['torch']}, commit {origin['commit']}, "
        f"{origin['date']}. Medians of one run, arms in turn; \"against\" is the other arm's time over ours.",
        "",
        "| case | other arm | its ms | ours, ms | against |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        *others, ours = [row for row in rows if row["case"] == case]
        for row in others:
            ratio = row["p50_ms"] / ours["p50_ms"]
            lines.append(f"| {case} | {row['arm']} | {row['p50_ms']:.1f} | {ours['p50_ms']:.1f} | {ratio:.2f}x |")
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
