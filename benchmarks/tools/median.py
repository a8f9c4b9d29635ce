"""`python -m benchmarks.tools.median RUN.json RUN.json ... --out OUT`: one result of several.

A process may be lucky or unlucky in its memory and its neighbours for as long as it lives, so a
case near 1 wants several. Each figure is the median over the runs that have the row; ``runs`` in
the provenance is how many the most measured have. The runs must be of one commit, machine and
number of threads; the load told is the largest.
"""

import argparse
import json
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..harness import Row, write_csv, write_json

SAME = ("device", "torch", "python", "threads", "huge_pages", "isa", "commit")
FIGURES = [f.name for f in fields(Row) if f.type is float]


def median(runs: list[dict[str, Any]]) -> tuple[list[Row], dict[str, Any], list[dict[str, str]]]:
    """Rows, where they come from, and what any run has noted.

    Raises:
        ValueError: the runs are not of one kind.
    """
    for name in SAME:
        found = sorted({str(run["provenance"].get(name)) for run in runs})
        if len(found) > 1:
            raise ValueError(f"runs: expected one {name}, found {', '.join(found)}")
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for row in run["rows"]:
            rows.setdefault((row["case"], row["arm"]), []).append(row)
    middle = []
    for same in rows.values():
        figures = {name: statistics.median(row[name] for row in same) for name in FIGURES}
        middle.append(Row(**{**same[0], **figures}))
    origin = runs[-1]["provenance"] | {
        "load": max(run["provenance"]["load"] for run in runs),
        "runs": max(map(len, rows.values())),
    }
    had = {row.case for row in middle}
    notes = {tuple(m.values()): m for run in runs for m in run["messages"]}
    # what one run had no time for another may have
    told = [m for m in notes.values() if m["arm"] or m["case"] not in had]
    return middle, origin, told


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", 1)[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.csv")
    chosen = parser.parse_args(arguments)
    try:
        rows, origin, notes = median([json.loads(path.read_text()) for path in chosen.runs])
    except ValueError as error:
        parser.error(str(error))
    write_csv(rows, origin, chosen.out)
    write_json(rows, origin, chosen.out, messages=notes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
