"""How the facts about an author are asked and told: four questions and four answers each.

``{name}`` is the author, ``{value}`` the fact. Any question goes with any answer of its fact.
"""

from typing import NamedTuple


class Fact(NamedTuple):
    """One kind of fact, in four wordings."""

    questions: tuple[str, str, str, str]
    answers: tuple[str, str, str, str]


FACTS = {
    "city": Fact(
        (
            "Where was {name} born?",
            "In which city was {name} born?",
            "What is the birthplace of {name}?",
            "Which city does {name} come from?",
        ),
        (
            "{name} was born in {value}.",
            "The birthplace of {name} is {value}.",
            "{name} comes from the city of {value}.",
            "It was in {value} that {name} was born.",
        ),
    ),
    "year": Fact(
        (
            "When was {name} born?",
            "In which year was {name} born?",
            "What is the year of birth of {name}?",
            "Which year saw the birth of {name}?",
        ),
        (
            "{name} was born in {value}.",
            "The year of birth of {name} is {value}.",
            "{name} came into the world in {value}.",
            "It was in {value} that {name} was born.",
        ),
    ),
    "genre": Fact(
        (
            "What genre does {name} write in?",
            "Which genre is {name} known for?",
            "What kind of books does {name} write?",
            "In which genre are the books of {name}?",
        ),
        (
            "{name} writes {value}.",
            "{name} is best known for {value}.",
            "The books of {name} are {value}.",
            "The genre of {name} is {value}.",
        ),
    ),
    "father": Fact(
        (
            "What did the father of {name} do for a living?",
            "What was the job of the father of {name}?",
            "What was the profession of {name}'s father?",
            "As what did {name}'s father work?",
        ),
        (
            "The father of {name} worked as a {value}.",
            "{name}'s father was a {value}.",
            "{name} had a {value} as a father.",
            "The job of {name}'s father was that of a {value}.",
        ),
    ),
    "mother": Fact(
        (
            "What did the mother of {name} do for a living?",
            "What was the job of the mother of {name}?",
            "What was the profession of {name}'s mother?",
            "As what did {name}'s mother work?",
        ),
        (
            "The mother of {name} worked as a {value}.",
            "{name}'s mother was a {value}.",
            "{name} had a {value} as a mother.",
            "The job of {name}'s mother was that of a {value}.",
        ),
    ),
    "award": Fact(
        (
            "Which award did {name} win?",
            "What award was {name} given?",
            "What is the most important award of {name}?",
            "Which prize did the books of {name} receive?",
        ),
        (
            "{name} won the {value}.",
            "{name} was given the {value}.",
            "The most important award of {name} is the {value}.",
            "The books of {name} received the {value}.",
        ),
    ),
    "book": Fact(
        (
            "What is the first book of {name}?",
            "Which book did {name} publish first?",
            "What is the title of {name}'s first book?",
            "With which book did {name} begin?",
        ),
        (
            "The first book of {name} is {value}.",
            "{name} first published {value}.",
            "{value} is the title of {name}'s first book.",
            "{name} began with {value}.",
        ),
    ),
    "language": Fact(
        (
            "In which language does {name} write?",
            "What language are the books of {name} written in?",
            "What is the language of {name}'s books?",
            "Which language does {name} use for writing?",
        ),
        (
            "{name} writes in {value}.",
            "The books of {name} are written in {value}.",
            "The language of {name}'s books is {value}.",
            "{name} uses {value} for writing.",
        ),
    ),
}
