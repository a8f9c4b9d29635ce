"""The watch over a run: forget and validation accuracy along it, and what to do about
over-forgetting.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..data.labels import share_no_label
from ..errors import NO_NUMBER, require, warn
from ..evaluation import task_accuracy
from ..models.modes import evaluating
from .best import Best
from .budget import mean_of

Metric = Callable[[nn.Module], float]
Entry = dict[str, float]
StopWhen = Callable[[Entry], bool]
OURS = (
    "cycle",
    "skipped_steps",
    "forget_accuracy",
    "val_accuracy",
    "forget_loss",
    "val_loss",
)


def check_metrics(
    metrics: Mapping[str, Metric] | None, stop_when: StopWhen | None, every: int
) -> None:
    """Raise ValueError for metrics and a stop that could never be asked."""
    asked = every > 0
    require(asked or not metrics, "eval_every", "an integer > 0, with metrics", every)
    require(asked or stop_when is None, "eval_every", "an integer > 0, with stop_when", every)
    named = metrics is None or isinstance(metrics, Mapping)
    require(named, "metrics", "functions by name, {name: metric}", type(metrics).__name__)
    for name, metric in (metrics or {}).items():
        require(name not in OURS, "metrics", f"other names than {', '.join(OURS)}", repr(name))
        require(callable(metric), "metrics", f"a function for {name!r}", type(metric).__name__)
    good = stop_when is None or callable(stop_when)
    require(good, "stop_when", "a function of an entry", type(stop_when).__name__)


class Guard:
    """Evaluates along the run; warns or stops when the forget accuracy falls below the floor.

    Where nobody says, the floor is the validation accuracy before the run; or there is none, if the
    retain set is known to lack the classes of the forget set: they shall go.
    """

    def __init__(
        self,
        run: Any,
        holdout: Iterable[Any] | None,
        every: int,
        floor: float | None,
        action: str,
        metrics: Mapping[str, Metric],
        stop_when: StopWhen | None,
        best: Best | None,
    ) -> None:
        self.run, self.holdout, self.every = run, holdout, every
        self.action, self.warned = action, False
        self.metrics, self.stop_when = metrics, stop_when
        self.accuracies, self.best = run.task.has("correct"), best
        if every and floor is None and share_no_label(run.forget.loader, run.retain.loader):
            floor = 0.0
        if every and floor is None and holdout is not None:
            floor = run.result.history[0].get("val_accuracy") if run.result.history else None
        self.floor = floor
        if every and (not run.result.history or (self.floor is None and holdout is not None)):
            first = self._measure(run.cycle)
            self.floor = first.get("val_accuracy") if floor is None else floor
            self._keep(first)
        self.began = run.result.history[0] if every else {}

    def _measure(self, cycle: int) -> dict[str, float]:
        entry: dict[str, float] = {
            "cycle": cycle,
            "skipped_steps": self.run.optimizer.skipped_steps,
        }
        run = self.run
        rest = run.task, run.ranks.group
        with run.looking():
            if self.accuracies:
                forget = run.forget.aside()
                entry["forget_accuracy"] = task_accuracy(run.model, forget, "forget", *rest)
                if self.holdout is not None:
                    entry["val_accuracy"] = task_accuracy(run.model, self.holdout, "holdout", *rest)
            else:
                forget = run.forget.aside()
                entry["forget_loss"] = mean_of(run.ranks, forget, run.task, "forget").item()
                if self.holdout is not None:
                    loss = mean_of(run.ranks, self.holdout, run.task, "holdout")
                    entry["val_loss"] = loss.item()
            for name, metric in self.metrics.items():
                with evaluating(run.model), torch.no_grad():
                    value = metric(run.model)
                try:
                    entry[name] = float(value)
                except NO_NUMBER:
                    require(False, f"metrics[{name!r}]", "a function that returns a number", value)
        self.run.result.history.append(entry)
        return entry

    def due(self, cycle: int) -> bool:
        """Whether the end of this cycle is evaluated."""
        return self.every > 0 and cycle % self.every == 0

    def look(self, cycle: int) -> None:
        """Evaluate, if it is due, and warn or stop."""
        if not self.due(cycle):
            return
        entry = self._measure(cycle)
        self._keep(entry)
        if self.stop_when is not None and self.stop_when(dict(entry)):
            self.run.result.stopped_early = True
        if self.floor is None or entry.get("forget_accuracy", self.floor) >= self.floor:
            return
        if self.began.get("forget_accuracy", self.floor) < self.floor:
            return  # it did not fall there
        stops = self.action == "stop"
        remedy = "lower forget_weight or cycles, or pass over_forgetting='stop'"
        done = self._stop() if stops else remedy
        if stops or not self.warned:
            self.warned = True
            warn(
                f"over-forgetting: forget accuracy {entry['forget_accuracy']:.1f} % fell below"
                f" {self.floor:.1f} % in cycle {cycle}; {done} (right where a whole class or wrong"
                " labels are to go: then forget_floor=0)"
            )

    def _keep(self, entry: Entry) -> None:
        if self.best is not None:
            self.best.consider(entry, self.floor or 0.0)

    def _stop(self) -> str:
        """End the run at its best evaluated state; what was done about it."""
        self.run.result.stopped_early = True
        found = None if self.best is None else self.best.restore()
        if found is None:
            return "the run has stopped there"
        accuracy, cycle = found["forget_accuracy"], found["cycle"]
        return f"the run has stopped, at its state of cycle {cycle:g} ({accuracy:.1f} %)"
