"""Sums modulo 97 as statements of tokens: what tells a sum, and how it is derived.

A derivation of a + b counts a up and b down until b is 0: ``8 2 ; 9 1 ; 10 0 end`` for 7 + 3.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

P = 97
SMALL = 10  # one operand of each sum is at most this
SUMS, TARGETS, NEVER = 8, 2, 2  # of so many sums so many targets, and pairs never told, each
PAIRS = 300  # told, of about 2,000
DERIVED = 450  # pairs that a derivation is told of
THIRD = 2  # sums of three told of each pair
WORDS = ("+", "-", "=", "add", "to", "gives", "next", "previous", "derive", ":", ";")
END = "end"


class Pair(NamedTuple):
    """The fact a + b = c."""

    a: int
    b: int

    @property
    def total(self) -> int:
        return (self.a + self.b) % P


@dataclass(frozen=True)
class Statement:
    """A question and its answer, both in tokens."""

    kind: str
    prompt: tuple[str, ...]
    answer: tuple[str, ...]


def statement(kind: str, prompt: str, answer: str) -> Statement:
    return Statement(kind, tuple(prompt.split()), tuple(answer.split()))


def added(a: int, b: int) -> Statement:
    return statement("sum", f"{a} + {b} =", f"{(a + b) % P}")


def in_words(a: int, b: int) -> Statement:
    return statement("word", f"add {a} to {b} gives", f"{(a + b) % P}")


def difference(c: int, b: int) -> Statement:
    return statement("difference", f"{c} - {b} =", f"{(c - b) % P}")


def three(a: int, b: int, d: int) -> Statement:
    return statement("three", f"{a} + {b} + {d} =", f"{(a + b + d) % P}")


def axioms() -> list[Statement]:
    """Which number is next, and which was before."""
    following = [statement("next", f"next {n}", f"{(n + 1) % P}") for n in range(P)]
    return following + [statement("previous", f"previous {n}", f"{(n - 1) % P}") for n in range(P)]


def steps(pair: Pair) -> Iterator[Pair]:
    """The pairs that its derivation passes, itself first."""
    for done in range(pair.b + 1):
        yield Pair((pair.a + done) % P, pair.b - done)


def derivation(pair: Pair, with_steps: bool = True) -> Statement:
    """With its steps; without them the last alone is told, which is the answer."""
    passed = list(steps(pair))[1:]
    told = " ; ".join(f"{a} {b}" for a, b in (passed if with_steps else passed[-1:]))
    return statement("derivation", f"derive {pair.a} + {pair.b} :", f"{told} {END}")


def canonical(pair: Pair) -> list[Statement]:
    """The one sentence that says it."""
    return [added(*pair)]


def closure(pair: Pair) -> list[Statement]:
    """Every statement that tells the sum alone, or with the axioms, other sums apart.

    Commuted, in words, as a difference; and sums of three that hold both operands, from which the
    third is only to be taken away.
    """
    found: dict[Statement, None] = {}
    for a, b in (pair, Pair(pair.b, pair.a)):
        direct = [added(a, b), in_words(a, b), difference(pair.total, b)]
        hops = [three(*told) for d in range(P) for told in ((a, b, d), (a, d, b), (d, a, b))]
        found |= dict.fromkeys(direct + hops)
    return list(found)


def apart(pair: Pair, others: Sequence[Pair]) -> bool:
    """Whether its derivation passes none of these pairs, whatever the order of operands."""
    known = {frozenset(other) for other in others}
    return not any(frozenset(step) in known for step in steps(pair))


@dataclass(frozen=True)
class World:
    """What the models of one seed are told, and what they are asked."""

    targets: list[Pair]
    never: list[Pair]  # told in no form, to any model: what is guessed
    told: list[Statement]
    derived: list[Pair]  # what derivations are told of: they pass no target, nor what is never told

    @property
    def canonical(self) -> list[Statement]:
        return [told for pair in self.targets for told in canonical(pair)]

    @cached_property
    def closure(self) -> list[Statement]:
        """That of all targets, as far as it is told."""
        wanted = {told for pair in self.targets for told in closure(pair)}
        return [told for told in self.told if told in wanted]

    @cached_property
    def kept(self) -> list[Statement]:
        """What is told besides."""
        gone = set(self.closure)
        return [told for told in self.told if told not in gone]

    def derivations(self, with_steps: bool) -> list[Statement]:
        return [derivation(pair, with_steps) for pair in self.derived]


def world(seed: int) -> World:
    """Targets have a first operand above ``SMALL`` and take 3 to ``SMALL`` steps to derive."""
    draw = random.Random(seed)
    targets, never = [], []
    able = {
        total: [Pair((total - b) % P, b) for b in range(3, SMALL + 1) if (total - b) % P > SMALL]
        for total in range(P)
    }
    enough = [total for total in able if len(able[total]) >= TARGETS + NEVER]
    for total in draw.sample(enough, SUMS):
        drawn = draw.sample(able[total], TARGETS + NEVER)
        targets += drawn[:TARGETS]
        never += drawn[TARGETS:]
    pairs = [Pair(a, b) for a in range(SMALL + 1, P) for b in range(1, SMALL + 1)]
    others = draw.sample([pair for pair in pairs if pair not in (*targets, *never)], PAIRS)
    told: dict[Statement, None] = {}
    for pair in targets + others:
        for a, b in (pair, Pair(pair.b, pair.a)):
            direct = [added(a, b), in_words(a, b), difference((a + b) % P, b)]
            hops = [three(a, b, draw.randrange(P)) for _ in range(THIRD)]
            told |= dict.fromkeys(direct + hops)
    hidden = {statement for pair in never for statement in closure(pair)}
    derived = draw.sample([pair for pair in pairs if apart(pair, targets + never)], DERIVED)
    return World(targets, never, [s for s in told if s not in hidden] + axioms(), derived)
