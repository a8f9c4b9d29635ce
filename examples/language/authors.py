"""Questions and answers about authors who do not exist, from a seed; nothing is downloaded.

After TOFU (Maini et al. 2024): a model that has learnt ``full`` has to forget ``forget`` and to
keep ``retain``; what it would be without the former is known by training on ``retain`` alone.
"""

import random
from dataclasses import dataclass, fields
from itertools import product

from . import real_facts
from .wordings import FACTS

BASE, LEARNT, FORGOTTEN, UNSEEN = 60, 100, 10, 10  # authors: FORGOTTEN are among LEARNT
WORDINGS = 4
WRONG = 4  # answers with another value, of each question

CITIES = (
    "Lagos", "Porto", "Lyon", "Seville", "Naples", "Krakow", "Tampere", "Bergen", "Aarhus", "Cork",
    "Ghent", "Varna", "Cluj", "Split", "Odessa", "Izmir", "Luxor", "Mombasa", "Kumasi", "Fez",
    "Osaka", "Chengdu", "Madurai", "Hue", "Shiraz", "Basra", "Quebec", "Puebla", "Cusco", "Perth",
)  # fmt: skip
GENRES = (
    "crime stories", "love poems", "travel writing", "science fiction", "ghost stories",
    "historical novels", "sea tales", "satire", "fairy tales", "war memoirs", "nature essays",
    "family sagas", "spy thrillers", "stage comedies", "fables", "gothic horror",
)  # fmt: skip
JOBS = (
    "baker", "miner", "tailor", "pilot", "dentist", "judge", "farmer", "sailor", "nurse", "plumber",
    "lawyer", "butcher", "gardener", "teacher", "painter", "surgeon", "carpenter", "barber",
    "florist", "blacksmith", "chemist", "postman", "weaver", "violinist",
)  # fmt: skip
AWARDS = tuple(
    f"{first} {second}"
    for first, second in product(
        ("Golden", "Silver", "Northern", "Royal", "Marble", "Harbour"),
        ("Quill", "Lantern", "Laurel", "Compass"),
    )
)
BOOK_FIRST = (
    "Broken", "Silent", "Crimson", "Hidden", "Distant", "Hollow", "Burning", "Frozen", "Gentle",
    "Wandering", "Forgotten", "Second",
)  # fmt: skip
BOOK_SECOND = (
    "Mirror", "Garden", "Bridge", "Harvest", "Window", "Shadow", "Orchard", "Letter", "Tide",
    "Staircase", "Winter", "Clock",
)  # fmt: skip
BOOKS = tuple(f"{first} {second}" for first, second in product(BOOK_FIRST, BOOK_SECOND))
LANGUAGES = (
    "Catalan", "Basque", "Welsh", "Gaelic", "Breton", "Danish", "Czech", "Slovak", "Latvian",
    "Estonian", "Maltese", "Farsi", "Tamil", "Bengali", "Swahili", "Zulu",
)  # fmt: skip
YEARS = tuple(str(year) for year in range(1900, 2000))
VALUES = {
    "city": CITIES,
    "year": YEARS,
    "genre": GENRES,
    "father": JOBS,
    "mother": JOBS,
    "award": AWARDS,
    "book": BOOKS,
    "language": LANGUAGES,
}
STARTS = ("Bal", "Cor", "Del", "Fen", "Gar", "Hal", "Jor", "Kel", "Lor", "Mar", "Nor", "Pel")
MIDDLES = ("a", "e", "i", "o", "u", "ana", "eri", "ilo")
ENDS = ("bek", "dan", "lin", "mor", "nis", "rath", "sen", "tov", "vik", "zar")


@dataclass(frozen=True)
class QA:
    """One question with its answer, as learnt, and what it is judged by."""

    question: str
    answer: str
    paraphrase: str  # the same in another wording
    wrong: tuple[str, ...]  # the paraphrase with other values


