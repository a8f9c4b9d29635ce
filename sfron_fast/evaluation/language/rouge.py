"""ROUGE-L: how much of a reference text comes back, in its order (Lin 2004)."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ...errors import require

_WORD = re.compile(r"[^\W_]+")


class Rouge(NamedTuple):
    """Of the longest common subsequence of words; each in [0, 1]."""

    recall: float  # over the words of the reference
    precision: float  # over those of the text
    f1: float


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)  # of what was seen of `first`, with each prefix of `second`
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def rouge_l(text: str, reference: str) -> Rouge:
    """ROUGE-L of a generated text against a reference; all 0 if there is nothing in common.

    Words are compared as they stand. The package ``rouge_score``, with which TOFU and
    open-unlearning report, first cuts English endings off ("printed", "printing": "print"), and
    knows ASCII letters only: its figures may be a little higher.

    Raises:
        ValueError: a reference without words.
    """
    wanted, told = words(reference), words(text)
    require(bool(wanted), "reference", "a text with words in it", repr(reference))
    shared = common(wanted, told)
    if shared == 0:
        return Rouge(0.0, 0.0, 0.0)
    recall, precision = shared / len(wanted), shared / len(told)
    return Rouge(recall, precision, 2.0 * recall * precision / (recall + precision))
