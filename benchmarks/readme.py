"""`python -m benchmarks.readme` writes the tables of results/cpu.json.

Ten cases into README.md, all into docs/results.md, all arms into benchmarks/results/cpu.md.
"""

import json
from pathlib import Path

from . import rows as select
from .harness import is_ours

BEGIN, END = "<!-- benchmarks/readme.py: cpu -->", "<!-- end -->"
ROOT = Path(__file__).parent.parent


HEADS = [
    (
        "| case | ours, ms | of the probe's bandwidth | against the best other arm | against"
        " the authors' style |"
    ),
    "| --- | ---: | ---: | --- | ---: |",
]


def headline(results: dict) -> str:
    """A line a case: ours, share of the probe's bandwidth, against the best other and authors."""
    rows = results["rows"]
    lines = [
        _origin(results["provenance"]),
        "",
        *HEADS,
        *(_line(*item) for item in _cases(rows).items()),
    ]
    found = select.slower(rows).items()
    slower = [f"{case} ({value:.2f} of {arm})" for (case, arm), value in found]
    lines += ["", f"Slower than another arm: {'; '.join(slower) or 'nowhere'}.", ""]
    return "\n".join([*lines, *_cycles(rows)])


def short(results: dict) -> str:
    """The lines of the README."""
    cases = _cases(results["rows"])
    return "\n".join([*HEADS, *(_line(c, cases[c]) for c in select.HEADLINES if c in cases)])


def _line(case: str, arms: tuple[select.Rows, dict]) -> str:
    others, ours = arms
    times = {row["arm"]: row["p50_ms"] / ours["p50_ms"] for row in others}
    probe = next((t for arm, t in times.items() if arm.startswith(select.PROBE)), None)
    authors = next((t for arm, t in times.items() if arm.startswith("authors")), None)
    rest = {a: t for a, t in times.items() if select.is_rival(a) and not a.startswith("authors")}
    best = min(rest, key=rest.__getitem__, default="")
    cells = [
        f"{ours['p50_ms']:.2f}",
        f"{probe:.2f}" if probe and ours["bytes"] else "",
        f"{rest[best]:.2f}x ({best})" if rest else "",
        f"{authors:.2f}x" if authors else "",
    ]
    return f"| {case} | {' | '.join(cells)} |"


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
    runs = origin.get("runs", 1)
    told = "one run" if runs == 1 else f"{runs} runs"
    return (
        f"{origin['device']}, {origin['threads']} threads, torch {origin['torch']}, commit"
        f" {origin['commit']}, {origin['date']}. Medians of {told}, arms in turn."
    )


def _cases(rows: select.Rows) -> dict[str, tuple[select.Rows, dict]]:
    """Case -> the other arms, and ours."""
    found = {}
    for case, (*others, ours) in select.by_case(select.kernels(rows)).items():
        if not is_ours(ours["arm"]):
            raise ValueError(
                f"{case}: expected this package's arm last, found {ours['arm']!r}; measure it again"
            )
        found[case] = (others, ours)
    return found


def _cycles(rows: select.Rows) -> list[str]:
    lines = [
        (
            "Whole cycles, forward and backward included: median, and 20th to 80th percentile. What"
            " is beside forward and backward (the loss is in them) is timed apart, phase by phase."
        ),
        "",
        "| | arm | ms | p20 to p80 | beside forward and backward |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for cycle, arms in select.phases(rows).items():
        for arm, found in arms.items():
            whole = select.whole(rows, cycle, arm)
            rest = sum(ms for phase, ms in found.items() if phase not in select.MODEL)
            share = 100 * rest / sum(found.values())
            spread = f"{whole['p20_ms']:.1f} to {whole['p80_ms']:.1f}"
            lines.append(
                f"| {whole['case']} | {arm} | {whole['p50_ms']:.1f} | {spread} | {rest:.1f}"
                f" ({share:.0f} %) |"
            )
    return lines


def main() -> None:
    """Rewrite the tables."""
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    for page, tables in (("README.md", short(results)), ("docs/results.md", headline(results))):
        before, rest = (ROOT / page).read_text().split(BEGIN)
        _, after = rest.split(END, 1)
        (ROOT / page).write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")
    (ROOT / "benchmarks/results/cpu.md").write_text(
        f"# Every arm of `make bench`\n\n{table(results)}\n"
    )


if __name__ == "__main__":
    main()
