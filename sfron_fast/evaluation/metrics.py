"""Metrics of classification unlearning: FA, RA, TA, MIA, D_KL, Avg.D and RTE.

For FA, RA, TA and MIA the target is the value of a model retrained without the forget set: neither
high nor low is good by itself. Avg.D is the mean absolute gap to it. Definitions follow SFR-on
(Huang et al., NeurIPS 2024); where the authors' code computes something else than its text, the
docstring says so.
"""

import torch
from torch import Tensor, nn

from ..errors import by_keyword, require
from .membership import mia_entropy, mia_modified_entropy
from .predictions import Evaluated, Loader, Predictions, accuracy, collect

COMPARED = ("FA", "RA", "TA", "MIA")  # the metrics whose gaps to the reference make Avg.D
METRICS = (*COMPARED, "MIA_m", "D_KL_forget", "D_KL_retain", "D_KL_test", "Avg.D", "RTE")


def per_sample_loss(p: Predictions) -> Tensor:
    """Cross-entropy of each sample in nats, float64 [n].

    log(1 + exp(-margin)), margin over the logsumexp of the other classes: a confident sample has a
    small loss, where the float32 cross-entropy is 0 from a margin of about 17 on.
    """
    logits, at = p.logits.double(), p.labels[:, None]
    others = logits.scatter(1, at, -torch.inf).logsumexp(1)
    margin = logits.gather(1, at).squeeze(1) - others
    return torch.logaddexp(torch.zeros_like(margin), -margin)


def kl_divergence(reference: Predictions, unlearned: Predictions) -> float:
    """Mean over samples of KL(p_reference || p_unlearned) in nats.

    From float64 log-probabilities; the authors' code adds 1e-20 inside the logarithms, and reports
    the forget set only. inf where only `unlearned` switches a class off (-inf). Raises ValueError
    when the two did not see the same samples in the same order.
    """
    a, b = reference, unlearned
    same = a.logits.shape == b.logits.shape and torch.equal(a.labels, b.labels)
    if same and a.input_sums is not None and b.input_sums is not None:
        # The order of summation may differ between batch sizes; different samples differ by far
        # more.
        same = torch.allclose(a.input_sums, b.input_sums, rtol=1e-9, atol=1e-6, equal_nan=True)
    expected = "`reference` and `unlearned` on the same samples in the same order"
    found = (
        f"logits {tuple(a.logits.shape)} and {tuple(b.logits.shape)}, other labels or other inputs"
    )
    require(same, "kl_divergence", expected, found, "use shuffle=False and no random augmentation")
    p, q = a.logits.double().log_softmax(1), b.logits.double().log_softmax(1)
    # a class that the reference switches off adds nothing
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    # Rounding can leave a sample a few 1e-17 below zero.
    return float(terms.sum(1).clamp_min(0.0).mean())


def score(
    evaluated: Evaluated, reference: Evaluated | None = None, rte: float | None = None
) -> dict[str, float]:
    """`evaluate` for predictions made before.

    Raises ValueError when `reference` saw other samples.
    """
    metrics = _compared(evaluated)
    metrics["MIA_m"] = mia_modified_entropy(**_sets(evaluated))
    if reference is not None:
        theirs = _sets(reference)
        for name, predictions in _sets(evaluated).items():
            key = "D_KL_test" if name == "holdout" else f"D_KL_{name}"
            metrics[key] = kl_divergence(theirs[name], predictions)
        target = _compared(reference)
        metrics["Avg.D"] = sum(abs(metrics[name] - target[name]) for name in COMPARED) / len(
            COMPARED
        )
    if rte is not None:
        metrics["RTE"] = float(rte)
    return metrics


def _compared(evaluated: Evaluated) -> dict[str, float]:
    sets = _sets(evaluated)
    values = [accuracy(sets[name]) for name in ("forget", "retain", "holdout")]
    return dict(zip(COMPARED, [*values, mia_entropy(**sets)], strict=True))


def _sets(evaluated: Evaluated) -> dict[str, Predictions]:
    names = ("forget", "retain", "holdout")
    return {name: getattr(evaluated, name) for name in names}


@by_keyword
def evaluate(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    holdout: Loader,
    reference: nn.Module | Evaluated | None = None,
    rte: float | None = None,
) -> dict[str, float]:
    """Metrics of an unlearned classifier.

    FA, RA, TA (accuracy on forget, retain, holdout), MIA and MIA_m in percent. With `reference`,
    the retrained model or what `collect` returned for it, also D_KL_forget, D_KL_retain, D_KL_test
    in nats and Avg.D, the mean absolute gap over FA, RA, TA and MIA in percentage points; absent
    otherwise. RTE is `rte` in seconds, absent when not given: everything the method needs, its
    Fisher passes included, validation excluded (see `sfron_fast.runs.stopwatch`). A reference that
    was chosen by test accuracy makes D_KL and Avg.D depend on the test set. Raises as `collect` and
    `kl_divergence` do; ImportError without scikit-learn.
    """
    good = reference is None or isinstance(reference, (nn.Module, Evaluated))
    require(
        good,
        "reference",
        "a model, an Evaluated or None",
        type(reference).__name__,
        "see `collect`",
    )
    loaders = {"forget": forget, "retain": retain, "holdout": holdout}
    if isinstance(reference, nn.Module):
        reference = collect(reference, **loaders)
    return score(collect(model, **loaders), reference, rte)
