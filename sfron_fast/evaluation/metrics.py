"""Metrics of classification unlearning: FA, RA, TA, MIA, D_KL, Avg.D and RTE.

For FA, RA, TA and MIA the target is the value of a model retrained without the forget set: neither
high nor low is good by itself. Avg.D is the mean absolute gap to it. Definitions follow SFR-on
(Huang et al., NeurIPS 2024); where the authors' code computes something else than its text, the
docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import call, model_device, move
from ..errors import by_keyword, require
from ..models.modes import evaluating
from ..tasks import Task
from ..tasks.classification import check_logits

Loader = Iterable[Any]  # of batches (inputs, labels); read twice when the reference is a model
COMPARED = ("FA", "RA", "TA", "MIA")  # the metrics whose gaps to the reference make Avg.D
METRICS = (*COMPARED, "MIA_m", "D_KL_forget", "D_KL_retain", "D_KL_test", "Avg.D", "RTE")


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says about one data set.

    `logits` float32 on the CPU [n, classes]; `labels` int64 on the CPU [n]; `input_sums` float64
    [n] or None: each input's sum (NaN: unknown), by which `kl_divergence` notices that two models
    saw different samples. Raises ValueError for other shapes or types, non-finite logits, labels
    outside [0, classes).
    """

    logits: Tensor
    labels: Tensor
    input_sums: Tensor | None = None

    def __post_init__(self) -> None:
        check_logits(self.logits, self.labels, "Predictions")
        found = [(t.dtype, t.device.type) for t in (self.logits, self.labels)]
        expected = [(torch.float32, "cpu"), (torch.int64, "cpu")]
        require(
            found == expected,
            "Predictions",
            f"{expected}",
            found,
            "use .float(), .long() and .cpu()",
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluated:
    """One model's predictions on the three sets.

    Keep the reference's: it then runs once for all methods.
    """

    forget: Predictions
    retain: Predictions
    holdout: Predictions


def predict(model: nn.Module, loader: Loader) -> Predictions:
    """Run `model` on its own device, in eval mode without gradients, over batches (inputs, labels).

    Inputs are what `unlearn` takes: tensors or nests of them; a mapping is unpacked,
    `model(**inputs)`. Batches without samples are skipped. A logit may be -inf: its class is
    switched off.

    Every submodule's training flag is put back, also after an error. Raises ValueError for an empty
    loader, labels outside [0, classes), and logits that are not finite floats [batch, classes].
    """
    return predict_named(model, loader, "loader")


def predict_named(model: nn.Module, loader: Loader, name: str) -> Predictions:
    """`predict`, with errors about the loader called `name`."""
    device = model_device(model)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(model), torch.no_grad():
        for batch in loader:
            inputs, target = move(batch, device, name)
            if not len(target):
                continue
            output = call(model, inputs)
            check_logits(output, target, name)
            plain = (
                isinstance(inputs, Tensor)
                and not inputs.is_complex()
                and len(inputs) == len(target)
            )
            rows = (
                inputs.reshape(len(target), -1)
                if plain
                else torch.full((len(target), 1), torch.nan)
            )
            sums = rows.sum(1, dtype=torch.float64)
            parts.append((output.float().cpu(), target.long().cpu(), sums.cpu()))
    require(
        bool(parts),
        name,
        "at least one batch",
        "none",
        "pass a DataLoader or list, not a generator",
    )
    widths = sorted({logits.shape[1] for logits, _, _ in parts})
    require(
        len(widths) == 1,
        name,
        "the same classes in every batch",
        widths,
        "evaluate one head at a time",
    )
    return Predictions(*map(torch.cat, zip(*parts, strict=True)))


@by_keyword
def collect(model: nn.Module, *, forget: Loader, retain: Loader, holdout: Loader) -> Evaluated:
    """`predict` on the three sets. Use test-time transforms and shuffle=False.

    Raises as `predict` does.
    """
    loaders = {"forget": forget, "retain": retain, "holdout": holdout}
    return Evaluated(**{name: predict_named(model, data, name) for name, data in loaders.items()})


def accuracy(p: Predictions) -> float:
    """Top-1 accuracy in percent, 0 to 100."""
    return 100.0 * int((p.logits.argmax(1) == p.labels).sum()) / len(p.labels)


def task_accuracy(model: nn.Module, loader: Loader, name: str, task: Task) -> float:
    """Units that the model gets right, in percent, 0 to 100, over the batches of ``loader``.

    Raises ValueError for a loader without samples, and for a task that does not say what is right.
    """
    device = model_device(model)
    parts: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for drawn in loader:
            batch = task.prepare(drawn, device, name)
            if task.samples(batch):
                parts.append(task.correct(task.outputs(model, batch), batch, name).cpu())
    remedy = "pass a DataLoader or list, not a generator"
    require(bool(parts), name, "at least one batch", "none", remedy)
    right = torch.cat(parts)
    return 100.0 * int(right.sum()) / len(right)


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
    terms = torch.where(
        p == -torch.inf, 0.0, p.exp() * (p - q)
    )  # a class that the reference switches off adds nothing
    # Rounding can leave a sample a few 1e-17 below zero.
    return float(terms.sum(1).clamp_min(0.0).mean())


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


def _membership(retain: Tensor, test: Tensor, forget: Tensor) -> float:
    try:
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "the membership attacks need scikit-learn: pip install sfron-fast[eval]"
        ) from error
    # No multi_class: recent scikit-learn removed it. With tiny entropies the default tolerance is
    # met at coefficients of zero, which calls everybody a non-member. Centring helps the solver and
    # changes no optimum: the intercept is not penalised.
    centre = (retain.mean() + test.mean()) / 2
    attack = LogisticRegression(class_weight="balanced", solver="lbfgs", tol=1e-10, max_iter=1000)
    member = torch.cat([torch.ones(len(retain)), torch.zeros(len(test))])
    attack.fit((torch.cat([retain, test]) - centre)[:, None].numpy(), member.numpy())
    return 100.0 * float(attack.predict((forget - centre)[:, None].numpy()).mean())


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

    FA, RA, TA (accuracy on forget, retain, holdout), MIA and MIA_m in percent. With `reference`, the
    retrained model or what `collect` returned for it, also D_KL_forget, D_KL_retain, D_KL_test in
    nats and Avg.D, the mean absolute gap over FA, RA, TA and MIA in percentage points; absent
    otherwise. RTE is `rte` in seconds,
    absent when not given: everything the method needs, its Fisher passes included, validation
    excluded (see `stopwatch.Stopwatch`). A reference that was chosen by test accuracy makes D_KL
    and Avg.D depend on the test set. Raises as `collect` and `kl_divergence` do; ImportError
    without scikit-learn.
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
