"""`python -m benchmarks.readme` writes the tables of results/cpu.json.

The cases into docs/results.md, all arms into benchmarks/results/cpu.md.
"""

import json
from pathlib import Path

from . import plots
from .harness import is_ours

BEGIN, END = "<!-- benchmarks/readme.py: cpu -->", "<!-- end -->"
ROOT = Path(__file__).parent.parent


def headline(results: dict) -> str:
    """A line a case: ours, share of the probe's bandwidth, against the best other and authors."""
    lines = [
        _origin(results["provenance"]),
        "",
        (
            "| case | ours, ms | of the probe's bandwidth | against the best other arm | against"
            " the authors' style |"
        ),
        "| --- | ---: | ---: | --- | ---: |",
    ]
    slower = []
    for case, (others, ours) in _cases(results["rows"]).items():
        times = {row["arm"]: row["p50_ms"] / ours["p50_ms"] for row in others}
        probe = next((t for arm, t in times.items() if arm.startswith(plots.PROBE)), None)
        authors = next((t for arm, t in times.items() if arm.startswith("authors")), None)
        rest = {
            a: t
            for a, t in times.items()
            if not (a.startswith((plots.PROBE, "authors")) or is_ours(a))
        }
        best = min(rest, key=rest.__getitem__, default="")
        cells = [
            f"{ours['p50_ms']:.2f}",
            f"{probe:.2f}" if probe and ours["bytes"] else "",
            f"{rest[best]:.2f}x ({best})" if rest else "",
            f"{authors:.2f}x" if authors else "",
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
        slower += [f"{case} ({t:.2f} of {arm})" for arm, t in rest.items() if t < 1.0]
    lines += ["", f"Slower than another arm: {'; '.join(slower) or 'nowhere'}.", ""]
    return "\n".join([*lines, *_cycles(results["rows"])])


def table(results: dict) -> str:
    """Every arm of every case, and whole cycles."""
    lines = [
        _origin(results["provenance"]),
        "",
        "| case | other arm | its ms | ours, ms | its time over ours |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for case, (others, ours) in _cases(results["rows"]).items():
        for row in others:
            ratio = row["p50_ms"] / ours["p50_ms"]
            lines.append(
                f"| {case} | {row['arm']} | {row['p50_ms']:.2f} | {ours['p50_ms']:.2f} |"
                f" {ratio:.2f}x |"
            )
    return "\n".join([*lines, "", *_cycles(results["rows"])])


def _origin(origin: dict) -> str:
    return (
        f"{origin['device']}, {origin['threads']} threads, torch {origin['torch']}, commit"
        f" {origin['commit']}, {origin['date']}. Medians of one run, arms in turn."
    )


def _cases(rows: plots.Rows) -> dict[str, tuple[plots.Rows, dict]]:
    """Case -> the other arms, and ours."""
    found = {}
    for case, (*others, ours) in plots.by_case(plots.kernels(rows)).items():
        if not is_ours(ours["arm"]):
            raise ValueError(
                f"{case}: expected this package's arm last, found {ours['arm']!r}; measure it again"
            )
        found[case] = (others, ours)
    return found


def _cycles(rows: plots.Rows) -> list[str]:
    lines = [
        (
            "Whole cycles, forward and backward included: median, and 20th to 80th percentile. What"
            " is beside forward and backward (the loss is in them) is timed apart, phase by phase."
        ),
        "",
        "| | arm | ms | p20 to p80 | beside forward and backward |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for cycle, arms in plots.phases(rows).items():
        for arm, found in arms.items():
            whole = next(r for r in rows if r["case"].startswith(f"{cycle} (") and r["arm"] == arm)
            rest = sum(ms for phase, ms in found.items() if phase not in plots.MODEL)
            share = 100 * rest / sum(found.values())
            spread = f"{whole['p20_ms']:.1f} to {whole['p80_ms']:.1f}"
            lines.append(
                f"| {whole['case']} | {arm} | {whole['p50_ms']:.1f} | {spread} | {rest:.1f}"
                f" ({share:.0f} %) |"
            )
    return lines


def main() -> None:
    """Rewrite both tables."""
    page = ROOT / "docs/results.md"
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END, 1)
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    page.write_text(f"{before}{BEGIN}\n{headline(results)}\n{END}{after}")
    (ROOT / "benchmarks/results/cpu.md").write_text(
        f"# Every arm of `make bench`\n\n{table(results)}\n"
    )


if __name__ == "__main__":
    main()
