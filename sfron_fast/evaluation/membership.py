"""Membership attacks: which samples of a set a model seems to have been trained on."""

from typing import Any

import torch
from torch import Tensor

from ..errors import by_keyword
from .predictions import Predictions


def _log_probabilities(p: Predictions) -> Tensor:
    """float64; -1000 for a class that is switched off, whose probability is 0 all the same, so that
    0 log 0 is 0.
    """
    logp = p.logits.double().log_softmax(1)
    return logp.where(logp > -torch.inf, -1000.0)


def entropy(p: Predictions) -> Tensor:
    """Entropy of each prediction in nats, float64 [n]."""
    logp = _log_probabilities(p)
    return -(logp.exp() * logp).sum(1)


def modified_entropy(p: Predictions) -> Tensor:
    """Modified prediction entropy in nats, float64 [n], low for a confident correct prediction.

    -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i) (Song & Mittal, USENIX Security 2021);
    each score depends on its own sample alone. The formula in the code that SalUn, SFR-on and
    DualOptim share has log p_i where log(1 - p_i) is meant, and depends on the whole set.
    """
    logp = _log_probabilities(p)
    # 1 - p cancels only for the largest p, so there it is the sum of the others.
    top = logp.argmax(1, keepdim=True)
    rest = logp.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    log_not = torch.log1p(-logp.exp()).scatter(1, top, rest)
    at = p.labels[:, None]
    wrong = (logp.exp() * log_not).scatter(1, at, 0.0).sum(1)
    return -(log_not.exp() * logp).gather(1, at).squeeze(1) - wrong


@by_keyword
def mia_entropy(*, forget: Predictions, retain: Predictions, holdout: Predictions) -> float:
    """Forget samples that look like members, in PERCENT (0 to 100).

    The authors' attack: logistic regression with balanced classes on the prediction entropy, fitted
    to retain = member and holdout = non-member (in sample: no held-out split), applied to forget.
    Their code returns the fraction; percent makes the gap comparable with the accuracies in Avg.D.
    ImportError without scikit-learn.
    """
    return _membership(entropy(retain), entropy(holdout), entropy(forget))


@by_keyword
def mia_modified_entropy(
    *, forget: Predictions, retain: Predictions, holdout: Predictions
) -> float:
    """As `mia_entropy`, in PERCENT, on the modified entropy, which knows the label."""
    return _membership(*(modified_entropy(p) for p in (retain, holdout, forget)))


def balanced_regression() -> Any:
    """scikit-learn's logistic regression with balanced classes: what the attacks are made of.

    ImportError without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "the membership attacks need scikit-learn: pip install sfron-fast[eval]"
        ) from error
    # No multi_class: recent scikit-learn removed it. With tiny entropies the default tolerance is
    # met at coefficients of zero, which calls everybody a non-member.
    return LogisticRegression(class_weight="balanced", solver="lbfgs", tol=1e-10, max_iter=1000)


def _membership(retain: Tensor, test: Tensor, forget: Tensor) -> float:
    # Centring helps the solver and changes no optimum: the intercept is not penalised.
    centre = (retain.mean() + test.mean()) / 2
    attack = balanced_regression()
    member = torch.cat([torch.ones(len(retain)), torch.zeros(len(test))])
    attack.fit((torch.cat([retain, test]) - centre)[:, None].numpy(), member.numpy())
    return 100.0 * float(attack.predict((forget - centre)[:, None].numpy()).mean())
