"""Was it in the training data? Attacks on language models by the likelihood of single tokens, and
what their success says beside a retrained model's.
"""

import torch
from torch import Tensor

from ...errors import number, require
from .tokens import TokenStats

K = 0.4  # of the tokens: MUSE's and open-unlearning's choice
LEAST_VARIANCE = 1e-6  # of log p: open-unlearning's


def min_k(stats: TokenStats, k: float = K) -> Tensor:
    """The mean log-probability of the share k of a sample's tokens that is least likely.

    fp64 [samples]: high for what was learnt.

    Shi et al. 2024, "Min-K% Prob". Of n tokens max(1, floor(k n)) count; the last labelled one, the
    end of the sequence, is left out: open-unlearning.
    """
    stats = stats.without_last()
    return _least(stats, stats.logp, k)


def min_k_plus_plus(stats: TokenStats, k: float = K) -> Tensor:
    """``min_k`` of log-probabilities less their mean under the model, over their deviation.

    fp64 [samples]. Zhang et al. 2024, "Min-K%++": (log p(label) + entropy) / sqrt(variance).
    Variances below 1e-6 count as 1e-6: open-unlearning.
    """
    stats = stats.without_last()
    deviation = stats.variance.clamp_min(LEAST_VARIANCE).sqrt()
    return _least(stats, (stats.logp + stats.entropy) / deviation, k)


def auc(members: Tensor, others: Tensor) -> float:
    """How often a member's score [n] is above that of another sample [m], ties by half: the area
    under the ROC curve, in [0, 1]; .5 = no better than chance.

    Raises:
        ValueError: no score on a side, or NaN.
    """
    _scores(members, "members")
    _scores(others, "others")
    order = others.sort().values
    below = torch.searchsorted(order, members)
    not_above = torch.searchsorted(order, members, right=True)
    return float((below + not_above).double().mean() / (2 * len(others)))


def privleak(found: float, retrained: float) -> float:
    """How far an attack's AUC is from a retrained model's, in percent: 0 = none, -100 = the members
    are still known for certain, above 0 = they are too unlikely, which tells them as well.

    (retrained - found) / (1 - retrained) * 100: MUSE (Shi et al. 2024) has the AUC of non-members,
    1 - AUC. ``found`` and ``retrained`` from ``auc`` of forget set and holdout.

    Raises:
        ValueError: an AUC outside [0, 1], or a retrained model that knows members for certain.
    """
    found = number("found", found, 0.0, 1.0)
    retrained = number("retrained", retrained, 0.0, 1.0)
    remedy = "the reference was trained on the forget set"
    require(retrained < 1.0, "retrained", "an AUC below 1", retrained, remedy)
    return 100.0 * (retrained - found) / (1.0 - retrained)


def _least(stats: TokenStats, of: Tensor, k: float) -> Tensor:
    k = number("k", k, 0.0, 1.0, open_low=True)
    parts = stats.samples(of)
    return torch.stack([part.sort().values[: max(1, int(k * len(part)))].mean() for part in parts])


def _scores(scores: Tensor, name: str) -> None:
    found = f"{list(scores.shape)}, {int(scores.isnan().sum())} NaN"
    good = scores.dim() == 1 and len(scores) > 0 and not bool(scores.isnan().any())
    require(good, name, "scores [samples] without NaN", found)
