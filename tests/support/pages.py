"""README and docs as text, and their code blocks as things to run."""

from pathlib import Path
from typing import Any, NamedTuple

from paths import ROOT

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


class Block(NamedTuple):
    """A fenced block and where it stands."""

    page: str
    heading: str  # of the section it stands in
    language: str
    line: int  # of its first line of code
    code: str


def text(page: str) -> str:
    return (ROOT / page).read_text()


def section(page: str, heading: str) -> str:
    """From the line of the heading, "## Limits" for example, to the next of its level."""
    level = heading.split(" ")[0]
    _, found, rest = text(page).partition(f"\n{heading}\n")
    assert found, f"{page} has no {heading!r}"
    return rest.split(f"\n{level} ")[0]


def blocks(page: str, language: str | None = "python") -> list[Block]:
    """In their order; of every language with None."""
    found, heading, opened = [], "", None
    lines = text(page).splitlines()
    for number, line in enumerate(lines, 1):
        if opened is None and line.startswith("```"):
            opened = number + 1, line.removeprefix("```")
        elif opened is not None and line.startswith("```"):
            start, kind = opened
            code = "\n".join(lines[start - 1 : number - 1]) + "\n"
            found.append(Block(page, heading, kind, start, code))
            opened = None
        elif opened is None and line.startswith("#"):
            heading = line.lstrip("# ")
    assert opened is None, f"{page}: the block that begins at line {opened} has no end"
    return [block for block in found if language in (None, block.language)]


def run(block: Block, names: dict[str, Any]) -> dict[str, Any]:
    """Execute the block with ``names`` in sight, which it may add to; an error shows the page's
    line.
    """
    code = "\n" * (block.line - 1) + block.code
    exec(compile(code, str(Path(ROOT) / block.page), "exec"), names)
    return names
