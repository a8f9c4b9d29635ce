"""MIA-NN (arXiv 2506.20893; in its ICML 2026 version CMIA): has a model ever known the class?

A model that never saw a class takes its samples for those of the class nearest to it. One that was
made to forget may spread them out, and is told apart by that, however low its forget accuracy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import by_keyword, integer, require
from .membership import balanced_regression
from .predictions import Predictions


class NearestClassAttack:
    """What retrained models say of the forgotten class's samples, and how far others are from it.

    The nearest class n has the largest mean probability over those samples, by the references. A
    logistic regression with balanced classes, on the references' probabilities of the classes other
    than the forgotten one, learns to tell samples of n from those of the rest, and is then asked
    about the forgotten class's samples: ``share`` is how many it takes for n. Each reference's own
    share is by a regression on the others.

    Departures: the paper was read through its reviews. Theirs is an SVM on logits; probabilities
    keep their scale from model to model. What they report is a difference of shares;
    ``distance`` is in units of what retrained models differ by.

    Args:
        references: predictions of at least three models retrained without the class, on the same
            samples of all classes, none of which a model was trained on.
        forgotten: the class.

    Raises:
        ValueError: fewer references, other samples, none of the class or of the nearest.
        ImportError: without scikit-learn.
    """

    @by_keyword
    def __init__(self, references: Sequence[Predictions], *, forgotten: int) -> None:
        enough = len(references) > 2
        require(enough, "references", "three or more", len(references), "retrain more models")
        labels, classes = references[0].labels, references[0].logits.shape[1]
        self.forgotten = integer("forgotten", forgotten, 0, classes - 1)
        require(classes > 2, "references", "logits of three or more classes", classes)
        self.chosen = labels == forgotten
        require(bool(self.chosen.any()), "references", f"samples of class {forgotten}", "none")
        self.labels = labels
        outputs = [self._outputs(p, "references") for p in references]
        mean = torch.stack([p[self.chosen].mean(0) for p in outputs]).mean(0)
        self.nearest = int(mean.argmax())
        self.nearest += self.nearest >= forgotten  # outputs have no column of the forgotten class
        near = self.labels == self.nearest
        rest = ~near & ~self.chosen
        both = bool(near.any()) and bool(rest.any())
        require(both, "references", f"samples of class {self.nearest} and of others", "none")
        self._attack = self._fit(outputs)
        without = [outputs[:i] + outputs[i + 1 :] for i in range(len(outputs))]
        pairs = zip(without, outputs, strict=True)
        shares = [self._share(self._fit(others), own) for others, own in pairs]
        self.shares = torch.tensor(shares, dtype=torch.float64)  # [references], of each left out

    @property
    def spread(self) -> float:
        """Standard deviation of the references' shares, at least the one sample they count in."""
        return max(float(self.shares.std()), 1.0 / int(self.chosen.sum()))

    def share(self, p: Predictions) -> float:
        """How many of the forgotten class's samples look like the nearest class's, 0 to 1.

        Raises:
            ValueError: predictions on other samples.
        """
        return self._share(self._attack, self._outputs(p, "p"))

    def distance(self, p: Predictions) -> float:
        """Of a model's share from the references' mean, in their spreads.

        One more retrained model is as far as a t variable with references - 1 degrees of freedom,
        times (1 + 1 / references)^0.5: with eight, beyond 4 once in 140 times.
        """
        return abs(self.share(p) - float(self.shares.mean())) / self.spread

    def _outputs(self, p: Predictions, name: str) -> Tensor:
        """Probabilities of the other classes, fp64 [samples, classes - 1]."""
        same = torch.equal(p.labels, self.labels)
        require(same, name, "predictions on the same samples in the same order", "other labels")
        kept = torch.arange(p.logits.shape[1]) != self.forgotten
        return p.logits[:, kept].double().softmax(1)

    def _fit(self, outputs: list[Tensor]) -> object:
        near = (self.labels == self.nearest)[~self.chosen]
        rows = torch.cat([p[~self.chosen] for p in outputs])
        return balanced_regression().fit(rows.numpy(), near.repeat(len(outputs)).numpy())

    def _share(self, attack: object, outputs: Tensor) -> float:
        return float(attack.predict(outputs[self.chosen].numpy()).mean())  # type: ignore[attr-defined]
