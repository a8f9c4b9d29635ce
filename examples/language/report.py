"""The tables, verdicts and pictures of ``compare``'s results; run it from the project's root:

    python -m examples.language.report [--results FOLDER] [--pairs 1 2]

Writes ``README.md``, ``gap.png`` and ``trade.png`` beside the JSON.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.systems.markdown import table

from . import gates
from .arms import BUDGETS, CHOICES
from .compare import RESULTS
from .gates import Rows, excess, verdict

COLUMNS = {
    "gap": 3, "D": 2, "p value": 3, "p forget": 3, "ES": 2, "EM": 2, "ROUGE": 2, "AUC": 2,
    "privleak": 0, "utility": 3, "p retain": 3, "relearnt": 3, "int8": 3, "int4": 3, "seconds": 0,
}  # fmt: skip
PARTS = ("no mask", "random mask", "no adaptive weight", "no ceiling", "slow rate .5")
HEAD = """# A language model forgets ten authors: the comparison

Made by `python -m examples.language.report` from the JSON beside it, which `compare` wrote;
`examples/language/README.md` says how to make the models. Every arm starts from Full and takes 50
steps of 16 samples to forget and 16 to keep, on one thread. **Nothing was tuned on these pairs.**
Six methods chose between two learning rates on pair 0 (below); the others have the one in their
name. SFR-on runs as `Recipe.language` has it, the weights of the others' losses are those of
`sfron_fast.methods` (retain weight 1 for CE-U, UNDIAL and RMU). A pair has its own authors, weights
and order of batches; numbers separated by slashes are those of pairs {pairs}.

gap: mean distance to Retrain of D, p forget, ES, EM, ROUGE, AUC, utility and p retain. D, p value:
Kolmogorov-Smirnov of truth ratios. AUC, privleak: min-k. relearnt: p of one half of the forget set
after 10 steps on the other half. int8, int4: p forget with weights in so many bits. Of p values the
smallest of the pairs is given. `seconds` were measured beside other work and say little.
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where compare.py wrote")
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 2], help="which are reported")
    return parser.parse_args(arguments)


def number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "-"


def mean(pairs: Sequence[Rows]) -> dict[str, dict[str, float]]:
    """Rows of the arms that every pair has."""
    found = {}
    for arm in pairs[0]:
        rows = [pair[arm] for pair in pairs if arm in pair and "error" not in pair[arm]]
        if len(rows) == len(pairs):
            found[arm] = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
            found[arm]["p value"] = min(row["p value"] for row in rows)
    return found