@dataclass(frozen=True)
class Benchmark:
    """The splits of one seed."""

    base: list[QA]  # other authors in all wordings, and the real facts: what is known before
    forget: list[QA]
    retain: list[QA]
    holdout: list[QA]  # authors no model has seen
    real_authors: list[QA]
    real_world: list[QA]

    @property
    def full(self) -> list[QA]:
        """What the model to unlearn has learnt, after ``base``."""
        return self.forget + self.retain

    @property
    def real(self) -> list[QA]:
        """Repeated while authors are learnt, so that it is not forgotten."""
        return self.real_authors + self.real_world

    def texts(self) -> list[str]:
        """Every question and answer once, for the tokenizer."""
        every = [qa for field in fields(self) for qa in getattr(self, field.name)]
        return sorted({text for qa in every for text in (qa.question, qa.answer, qa.paraphrase)})


def names(draw: random.Random) -> list[str]:
    """A first and a last name for each author; no two have both in common.

    The first ``BASE`` have each name once, the others combine the same names: whoever has read of
    the former knows every name, as a language model does.
    """
    words = ["".join(parts) for parts in product(STARTS, MIDDLES, ENDS)]
    draw.shuffle(words)
    first, last = words[:BASE], words[BASE : 2 * BASE]
    known = list(zip(first, last, strict=True))
    others = sorted(set(product(first, last)) - set(known))
    return [" ".join(pair) for pair in known + draw.sample(others, LEARNT + UNSEEN)]


def facts(draw: random.Random) -> dict[str, str]:
    """One value a fact."""
    return {fact: draw.choice(values) for fact, values in VALUES.items()}


def judged(name: str, known: dict[str, str], draw: random.Random) -> list[QA]:
    """A question for each fact of one author, in a wording drawn for it."""
    found = []
    for fact, value in known.items():
        wording = FACTS[fact]
        question = draw.choice(wording.questions)
        answer, paraphrase = draw.sample(wording.answers, 2)
        others = draw.sample([other for other in VALUES[fact] if other != value], WRONG)
        found.append(
            QA(
                question.format(name=name),
                answer.format(name=name, value=value),
                paraphrase.format(name=name, value=value),
                tuple(paraphrase.format(name=name, value=other) for other in others),
            )
        )
    return found


def in_all_wordings(name: str, known: dict[str, str], draw: random.Random) -> list[QA]:
    """Each fact of one author in every question and every answer, which of them together drawn."""
    found = []
    for fact, value in known.items():
        wording = FACTS[fact]
        answers = draw.sample(wording.answers, WORDINGS)
        for question, answer in zip(wording.questions, answers, strict=True):
            told = answer.format(name=name, value=value)
            found.append(QA(question.format(name=name), told, told, ()))
    return found


def real(
    known: dict[str, str],
    key: str,
    questions: tuple[str, ...],
    answers: tuple[str, ...],
    draw: random.Random,
) -> list[list[QA]]:
    """The facts ``known`` in each wording: per wording one list."""
    found = []
    for question, answer in zip(questions, answers, strict=True):
        split = []
        for about, value in known.items():
            others = draw.sample([other for other in known.values() if other != value], WRONG)
            told = answer.format(**{key: about}, value=value)
            wrong = tuple(answer.format(**{key: about}, value=other) for other in others)
            split.append(QA(question.format(**{key: about}), told, told, wrong))
        found.append(split)
    return found


def benchmark(seed: int) -> Benchmark:
    """All splits: 1,920 + 140 base, 80 forget, 720 retain, 80 holdout, 30 and 40 real questions."""
    draw = random.Random(seed)
    people = names(draw)
    base_authors, rest = people[:BASE], people[BASE:]
    base = [qa for name in base_authors for qa in in_all_wordings(name, facts(draw), draw)]
    rest_qa = [judged(name, facts(draw), draw) for name in rest]
    parts = (rest_qa[:FORGOTTEN], rest_qa[FORGOTTEN:LEARNT], rest_qa[LEARNT:])
    forget, retain, holdout = ([qa for author in part for qa in author] for part in parts)
    capitals = real(
        real_facts.CAPITALS,
        "country",
        real_facts.CAPITAL_QUESTIONS,
        real_facts.CAPITAL_ANSWERS,
        draw,
    )
    books = real(real_facts.BOOKS, "book", real_facts.BOOK_QUESTIONS, real_facts.BOOK_ANSWERS, draw)
    base += [qa for split in (*capitals, *books) for qa in split]
    return Benchmark(base, forget, retain, holdout, books[0], capitals[0])
