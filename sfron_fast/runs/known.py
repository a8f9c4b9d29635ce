"""What the model knows of each set before a run and after it, and what that says of the sets."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from ..data.batches import tensors_in
from ..data.kept_out import some_of
from ..errors import warn
from ..evaluation import task_accuracy
from ..models.buffers import keep_buffers, put_back
from .budget import mean_of

LOOKED = 128  # samples of each set, of all ranks
SIGMAS = 3.0  # of chance, between two accuracies of so many samples
UNKNOWN = 1.25  # times the holdout loss: a forget set that is known no better


class Known:
    """Some samples of each set, the same before and after."""

    def __init__(self, run: Any) -> None:
        self.run, self.sets = run, {}
        self.looked: dict[str, int] = {}  # samples, of all ranks
        with run.looking(), run.ranks.together():
            self.sets["forget"] = self._some(run.forget.loader, "forget")
            self.sets["retain"] = run.kept or self._some(run.retain.loader, "retain")
            if run.holdout is not None:
                self.sets["holdout"] = self._some(run.holdout, "holdout")

    def _some(self, loader: Iterable[Any], name: str) -> list[Any]:
        """This rank's part of the samples, in batches as they are drawn."""
        some: list[Any] = []
        task, ranks, found = self.run.task, self.run.ranks.size, 0
        for batch in some_of(loader, LOOKED):
            some.append(batch)
            found += task.samples(task.prepare(batch, self.run.device, name))
            if ranks * found >= LOOKED:
                break
        self.looked[name] = ranks * found
        return some

    def still(self, before: dict[str, float], after: dict[str, float]) -> str:
        """What a run has left of the forget set, where it is more than it should be.

        Beside a holdout set: what chance does not explain. Without one nobody knows what a model
        that never saw the forget set would say of it; half of what was known is then told, where
        losses did not reach the ceiling of the default recipe.
        """
        known, unseen = after.get("forget_accuracy"), after.get("holdout_accuracy")
        if known is None:
            return ""
        if unseen is not None:
            pairs = [(known, self.looked["forget"]), (unseen, self.looked["holdout"])]
            chance = sum(p * (100.0 - p) / count for p, count in pairs) ** 0.5
            beside = f"{known:.1f} % of it are right, and {unseen:.1f} % of the holdout set"
            return beside if known - unseen > SIGMAS * max(chance, 1.0) else ""
        run, end = self.run, math.inf
        if run.recipe.ceiling is not None and run.reference is not None:
            end = run.recipe.ceiling * run.reference
        few = known <= 0.5 * before.get("forget_accuracy", math.inf) or after["forget_loss"] >= end
        if run.chosen or few:
            return ""
        return (
            f"{known:.1f} % of it are right, which may be what a model knows that never saw it:"
            " only a holdout set tells (holdout=)"
        )

    def look(self) -> dict[str, float]:
        """Losses and accuracies now (``UnlearnResult.before``)."""
        run, found = self.run, {}
        kept = keep_buffers(run.model)
        accurate = run.task.tells_right(run.model)
        for name, batches in self.sets.items():
            with run.looking(), run.task.estimating(run.ranks.rank, run.ranks.size):
                loss = mean_of(run.ranks, batches, run.task, name)
                found[f"{name}_loss"] = loss.item()
            if accurate and loss.isfinite():
                with run.looking():
                    rest = name, run.task, run.ranks.group
                    found[f"{name}_accuracy"] = task_accuracy(run.model, batches, *rest)
        put_back(kept)
        return found

    def check(self, before: dict[str, float]) -> None:
        """Warn (RuntimeWarning) of sets that a run can do little with."""
        shared = shared_samples(*(self.run.__dict__[n].loader for n in ("forget", "retain")))
        if not shared:
            one, other = (set(digests(self.sets[name])) for name in ("forget", "retain"))
            shared = len(one & other)
        if shared:
            warn(
                f"forget and retain have samples in common ({shared} of those looked at): retain"
                " steps teach them again; take them out of the retain set"
            )
        forget, holdout = before["forget_loss"], before.get("holdout_loss")
        if forget < 0.0:
            warn(
                f"the forget losses are negative ({forget:.4g} on average): give losses, which fall"
                " as the model learns, not log-probabilities or rewards"
            )
        if holdout is not None and forget > UNKNOWN * holdout > 0.0:
            warn(
                "the model knows the forget set no better than the holdout set (mean losses"
                f" {forget:.4g} and {holdout:.4g} before the run): it has been forgotten before, or"
                " was never learnt, or the sets are swapped"
            )


def shared_samples(forget: Any, retain: Any) -> int:
    """How many samples two loaders have in common, where they say which they draw from one data
    set: by ``Subset``, a sampler with ``indices``, or the whole of it.
    """
    (one, first), (other, second) = _drawn(forget), _drawn(retain)
    return len(first & second) if one is not None and one is other else 0


def _drawn(loader: Any) -> tuple[Any, set[int]]:
    """The data set below all ``Subset``, and the numbers drawn from it; none where a sampler of
    another kind decides.
    """
    batches = getattr(loader, "batch_sampler", None)
    dataset: Any = getattr(loader, "dataset", None)
    sampler = batches.sampler if type(batches) is BatchSampler else None
    if isinstance(sampler, SubsetRandomSampler):
        drawn = [int(i) for i in sampler.indices]
    elif isinstance(sampler, (RandomSampler, SequentialSampler, DistributedSampler)):
        drawn = list(range(len(dataset)))
    else:
        return None, set()
    while isinstance(dataset, torch.utils.data.Subset):
        drawn = [int(dataset.indices[i]) for i in drawn]
        dataset = dataset.dataset
    return dataset, set(drawn)


def digests(batches: Iterable[Any]) -> Iterator[bytes]:
    """One for each sample: of its part of all tensors [samples, ...] in its batch."""
    for batch in batches:
        tensors = [t.detach() for t in tensors_in(batch) if isinstance(t, Tensor) and t.dim()]
        tensors = [t.cpu().contiguous() for t in tensors if t.layout == torch.strided]
        count = len(tensors[0]) if tensors else 0
        for i in range(count):
            sha = hashlib.sha256()
            for t in tensors:
                if len(t) == count:
                    row = t[i].reshape(-1)
                    sha.update(row.view(torch.uint8).numpy().tobytes() if row.numel() else b"")
            yield sha.digest()
