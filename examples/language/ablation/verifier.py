"""Exact arithmetic that no model and no ablation sees: is this text a derivation of the sum?"""

from collections.abc import Sequence
from typing import NamedTuple

P = 97


class Judged(NamedTuple):
    """Whether the answer is right; and whether each step to it was, none left out."""

    answer: bool
    derived: bool


WRONG = Judged(False, False)


def judge(a: int, b: int, text: Sequence[str]) -> Judged:
    """Of the tokens that follow the question: pairs with ";" between them, then "end".

    Written apart from what makes the training texts: it adds and compares.
    """
    words = list(text)
    if "end" not in words:
        return WRONG
    words = words[: words.index("end")]
    firsts, seconds, marks = words[::3], words[1::3], words[2::3]
    numbers = all(word.isdigit() for word in firsts + seconds)
    if not numbers or len(words) % 3 != 2 or any(mark != ";" for mark in marks):
        return WRONG
    found = [(int(x), int(y)) for x, y in zip(firsts, seconds, strict=True)]
    right = found[-1] == ((a + b) % P, 0)
    before = [(a, b), *found[:-1]]
    each = all(now == ((x + 1) % P, y - 1) for (x, y), now in zip(before, found, strict=True))
    return Judged(right, right and each)
