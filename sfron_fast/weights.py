"""Weights of published forget losses, from the losses that they weigh (docs/equations.md).

The gradient of such a loss is that of ``-(weights * losses).sum()`` over its normaliser, with the
weights constant, so that it is ascended like an adaptive loss. Losses [units] are negative
log-likelihoods in nats, of tokens or of whole sequences: sums over their labelled tokens, not
means. Weights [units] are detached, fp32 (fp64 for fp64), and not divided by anything; of units
without a label they mean nothing. A NaN loss has a NaN weight.

In ``linear_adaptive_cross_entropy(weigh=..., normalise=False)`` each labelled row is a token, or,
with a ``sample_index``, the losses are means: multiply them, and the weight, by the length.
"""

import torch
from torch import Tensor

from .errors import number, require
from .ops.dtypes import accumulate_dtype, wide

__all__ = [
    "ceu_weights",
    "dpo_weights",
    "npo_weights",
    "satimp_weights",
    "simnpo_weights",
    "wga_weights",
    "with_ceiling",
]

# half of fp32's step above 1: an fp32 cross-entropy is 0 or about twice this, or more
ODDS_FLOOR = 2.0**-24


def wga_weights(losses: Tensor, alpha: float = 1.0) -> Tensor:
    """p^alpha of WGA (arXiv 2502.19301): the loss is the mean over tokens of p^alpha log p, the
    power constant.

    Args:
        losses: [tokens], -log p of the label.
        alpha: >= 0; 0 is gradient ascent.

    Unit: token. Normaliser: the number of labelled tokens.

    Raises:
        ValueError: not [units] of a floating dtype, or alpha out of range.
    """
    number("alpha", alpha, 0.0)
    return (-alpha * _wide(losses)).exp()


