"""`python -m examples.systems.overview`: one table of all published systems, from their results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import markdown
from .claims import results, shown

SYSTEMS = Path("benchmarks/results/systems")
HEAD = """# Published systems on this core

Each has claims with limits, and controls that must fail, on seeds 0, 1 and 2. PASS: every claim was
met; FAIL: one was missed (in bold); NOT SHOWN: a control did not fail as it must. Settings were
chosen on other seeds (SIU's were seen before: its notes). Models and data are small: scikit-learn's
digits, facts and sums made from a seed, and MNIST where the link says so. **What the figures leave
out is said behind each link**; `python -m examples.systems.overview` writes this page.
"""


def overview(systems: Path = SYSTEMS) -> str:
    """The page, of every folder that holds seeds."""
    folders = sorted({path.parent for path in systems.rglob("seed*.json")})
    lines = [line(folder, systems) for folder in folders]
    head = ["system", "verdicts", "claims: found, by seed (limit)", "controls"]
    return f"{HEAD}\n{markdown.table(head, lines)}\n"


def line(folder: Path, systems: Path) -> list[str]:
    """One system's row; of two forms of it, or two data sets, the folder tells which."""
    found, place = results(folder), folder.relative_to(systems)
    title = (folder / "README.md").read_text().splitlines()[0].removeprefix("# ").partition(":")[0]
    which = f", {place.name}" if len(place.parts) > 1 else ""
    verdicts = " / ".join(result["verdict"] for result in found)
    link = f"[{title}{which}]({place.as_posix()}/README.md)"
    return [link, verdicts, _rows(found, "claims"), _rows(found, "controls")]


def _rows(found: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Each claim or control, what the seeds found, and its limit."""
    said = []
    for number, row in enumerate(found[0][kind]):
        values = " / ".join(shown(result[kind][number]) for result in found)
        said.append(f"• {row['text']}: {values} ({row['limit']})")
    return "<br>".join(said)


if __name__ == "__main__":
    (SYSTEMS / "README.md").write_text(overview())
