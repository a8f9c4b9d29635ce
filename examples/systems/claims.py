"""Claims with their limits, controls that must fail, and the verdict; written as JSON and a table.

A demonstration of one seed ends in ``write(folder, record(seed, claims, controls, facts))``.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["PASS", "FAIL", "NOT SHOWN"]


@dataclass(frozen=True)
class Claim:
    """What was asked, found, and asked for. Of a control ``met`` means that it failed as it must.

    A number is judged by ``at_least`` or ``at_most``.
    """

    text: str
    found: float
    limit: str
    met: bool


def at_least(text: str, found: float, limit: float) -> Claim:
    """found >= limit; NaN is a miss."""
    return Claim(text, float(found), f">= {limit:g}", bool(found >= limit))


def at_most(text: str, found: float, limit: float) -> Claim:
    """found <= limit; NaN is a miss."""
    return Claim(text, float(found), f"<= {limit:g}", bool(found <= limit))


def verdict(claims: Sequence[Claim], controls: Sequence[Claim]) -> Verdict:
    """NOT SHOWN if a control did not fail as it must, as then the claims say nothing; else PASS if
    all claims are met, else FAIL.
    """
    if not claims or not controls or not all(control.met for control in controls):
        return "NOT SHOWN"
    return "PASS" if all(claim.met for claim in claims) else "FAIL"


def record(
    seed: int,
    claims: Sequence[Claim],
    controls: Sequence[Claim],
    facts: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """One seed's result, printed and returned. ``facts``: what else was measured (JSON)."""
    said = verdict(claims, controls)
    for kind, rows in (("claim", claims), ("control", controls)):
        for row in rows:
            met = "met" if row.met else "MISSED"
            print(f"{kind:>8}: {row.text}: {row.found:.4g} ({row.limit}) {met}")
    print(f"seed {seed}: {said}, {seconds:.0f} s", flush=True)
    return {
        "seed": seed,
        "verdict": said,
        "claims": [asdict(row) for row in claims],
        "controls": [asdict(row) for row in controls],
        "facts": dict(facts),
        "seconds": round(seconds),
    }


def parser(description: str, out: Path) -> argparse.ArgumentParser:
    """Of a demonstration: which seed, and where its results go."""
    found = argparse.ArgumentParser(description=description.splitlines()[0])
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--out", type=Path, default=out)
    return found


def results(folder: Path) -> list[dict[str, Any]]:
    """Those of all seeds written so far."""
    found = [json.loads(path.read_text()) for path in folder.glob("seed*.json")]
    return sorted(found, key=lambda result: result["seed"])


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row a claim and control, a column a seed; a miss is in bold."""
    heads = ["", "limit", *(f"seed {result['seed']}" for result in found)]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for kind in ("claims", "controls"):
        for number, row in enumerate(found[0][kind]):
            cells = [shown(result[kind][number]) for result in found]
            said = [kind[:-1] + ": " + row["text"], row["limit"], *cells]
            lines.append("| " + " | ".join(said) + " |")
    lines.append("| verdict | | " + " | ".join(result["verdict"] for result in found) + " |")
    return "\n".join(lines) + "\n"


def shown(row: Mapping[str, Any]) -> str:
    """What was found; a miss is in bold."""
    return f"{row['found']:.3g}" if row["met"] else f"**{row['found']:.3g}**"


def write(folder: Path, result: Mapping[str, Any], title: str) -> list[dict[str, Any]]:
    """``seed<N>.json`` of this result, and README.md of all seeds there; returns those, for a
    figure. The words of ``notes.md``, if there is one, follow the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seed{result['seed']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    found, notes = results(folder), folder / "notes.md"
    text = f"# {title}\n\n{table(found)}"
    if notes.exists():
        text += "\n" + notes.read_text()
    (folder / "README.md").write_text(text)
    return found
