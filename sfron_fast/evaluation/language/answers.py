"""How well a model knows answers: probability, truth ratio, memorization, utility.

Of TOFU (Maini et al. 2024) and of open-unlearning (Dorna et al. 2025), whose code decides where a
paper leaves something open; a docstring says where.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ...errors import require
from .tokens import TokenStats


def answer_loss(stats: TokenStats) -> Tensor:
    """The mean loss of each sample's labelled tokens, fp64 [samples]."""
    return -stats.mean(stats.logp)


def answer_probability(stats: TokenStats) -> Tensor:
    """p(answer | question)^(1 / tokens), fp64 [samples] in [0, 1]: TOFU, section 2.2.1.

    The end-of-sequence token counts where it is labelled.
    """
    return (-answer_loss(stats)).exp()


def option_probability(right: TokenStats, wrong: TokenStats) -> Tensor:
    """The share of the right answer in the probabilities of all options, fp64 [samples]: TOFU's
    probability on real authors and world facts.

    ``wrong`` has the wrong answers to each question one after the other, as many for each.
    """
    p = answer_probability(right)
    return p / (p + answer_probability(wrong).view(-1, _wrong_each(right, wrong)).sum(1))


def truth_ratio(right: TokenStats, wrong: TokenStats) -> Tensor:
    """How likely wrong answers are beside the right one, fp64 [samples]: below 1 for who knows it.

    exp(mean of the wrong answers' log-probabilities - the right answer's), each a mean over tokens:
    open-unlearning's ``truth_ratio``. The mean of logarithms makes it the wrong answers' geometric
    mean; TOFU's text has the arithmetic one. The right answer is the paraphrased one where there is
    one. ``wrong`` as in ``option_probability``.
    """
    each = _wrong_each(right, wrong)
    return (answer_loss(right) - answer_loss(wrong).view(-1, each).mean(1)).exp()


def closer_to_one(ratios: Tensor) -> float:
    """min(r, 1/r), mean over samples: the truth ratio of a forget set. TOFU, section 2.2.2."""
    return float(torch.minimum(ratios, 1.0 / ratios).mean())


def true_is_better(ratios: Tensor) -> float:
    """max(0, 1 - r), mean over samples: the truth ratio where answers shall be known. TOFU, section
    2.2.1.
    """
    return float((1.0 - ratios).clamp_min(0.0).mean())


def model_utility(values: Iterable[float]) -> float:
    """The harmonic mean: TOFU's of probability, ROUGE-L recall and truth ratio on the retain set,
    real authors and real world, nine values; 0 if one is 0.

    Raises:
        ValueError: none, or one that is not in [0, 1].
    """
    parts = list(values)
    bad = [value for value in parts if not 0.0 <= value <= 1.0]
    require(bool(parts) and not bad, "values", "numbers in [0, 1]", bad or "none")
    if min(parts) == 0.0:
        return 0.0
    return len(parts) / sum(1.0 / value for value in parts)


def exact_memorization(stats: TokenStats) -> Tensor:
    """The share of an answer's tokens that the model puts first, given all before, fp64 [samples].

    Tirumala et al. 2022. The last labelled token, the end of the sequence, does not count:
    open-unlearning.
    """
    stats = stats.without_last()
    return stats.mean(stats.correct)


def extraction_strength(stats: TokenStats) -> Tensor:
    """1 - k / tokens, k the least prefix after which all the rest is put first, fp64 [samples].

    Carlini et al. 2021, as open-unlearning computes it: the last labelled token, the end of the
    sequence, does not count; and k ends at tokens - 1, so the least value is 1 / tokens, of an
    answer whose last token is wrong as of one of which the last token alone is right.
    """
    stats = stats.without_last()
    found = []
    for correct in stats.samples(stats.correct):
        wrong = (~correct).nonzero().flatten()
        prefix = int(wrong[-1]) + 1 if len(wrong) else 0
        found.append(1.0 - min(prefix, len(correct) - 1) / len(correct))
    return torch.tensor(found, dtype=torch.float64)


def _wrong_each(right: TokenStats, wrong: TokenStats) -> int:
    """How many wrong answers there are to each question."""
    questions, answers = len(right.lengths), len(wrong.lengths)
    expected = f"as many wrong answers to each of {questions} questions"
    require(answers > 0 and answers % questions == 0, "wrong", expected, answers)
    return answers // questions
