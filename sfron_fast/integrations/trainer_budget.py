"""A budget for the forget steps of a Hugging Face Trainer (``runs/budget.py``)."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..errors import number, require
from ..optim.base import SFRonOptimizer
from ..runs.budget import BUDGET, Budget, retain_budget
from ..tasks import Language, Task
from ..tasks.task import as_task
from . import unwrap

KEPT = "sfron_fast.RetainBudget"  # in the Trainer's state


def check_sized(name: str, dataset: Any) -> None:
    """It has samples, and says how many."""
    sized = hasattr(dataset, "__len__") and len(dataset) > 0
    require(sized, name, "a dataset with a length > 0", type(dataset).__name__)


class RetainBudget:
    """What ``ForgetCallback`` may spend: how far the mean loss of retain samples may rise, as a
    share of the loss on held-out samples before the run.

    After each cycle the callback looks at ``kept_dataset``, in eval mode, and both learning rates
    follow: the optimizer's ``forget_lr``, and ``lr`` through the Trainer's schedule, which goes on
    from the lower rate. A resumed run continues it. One budget serves one callback.

    Args:
        kept_dataset: retain samples that ``train_dataset`` lacks, in its form; 64 are plenty.
        holdout_dataset: samples of the same kind that the model has never seen.
        share: of the holdout loss.
        task: what one sample's loss is; None = ``Language()``. ``Classification()`` for models with
            one label a sample.

    Raises:
        ValueError: a wrong argument, by name; when the training begins, also a holdout loss that is
            not finite or 0, groups with different learning rates, and a schedule that is no
            ``LambdaLR``.

    Warns:
        RuntimeWarning: at the end, if the run has spent more.
    """

    def __init__(
        self,
        kept_dataset: Any,
        holdout_dataset: Any,
        *,
        share: float = BUDGET,
        task: Task | None = None,
    ) -> None:
        for name, found in (("kept_dataset", kept_dataset), ("holdout_dataset", holdout_dataset)):
            check_sized(name, found)
        number("share", share, 0.0, open_low=True)
        self.kept_dataset, self.holdout_dataset = kept_dataset, holdout_dataset
        self.share, self.task = share, as_task(task, lambda _: Language())
        self._budget: Budget | None = None  # once a training has begun
        self._forget_lr = self._lr = 0.0

    def begin(self, trainer: Any, state: Any) -> None:
        """Measure what the learning rates will follow, or go on from a checkpoint's ``state``."""
        saved = state.stateful_callbacks.get(KEPT, {}).get("attributes")
        resumed, remedy = state.global_step > 0, "resume with the settings the run began with"
        same = resumed == (saved is not None)
        require(same, "retain_budget", "None, as the resumed run had", "one", remedy)
        optimizer: SFRonOptimizer = unwrap(trainer.optimizer)
        schedule, groups = _schedule(trainer), optimizer.param_groups
        remedy = "choose a lr_scheduler_type that multiplies learning_rate, as 'linear' does"
        found = type(schedule).__name__
        require(isinstance(schedule, LambdaLR), "lr_scheduler_type", "a LambdaLR", found, remedy)
        lrs = {(float(group["initial_lr"]), _number(group["forget_lr"])) for group in groups}
        remedy = "give all groups the same lr and forget_lr"
        one = saved is not None or len(lrs) == 1  # in a resumed run they are the budget's
        require(one, "optimizer", "one learning rate for all groups", sorted(map(str, lrs)), remedy)
        sets = {"kept": self.kept_dataset, "holdout": self.holdout_dataset}
        loaders = {name: trainer.get_eval_dataloader(dataset) for name, dataset in sets.items()}
        with trainer.compute_loss_context_manager():
            model = trainer.model_wrapped
            self._budget = retain_budget(model, **loaders, share=self.share, task=self.task)
        if saved is None:
            self._lr, forget_lr = lrs.pop()
            self._forget_lr = self._lr if forget_lr is None else forget_lr
        else:
            self._lr, self._forget_lr = saved["lr"], saved["forget_lr"]
            names = ("before", "spent", "rate")
            numbers = {name: torch.tensor(saved[name], dtype=torch.float64) for name in names}
            self._budget.load_state_dict({**saved, **numbers})

    def follow(self, trainer: Any, cycle: int, cycles: int) -> None:
        """After a cycle: look, and set the learning rates."""
        assert self._budget is not None
        optimizer, schedule = unwrap(trainer.optimizer), _schedule(trainer)
        with trainer.compute_loss_context_manager():
            kept = self._budget.follow(optimizer, self._forget_lr, cycle, cycles)
            self._budget.ranks.reshard()
        # the schedule sets lr anew after each step, as a multiple of these
        schedule.base_lrs = [kept * lr for lr in schedule.base_lrs]

    def logs(self) -> dict[str, float]:
        """What is spent, 1 = all."""
        assert self._budget is not None
        return {"budget_spent": self._budget.spent.item()}

    def settle(self) -> None:
        """At the end of the training."""
        if self._budget is not None:
            self._budget.settled(self._lr)

    def keep(self, state: Any) -> None:
        """In the Trainer's state, which goes into ``trainer_state.json``."""
        assert self._budget is not None
        found = {name: float(value) for name, value in self._budget.state_dict().items()}
        rates = {"lr": self._lr, "forget_lr": self._forget_lr}
        state.stateful_callbacks[KEPT] = {"args": {}, "attributes": {**found, **rates}}


def _schedule(trainer: Any) -> Any:
    """The one under what Accelerate puts around it."""
    return getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
