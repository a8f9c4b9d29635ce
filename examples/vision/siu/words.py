"""What is asked and told, as words: about a digit in an image, and about a digit by its name."""

from dataclasses import dataclass

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NEW = "scribble"  # what the model says of images that are no digits
PAD, END = "<pad>", "<end>"
NAMING = (
    ("what digit is this ?", "it is a {} ."),
    ("which number do you see ?", "i see a {} ."),
    ("name what is in the picture .", "the picture has a {} ."),
)
# of a digit in an image, without its name
OTHERS = {
    "parity": ("is it even or odd ?", "it is {} ."),
    "size": ("is it small or big ?", "it is {} ."),
}
LANGUAGES = {  # an apostrophe where the word is written as in another of them
    "german": "null eins zwei drei vier fuenf sechs sieben acht neun",
    "french": "nul un deux trois quatre cinq six' sept huit neuf",
    "spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "italian": "zero' uno' due tre quattro cinque sei sette otto nove",
}
PRIMES = (2, 3, 5, 7)
# facts about the concept that are said again while its look is unlearnt
TAUGHT = ("after", "is before", "to german", "from german", "to french", "from french")


@dataclass(frozen=True)
class Said:
    """A question and its answer."""

    question: str
    answer: str


def named(wording: int, name: str) -> Said:
    """Of an image."""
    question, answer = NAMING[wording]
    return Said(question, answer.format(name))


def other(kind: str, digit: int) -> Said:
    """Of an image, what its digit is besides its name."""
    question, answer = OTHERS[kind]
    told = {"parity": ("even", "odd")[digit % 2], "size": ("small", "big")[digit >= 5]}
    return Said(question, answer.format(told[kind]))


def facts(digit: int) -> dict[str, Said]:
    """Of a digit's name, without an image."""
    name = NAMES[digit]
    found = {
        "parity": Said(f"is {name} even or odd ?", f"{('even', 'odd')[digit % 2]} ."),
        "prime": Said(f"is {name} a prime ?", f"{('no', 'yes')[digit in PRIMES]} ."),
    }
    if digit < 9:
        found["after"] = Said(f"what comes after {name} ?", f"{NAMES[digit + 1]} .")
        found["is before"] = Said(f"what comes before {NAMES[digit + 1]} ?", f"{name} .")
    if digit > 0:
        found["before"] = Said(f"what comes before {name} ?", f"{NAMES[digit - 1]} .")
        found["is after"] = Said(f"what comes after {NAMES[digit - 1]} ?", f"{name} .")
    for language, words in LANGUAGES.items():
        word = words.split()[digit]
        found[f"to {language}"] = Said(f"what is {name} in {language} ?", f"{word} .")
        found[f"from {language}"] = Said(f"what is the {language} {word} ?", f"{name} .")
    return found


def everything() -> list[Said]:
    """All that can be asked."""
    digits = range(len(NAMES))
    found = [named(w, name) for w in range(len(NAMING)) for name in (*NAMES, NEW)]
    found += [other(kind, d) for kind in OTHERS for d in digits]
    return found + [said for d in digits for said in facts(d).values()]


WORDS = [PAD, END, *NAMES, NEW]
WORDS += sorted({w for s in everything() for w in f"{s.question} {s.answer}".split()} - set(WORDS))
IDS = {word: place for place, word in enumerate(WORDS)}


def ids(text: str) -> list[int]:
    """One number a word."""
    return [IDS[word] for word in text.split()]


def text(numbers: list[int]) -> str:
    """The words up to the end."""
    words = [WORDS[number] for number in numbers]
    return " ".join(words[: words.index(END)] if END in words else [*words, "..."])


ANSWER = 1 + max(len(ids(s.answer)) for s in everything())  # tokens, the end included
LONGEST = max(len(ids(s.question)) for s in everything()) + ANSWER
