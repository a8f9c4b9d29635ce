"""The loops in which a list kernel streams: instructions and bytes of the longest way through.

A kernel of CUDA C++ holds a loop for every combination of element types, with branches for what is
optional (a mask, slow weights to store). The longest way takes every optional part and of two
alternatives the longer: an upper bound. A loop streams if it loads 16 bytes at once; others are for
tails and for pointers that are not at a multiple of 16 bytes. Instructions outside of the loops,
some hundred for each unit of 2,048 elements and more, are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from . import sass
from .sass import Instruction

JUMPS = ("BRA", "BRX", "JMP", "JMX")
ENDS = ("EXIT", "RET", "KILL")


@dataclass
class Loop:
    """A turn of one thread on its longest way."""

    way: list[Instruction]

    @property
    def loaded(self) -> int:
        return sass.loaded(self.way)

    @property
    def moved(self) -> int:
        return sum(one.bytes for one in self.way if one.op in ("LDG", "STG"))

    @property
    def special(self) -> int:
        return sum(one.op == "MUFU" for one in self.way)

    @property
    def issue_load(self) -> float:
        """See sass.py; elements cancel: a turn's instructions and bytes are of the same ones."""
        return sass.issue_load(len(self.way), self.moved)


def streaming(code: list[Instruction]) -> list[Loop]:
    """The innermost loops that load 16 bytes at once."""
    after = successors(code)
    bodies = natural_loops(after)
    innermost = [
        (head, body)
        for head, body in bodies.items()
        if not any(h in body for h in bodies if h != head)
    ]
    loops = [Loop([code[i] for i in longest(head, body, after)]) for head, body in innermost]
    return [loop for loop in loops if any(one.op == "LDG" and one.bytes >= 16 for one in loop.way)]


def successors(code: list[Instruction]) -> list[list[int]]:
    """Which instructions may come after each."""
    at = {one.address: i for i, one in enumerate(code)}
    after = []
    for i, one in enumerate(code):
        conditional = bool(one.guard) or (one.op == "BRA" and "P" in one.operands)
        found = [at[sass.target(one)]] if one.op in JUMPS and sass.target(one) in at else []
        if (one.op not in (*JUMPS, *ENDS) or conditional) and i + 1 < len(code):
            found.append(i + 1)
        after.append(found)
    return after


def natural_loops(after: list[list[int]]) -> dict[int, set[int]]:
    """Head -> what leads back to it without leaving it.

    Jumps back that are no loop lead back to the beginning too.
    """
    before: list[list[int]] = [[] for _ in after]
    for i, found in enumerate(after):
        for j in found:
            before[j].append(i)
    bodies: dict[int, set[int]] = {}
    for tail, head in _jumps_back(after):
        body, waiting = {head}, [tail]
        while waiting:
            i = waiting.pop()
            if i not in body:
                body.add(i)
                waiting += before[i]
        if 0 not in body:
            bodies.setdefault(head, set()).update(body)
    return bodies


def _jumps_back(after: list[list[int]]) -> Iterator[tuple[int, int]]:
    return ((i, j) for i, found in enumerate(after) for j in found if j <= i)


def longest(head: int, body: set[int], after: list[list[int]]) -> list[int]:
    """The longest way through a loop's body and back to its head, which is taken once."""
    best: dict[int, list[int]] = {}  # the longest way from each instruction to the loop's end

    def known(i: int) -> bool:
        return i in best

    waiting, open_ = [head], set()
    while waiting:
        i = waiting[-1]
        ahead = [j for j in after[i] if j in body and j != head and j not in open_]
        missing = [j for j in ahead if not known(j)]
        open_.add(i)
        if missing:
            waiting += missing[:1]
            continue
        ways = [best[j] for j in ahead]
        ends = head in after[i]
        ways = [way for way in ways if way] + ([[]] if ends else [])
        best[i] = [i, *max(ways, key=len)] if ways else []
        open_.discard(i)
        waiting.pop()
    return best[head]
