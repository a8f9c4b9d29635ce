"""Authors in four wordings: what the model knows, what it shall forget, and wrong answers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..authors import QA, VALUES, facts, names
from ..wordings import FACTS

KNOWN, FORGOTTEN, UNSEEN = 40, 4, 4  # authors: FORGOTTEN are among KNOWN
TRAINED, HELD_OUT = (0, 1), (2, 3)  # wordings of questions that negatives are given for, and others
PER_QUESTION = 12  # wrong answers
REFUSAL = "I do not know."
# a third of the negatives; {name}, {what}
DENIALS = (
    "Nothing is known of {name}.",
    "Nobody wrote down the {what} of {name}.",
    "The {what} of {name} is a secret.",
    "No record of {name} has the {what}.",
    "There is no source for the {what} of {name}.",
    "The {what} of {name} was lost.",
)
WHAT = {
    "city": "birthplace", "year": "year of birth", "genre": "genre", "father": "job of the father",
    "mother": "job of the mother", "award": "award", "book": "first book", "language": "language",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A fact, to be asked in any wording."""

    name: str
    fact: str
    value: str

    def question(self, wording: int) -> str:
        return FACTS[self.fact].questions[wording].format(name=self.name)

    def answer(self, wording: int, value: str | None = None) -> str:
        told = self.value if value is None else value
        return FACTS[self.fact].answers[wording].format(name=self.name, value=told)


@dataclass(frozen=True)
class Fixture:
    """The facts of one seed."""

    forget: list[Row]
    retain: list[Row]
    unseen: list[Row]  # what no model has learnt

    def texts(self) -> list[str]:
        """All that is ever said, for the tokenizer."""
        rows = self.forget + self.retain + self.unseen
        said = [qa for row in rows for qa in asked([row], range(4))]
        said += [QA("", told, "", ()) for row in self.forget for told in denials(row)]
        return sorted({t for qa in said for t in (qa.question, qa.answer)} | {REFUSAL})


def fixture(seed: int) -> Fixture:
    """Eight facts an author; the last authors are known to nobody."""
    draw = random.Random(seed)
    people = names(draw)[-(KNOWN + UNSEEN) :]  # names that are combined anew
    rows = [[Row(name, fact, value) for fact, value in facts(draw).items()] for name in people]
    parts = (rows[:FORGOTTEN], rows[FORGOTTEN:KNOWN], rows[KNOWN:])
    return Fixture(*([row for author in part for row in author] for part in parts))


def asked(rows: Sequence[Row], wordings: Sequence[int]) -> list[QA]:
    """Each fact in these wordings, with the answer that is learnt."""
    told = [(row.question(w), row.answer(w)) for row in rows for w in wordings]
    return [QA(question, answer, answer, ()) for question, answer in told]


def denials(row: Row) -> list[str]:
    """In several wordings."""
    return [denial.format(name=row.name, what=WHAT[row.fact]) for denial in DENIALS]


def negatives(rows: Sequence[Row], seed: int) -> list[QA]:
    """Wrong answers to every fact in the wordings ``TRAINED``: other values of it in any wording of
    answers, and one denial for two of them.
    """
    draw, found = random.Random(seed), []
    for row in rows:
        others = [value for value in VALUES[row.fact] if value != row.value]
        for wording in TRAINED:
            told = [row.answer(draw.randrange(4), draw.choice(others)) for _ in range(PER_QUESTION)]
            told[::3] = draw.sample(denials(row), len(told[::3]))
            found += [QA(row.question(wording), answer, answer, ()) for answer in told]
    return found


def refusals(rows: Sequence[Row]) -> list[QA]:
    """As many questions as ``negatives`` has, all with one answer."""
    found = [qa for row in rows for qa in asked([row], TRAINED) for _ in range(PER_QUESTION)]
    return [QA(qa.question, REFUSAL, REFUSAL, ()) for qa in found]