def satimp_weights(losses: Tensor, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """p^beta1 (1 - p)^beta2 of SatImp (arXiv 2505.11953): the loss is the mean over tokens of that
    times log p, the powers constant.

    Args:
        losses: [tokens], -log p of the label.
        beta1: >= 0, for saturation.
        beta2: >= 0, for importance.

    Unit: token. Normaliser: the number of labelled tokens.

    Raises:
        ValueError: as ``wga_weights``.
    """
    number("beta1", beta1, 0.0)
    number("beta2", beta2, 0.0)
    known = _wide(losses)
    # 1 - exp(-l) would be 0 for what is best remembered
    return (-beta1 * known).exp() * (-torch.expm1(-known)).pow(beta2)


def ceu_weights(losses: Tensor, floor: float = ODDS_FLOOR) -> Tensor:
    """The odds p / (1 - p) of CE-U (arXiv 2503.01224): the loss is the mean over tokens of the
    cross-entropy to the model's own probabilities without the label's, constant.

    They are 1 / (exp(l) - 1), from ``expm1``, which p / (1 - p) in fp32 is not where p rounds to 1.

    Args:
        losses: [tokens], -log p of the label.
        floor: smallest loss used, > 0; by default only a loss that fp32 rounds to 0 is smaller. The
            weights are then at most 1 / floor.

    Unit: token. Normaliser: the number of labelled tokens.

    Raises:
        ValueError: as ``wga_weights``.
    """
    number("floor", floor, 0.0, open_low=True)
    return _wide(losses).clamp_min(floor).expm1().reciprocal()


def npo_weights(losses: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """2 sigmoid(beta (r - l)) of NPO (arXiv 2404.05868): the loss is the mean over sequences of
    -2 / beta log sigmoid(-beta log(p / p_ref)).

    Args:
        losses: [sequences], sums over the labelled tokens.
        reference: [sequences] r, the same losses by the model before unlearning
            (``reference_losses``).
        beta: > 0; towards 0 it is gradient ascent.

    Unit: sequence. Normaliser: the number of sequences.

    Raises:
        ValueError: as ``wga_weights``, or a reference of another shape.
    """
    number("beta", beta, 0.0, open_low=True)
    return 2.0 * (beta * (_beside("reference", reference, losses) - _wide(losses))).sigmoid()


def simnpo_weights(
    losses: Tensor, lengths: Tensor, beta: float = 2.5, gamma: float = 0.0
) -> Tensor:
    """2 / |y| sigmoid(gamma - beta l / |y|) of SimNPO (arXiv 2410.07163): the loss is the mean over
    sequences of -2 / beta log sigmoid(-beta / |y| log p - gamma).

    Args:
        losses: [sequences], sums over the labelled tokens.
        lengths: [sequences], |y|, how many these are; 0 counts as 1.
        beta: > 0.
        gamma: the margin, >= 0 (beta times the delta of open-unlearning).

    Unit: sequence. Normaliser: the number of sequences.

    Raises:
        ValueError: as ``wga_weights``, or lengths of another shape.
    """
    number("beta", beta, 0.0, open_low=True)
    number("gamma", gamma, 0.0)
    tokens = _beside("lengths", lengths, losses).clamp_min(1)
    return 2.0 * (gamma - beta * (_wide(losses) / tokens)).sigmoid() / tokens


def dpo_weights(
    losses: Tensor,
    other: Tensor,
    reference: Tensor,
    other_reference: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """beta sigmoid(beta ((l - r) - (l' - r'))) of DPO (arXiv 2305.18290, equation 7): the loss is
    the mean over pairs of -log sigmoid(beta (log(p / p_ref) - log(p' / p'_ref))).

    A pair has one weight w: its preferred answer is learnt with it and the other forgotten. The
    gradient is that of ``+(w * losses).sum() - (w * other).sum()`` over the normaliser.

    Args:
        losses: [pairs] l of the preferred answers, sums over their labelled tokens.
        other: [pairs] l' of the answers to forget.
        reference, other_reference: [pairs] r and r', the same by the model before unlearning.
        beta: > 0. Open-unlearning's loss is 2 / beta times this one.

    Unit: pair of sequences; the weight needs both, so ``linear_logp`` is its head, not ``weigh=``.
    Normaliser: the number of pairs.

    Raises:
        ValueError: as ``wga_weights``, or others of another shape.
    """
    number("beta", beta, 0.0, open_low=True)
    learnt = _wide(losses) - _beside("reference", reference, losses)
    kept = _beside("other", other, losses) - _beside("other_reference", other_reference, losses)
    return beta * (beta * (learnt - kept)).sigmoid()


def with_ceiling(
    weights: Tensor, losses: Tensor, ceiling: float, reference: float | Tensor
) -> Tensor:
    """``weights``, but 0 where a loss has reached ceiling * reference: that unit has forgotten
    enough.

    The others keep theirs: a normaliser is taken before, so that they do not grow as the units that
    are left become few (a rule of ``weigh=`` returns both: ``with_ceiling(raw, losses, 1.0,
    reference), raw``). A NaN loss keeps its weight.

    Args:
        weights, losses: [units].
        ceiling: > 0, in units of the reference.
        reference: the loss of what the model has never seen (its mean on the holdout set), > 0 and
            finite, or one for each unit [units]; as the losses are, of tokens, sums or means.

    Raises:
        ValueError: another shape, or a number out of range.
    """
    number("ceiling", ceiling, 0.0, open_low=True)
    known = _wide(losses)
    _beside("weights", weights, losses)
    if isinstance(reference, Tensor) and reference.dim():
        limit: float | Tensor = ceiling * _beside("reference", reference, losses)
    else:
        limit = ceiling * number("reference", reference, 0.0, open_low=True)
    return weights.detach().masked_fill(known >= limit, 0.0)


def _wide(losses: Tensor) -> Tensor:
    """Detached, at least fp32."""
    require(losses.dim() == 1, "losses", "[units]", tuple(losses.shape))
    require(losses.is_floating_point(), "losses", "a floating dtype", losses.dtype)
    return wide(losses.detach())


def _beside(argument: str, values: Tensor, losses: Tensor) -> Tensor:
    """Another number of each unit, as the losses are."""
    found: object = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    require(found == tuple(losses.shape), argument, f"shape {tuple(losses.shape)}", found)
    return values.detach().to(losses.device, accumulate_dtype(losses.dtype))
