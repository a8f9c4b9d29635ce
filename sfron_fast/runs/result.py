"""What a run of ``unlearn`` returns, and says of itself in one line."""

import math
from dataclasses import dataclass, field

from torch import nn

from ..saliency import words
from ..saliency.mask import SaliencyMask

SETS = ("forget", "retain", "holdout")


@dataclass(repr=False)
class UnlearnResult:
    """What ``unlearn`` did. ``model`` is the model passed in, changed in place; ``print`` shows
    ``summary()``.

    ``before`` and ``after`` hold ``forget_loss``, ``retain_loss`` and, of tasks that say what is
    right, ``forget_accuracy`` and ``retain_accuracy`` (percent), and with a holdout set the same of
    it: of the same samples both times, up to 128 of each set, in eval mode. Under a budget those of
    the retain set are the samples that were kept out of the run.
    """

    model: nn.Module
    mask: SaliencyMask
    history: list[dict[str, float]] = field(default_factory=list)  # one entry per evaluation
    seconds: float = 0.0  # Fisher and mask included, evaluations and checkpoints excluded
    skipped_steps: int = 0
    forgotten_steps: int = 0  # of them: forget steps whose samples had all reached the ceiling
    budget_spent: float | None = None  # of retain_budget, 1 = all of it, at the end of the run
    stopped_early: bool = False
    recipe: str = ""  # its name
    cycles: int = 0  # done
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # what the run has warned of

    def summary(self) -> str:
        """One line: loss and accuracy of each set before and after, and what it took."""
        parts = [self._change(name) for name in SETS if f"{name}_loss" in self.before]
        if self.budget_spent is not None:
            parts.append(f"{share_spent(self.budget_spent)} of the budget spent")
        parts.append(f"mask of {words.line(self.mask)}")
        parts.append(f"{self.cycles} cycles{' (stopped early)' if self.stopped_early else ''}")
        if self.forgotten_steps:
            parts.append(f"{self.forgotten_steps} forget steps past the ceiling")
        if self.skipped_steps > self.forgotten_steps:
            parts.append(f"{self.skipped_steps - self.forgotten_steps} steps skipped")
        parts.append(f"{self.seconds:.3g} s")
        if self.warnings:
            parts.append(f"{len(self.warnings)} warning{'s' * (len(self.warnings) > 1)}")
        return f"{self.recipe or 'unlearn'}: {'; '.join(parts)}"

    def __repr__(self) -> str:
        return f"<UnlearnResult {self.summary()}>"

    def __str__(self) -> str:
        return "\n".join([self.summary(), *(f"  warning: {said}" for said in self.warnings)])

    def _change(self, name: str) -> str:
        """``forget loss 0.012 -> 2.4, accuracy 100 -> 12 %``"""
        said = []
        for what, form, unit in (("loss", ".3g", ""), ("accuracy", ".1f", " %")):
            key = f"{name}_{what}"
            if key in self.before:
                first, last = self.before[key], self.after.get(key, math.nan)
                said.append(f"{what} {first:{form}} -> {last:{form}}{unit}")
        return f"{name} {', '.join(said)}"


def share_spent(spent: float) -> str:
    """Of a budget, in words: a loss that fell has cost nothing."""
    return f"{max(spent, 0.0):.0%}"
