"""What a run of ``unlearn`` says about itself: a warning where it did nothing; counting waits for
no device.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.shards import whole
from ..errors import warn
from .result import UnlearnResult, share_spent
from .step_losses import StepLosses

# a cross-entropy that rises by less has forgotten nothing: the label is as probable within 1 %
NATS = 0.01
UNSPENT = 0.5  # of the budget: a larger one would have changed little
SHARE = 0.01  # the same for a loss of the caller's, in units of itself
_LISTS = ("losses", "norms", "retained", "reached")
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> Tensor:
    """Sums over the bits of each parameter, int64; another one means other weights. Of a sharded
    model every rank asks.
    """
    with torch.no_grad():
        words = [
            whole(p.detach()).view(WORDS.get(p.element_size(), torch.uint8))
            for p in model.parameters()
        ]
        return (
            torch.stack([w.sum(dtype=torch.int64).cpu() for w in words])
            if words
            else torch.zeros(0)
        )


class Outcome:
    """Along a run: the forget losses, and which steps were finite.

    At its end: what it did not do.
    """

    def __init__(self, asked: StepLosses) -> None:
        self.asked, self.model, self.recipe = asked, asked.model, asked.recipe
        self.draws = asked.task.has("reseeded")
        self.first: tuple[Any, bool, Tensor] | None = None  # none after a resumption
        self.before = fingerprint(self.model)
        self.losses: list[Tensor] = []  # [] each: the mean of a forget batch before its step
        self.norms: list[Tensor] = []  # of the masked forget gradients
        self.retained: list[Tensor] = []  # bool: the retain step was done
        self.reached: list[Tensor] = []  # bool: all samples of a forget step were at the ceiling
        self.pass_length = 0  # forget batches of a pass; 0 = no whole pass yet

    def begin(self, batch: Any, here: bool) -> None:
        """Before the first step, on its forget batch, where the task draws: there a loss says more
        about the draw than about the model, so this one is asked again at the end, as drawn.
        """
        self.first = batch, here, self.asked.typical(batch, here)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, so that a resumed run is judged as a whole."""
        lists = {name: _numbers(getattr(self, name)) for name in _LISTS}
        return {**lists, "pass_length": self.pass_length, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        for name in _LISTS:  # a checkpoint of before there was a ceiling has none of it
            setattr(self, name, list(state.get(name, torch.zeros(0)).unbind()))
        self.pass_length, self.before = state["pass_length"], state["before"].cpu()

    @property
    def forgotten(self) -> int:
        """Forget steps skipped because all of their samples were at the ceiling."""
        return int(_numbers(self.reached).sum())

    def judge(
        self, result: UnlearnResult, floor: float | None, budget: float | None, still: str
    ) -> None:
        """Warn (RuntimeWarning) of what the run did not do: once, of the first cause that fits.
        ``still``: what is left of the forget set, if it is too much.
        """
        found = self._nothing() or self._diverged(result.after)
        if not found:
            nothing = self._forgot_nothing(result, floor)
            part = f"the forget set was forgotten in part: {still}" if still else ""
            more = self._more(budget, result.budget_spent)
            found = f"{nothing or part}; to forget more, {more}" if nothing or part else ""
        if found:
            warn(found)

    def _more(self, budget: float | None, spent: float | None) -> str:
        """What to change for a run that is to forget more: what has ended its forgetting."""
        if 2 * self.forgotten > len(self.losses):
            return "raise the recipe's ceiling: most forget steps were past it"
        if budget is None:
            clip = "" if self.recipe.max_norm is None else f"max_norm ({self.recipe.max_norm:g}), "
            return (
                f"raise {clip}forget_lr or forget_weight (choose them on validation data), or"
                " lower retain_steps"
            )
        if spent is not None and spent < UNSPENT:
            return (
                f"take more cycles ({self.recipe.cycles}), or raise forget_lr:"
                f" {share_spent(spent)} of retain_budget was spent"
            )
        return f"raise retain_budget ({budget:g}), or take more cycles ({self.recipe.cycles})"

    def _nothing(self) -> str:
        norms, retained = _numbers(self.norms), _numbers(self.retained)
        remedy = "look for NaN or inf in the data, and for a diverged model"
        if len(norms) and not norms.isfinite().any():
            return (
                f"nothing was forgotten: all {len(norms)} forget steps had gradients that are not"
                f" finite; {remedy}"
            )
        if len(retained) and not retained.any():
            return (
                f"nothing was retained: all {len(retained)} retain steps had losses that are not"
                f" finite; {remedy}"
            )
        if self.reached and self.forgotten == len(self.losses):
            return (
                f"nothing was forgotten: in all {len(self.losses)} forget steps the losses were at"
                " the ceiling; look at the recipe's ceiling and reference_loss"
            )
        if len(norms) and not norms.nan_to_num(1.0).any():
            return (
                f"nothing was forgotten: in all {len(norms)} forget steps the gradient of the"
                " selected weights was zero; look at forget_weight, at the mask"
                " (result.mask.summary()), and whether the loss depends on these weights"
            )
        if torch.equal(self.before, fingerprint(self.model)):
            return (
                "the run changed no weight: its updates round to nothing; raise lr and forget_lr "
                f"(lr {self.recipe.lr}, forget_lr {self.recipe.forget_lr})"
            )
        return ""

    def _diverged(self, after: dict[str, float]) -> str:
        bad = [name for name in ("forget", "retain") if not math.isfinite(after[f"{name}_loss"])]
        return (
            f"the model is lost: its losses of the {' and '.join(bad)} set are not finite after the"
            " run; lower forget_lr or forget_weight, or set max_norm"
            if bad
            else ""
        )

    def _forgot_nothing(self, result: UnlearnResult, floor: float | None) -> str:
        history = result.history
        first = history[0].get("forget_accuracy", 0.0) if len(history) > 1 else 0.0
        if first > (floor or 0.0):  # it could fall
            last = history[-1]["forget_accuracy"]
            fell = f"the forget accuracy was {first:.1f} % before and {last:.1f} % after"
            return "" if last < first else f"nothing was forgotten: {fell}"
        if self.forgotten:
            return ""  # the ceiling was reached, and losses need not rise further
        what, first, last = self._losses(result)
        risen = last - first if self.recipe.objective == "ascent" else first - last
        if risen < (NATS if self.asked.task.in_nats else SHARE * abs(first)):
            own = self.asked.task.in_nats is False and self.recipe.objective == "ascent"
            wrong = own and risen < -0.1 * abs(first)
            sign = " (it fell: look at the sign of the loss)" if wrong else ""
            return (
                f"nothing was forgotten: the loss of the {what} was {first:.4g} at first and"
                f" {last:.4g} at the end{sign}"
            )
        return ""

    def _losses(self, result: UnlearnResult) -> tuple[str, float, float]:
        """Of the same samples at both ends of the run; NaN where there are none."""
        if self.first is not None:
            batch, here, before = self.first
            what = "first forget batch, with the same draws,"
            return what, before.item(), self.asked.typical(batch, here).item()
        losses, length = _numbers(self.losses), self.pass_length
        if self.draws:
            return "", math.nan, math.nan
        if not length or len(losses) < 2 * length:  # no sample was seen twice
            key = "forget_loss"
            return "forget set", result.before.get(key, math.nan), result.after[key]
        first, last = losses[:length].nanmean(), losses[-length:].nanmean()
        return "forget batches", first.item(), last.item()


def _numbers(values: list[Tensor]) -> Tensor:
    return torch.stack(values).cpu() if values else torch.zeros(0)