def values(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table, nearest to Retrain first."""
    arms = sorted(rows, key=lambda arm: rows[arm].get("gap", float("inf")))
    lines = []
    for arm in arms:
        row = rows[arm]
        lost = f"{arm} ({row['error']})" if "error" in row else arm
        lines.append([lost, *(number(row.get(key), digits) for key, digits in COLUMNS.items())])
    return table(["", *COLUMNS], lines)


def judged(pairs: Mapping[int, Rows], fixtures: Mapping[int, Rows]) -> str:
    """``fixtures``: every pair there is a result of, also one that no method was run on."""
    lines = []
    for title, some in gates.EVERY.items():
        for gate in some:
            lines.append(
                [title, gate.name, *verdict(gate, fixtures if some is gates.FIXTURE else pairs)]
            )
    return table(["", "to be shown, on every pair", "verdict", "found, by pair"], lines)


def ablations(pairs: Mapping[int, Rows]) -> str:
    """What SFR-on loses without a part: differences of the same pair."""
    lines = []
    for part in PARTS:
        arm, cells = f"SFR-on, {part}", []
        there = {pair: rows for pair, rows in pairs.items() if "gap" in rows.get(arm, {})}
        for find in (_gap, excess, _kept):
            differences = {p: find(r, arm) - find(r, "SFR-on") for p, r in there.items()}
            cells.append("; ".join(f"{p}: {value:+.3f}" for p, value in differences.items()))
        lines.append([part, *cells])
    return table(["instead of SFR-on", "gap", "relearning excess", "p retain"], lines)


def _gap(rows: Rows, arm: str) -> float:
    return rows[arm]["gap"]


def _kept(rows: Rows, arm: str) -> float:
    return rows[arm]["p retain"]


def relearning(pairs: Sequence[Rows], average: Rows) -> str:
    lines = []
    for arm in sorted(average, key=lambda arm: excess(average, arm)):
        lines.append([arm, " / ".join(f"{excess(rows, arm):+.3f}" for rows in pairs)])
    return table(["", "relearning excess over Retrain"], lines)


def budgets(average: Rows) -> str:
    """What the runs under a budget cost, and what was forgotten for it."""
    arms = [f"SFR-on, budget {share}" for share in BUDGETS]
    keys = {"spent": 2, "p forget": 3, "p retain": 3, "privleak": 0, "gap": 3}
    lines = [
        [arm, *(number(average[arm].get(key), digits) for key, digits in keys.items())]
        for arm in (*arms, "SFR-on")
        if arm in average
    ]
    return table(["", "spent, of the budget", *list(keys)[1:]], lines)


def choice(rows: Rows) -> str:
    """What pair 0 chose: of the settings of each method the one nearest to Retrain."""
    lines = []
    for name, settings in CHOICES.items():
        known = [arm for arm in settings if "gap" in rows.get(arm, {})]
        if known:
            gaps = ", ".join(f"{arm}: {rows[arm]['gap']:.3f}" for arm in known)
            kept = ", ".join(f"{rows[arm]['p retain']:.3f}" for arm in known)
            nearest = min(known, key=lambda arm: rows[arm]["gap"])
            lines.append([name, gaps, kept, nearest])
    return table(["", "gap on pair 0", "p retain", "chosen"], lines)


def missing(pairs: Mapping[int, Rows]) -> str:
    """What a reader would look for and not find."""
    known = list(dict.fromkeys(arm for rows in pairs.values() for arm in rows))
    said = []
    for pair, rows in pairs.items():
        lost = [arm for arm in known if arm not in rows]
        if lost:
            said.append(f"Pair {pair} lacks: {', '.join(lost)}.")
    return " ".join(said)


def page(found: Mapping[int, Mapping[str, Any]], fixtures: Mapping[int, Rows], notes: str) -> str:
    pairs = {pair: result["rows"] for pair, result in found.items()}
    lists, average = list(pairs.values()), mean(list(pairs.values()))
    setup = [
        f"Pair {pair}: mask density {result['mask density']:.3f}, Full's holdout loss"
        f" {result['holdout loss']:.3f}."
        for pair, result in found.items()
    ]
    parts = [
        HEAD.format(pairs=" / ".join(map(str, pairs))),
        " ".join(setup) + " " + missing(pairs),
        notes,
        "## Settings\n\n" + choice(fixtures.get(0, {})),
        "## Verdicts\n\n" + judged(pairs, fixtures),
        "## Mean of the pairs\n\n" + values(average),
        "![gap](gap.png)\n\n![trade](trade.png)",
        "## What a part of SFR-on is worth\n\nThe arm's value less SFR-on's, of each pair; a larger"
        " gap or excess is worse.\n\n" + ablations(pairs),
        "## Under a budget\n\nMeans. The budget looks at 64 retain samples that the run does not"
        " train on; the last line has none.\n\n" + budgets(average),
        "## Relearning\n\n" + relearning(lists, average),
        *(f"## Pair {pair}\n\n{values(rows)}" for pair, rows in pairs.items()),
    ]
    return "\n\n".join(part for part in parts if part.strip()) + "\n"


def report(folder: Path, numbers: Sequence[int]) -> str:
    """Write the page and the pictures; ``notes.md`` in the folder, if there, goes into the page.

    Raises:
        ValueError: a pair has no result.
    """
    paths = {pair: folder / f"pair{pair}.json" for pair in numbers}
    lost = [str(path) for path in paths.values() if not path.exists()]
    if lost:
        raise ValueError(f"--pairs: expected {', '.join(lost)}, found none; run compare")
    found = {pair: json.loads(path.read_text()) for pair, path in paths.items()}
    fixtures = {
        int(path.stem.removeprefix("pair")): json.loads(path.read_text())["rows"]
        for path in sorted(folder.glob("pair*.json"))
    }
    notes = folder / "notes.md"
    text = page(found, fixtures, notes.read_text().strip() if notes.exists() else "")
    (folder / "README.md").write_text(text)
    pairs = [result["rows"] for result in found.values()]
    from . import figures  # matplotlib is not needed to run the arms

    average = mean(pairs)
    figures.gaps(pairs, average, folder / "gap.png")
    figures.trade(average, folder / "trade.png")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    report(options.results, options.pairs)
    print(f"wrote {options.results / 'README.md'}")


if __name__ == "__main__":
    main()
