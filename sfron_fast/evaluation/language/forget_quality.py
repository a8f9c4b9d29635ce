"""Forget quality: can a model be told from one that has never seen the forget set?"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import require

EXACT = 4_000_000  # n m up to which all paths are counted: seconds


class ForgetQuality(NamedTuple):
    """Of a two-sample Kolmogorov-Smirnov test."""

    distance: float  # the largest gap between the two distribution functions, in [0, 1]
    p_value: float  # how likely such a gap is, or a larger one, if both are of one distribution


def forget_quality(ratios: Tensor, retrained: Tensor) -> ForgetQuality:
    """The Kolmogorov-Smirnov test of truth ratios [n] against a retrained model's [m].

    TOFU (Maini et al. 2024), section 2.2.2: the p value is the forget quality. A high one does not
    prove forgetting: a model whose retain set is ruined can pass. The distance orders models where
    all p values are tiny.

    Exact for n m <= 4,000,000, by the count of the paths that stay within the distance; by the
    limiting distribution beyond.

    Raises:
        ValueError: a side is no [samples], empty, or holds NaN.
    """
    for name, values in (("ratios", ratios), ("retrained", retrained)):
        good = values.dim() == 1 and len(values) > 0 and not bool(values.isnan().any())
        require(good, name, "truth ratios [samples] without NaN", list(values.shape))
    n, m = len(ratios), len(retrained)
    both = torch.cat([ratios, retrained])
    below = torch.searchsorted(ratios.sort().values, both, right=True)
    others = torch.searchsorted(retrained.sort().values, both, right=True)
    gap = int((below * m - others * n).abs().max())  # in steps of 1 / (n m)
    p_value = paths_that_reach(n, m, gap) if n * m <= EXACT else limit(n, m, gap)
    return ForgetQuality(gap / (n * m), p_value)


def paths_that_reach(n: int, m: int, gap: int) -> float:
    """The share of all orders of n and m values, each as likely, that reach the gap, in steps of
    1 / (n m).

    An order is a path from (0, 0) to (n, m); its gap at (i, j) is i m - j n. Counted are the paths
    that stay below, in integers, as the share may be 1e-200.
    """
    ways = [1 if j * n < gap else 0 for j in range(m + 1)]
    for j in range(1, m + 1):
        ways[j] = ways[j] and ways[j - 1]
    for i in range(1, n + 1):
        ways[0] = ways[0] if i * m < gap else 0
        for j in range(1, m + 1):
            ways[j] = ways[j] + ways[j - 1] if abs(i * m - j * n) < gap else 0
    every = math.comb(n + m, n)
    return (every - ways[m]) / every


def limit(n: int, m: int, gap: int) -> float:
    """The same for large samples: 2 sum over k of (-1)^(k-1) e^(-2 k^2 d^2 n m / (n + m))."""
    square = (gap / (n * m)) ** 2 * n * m / (n + m)
    if square < 0.04:  # 1 to twelve digits, where the series would need many terms
        return 1.0
    terms = ((-1) ** (k - 1) * math.exp(-2.0 * k * k * square) for k in range(1, 101))
    return min(1.0, 2.0 * sum(terms))
