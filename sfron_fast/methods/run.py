"""One run of ``unlearn``: its state, a forget or retain step at a time, and how it is saved and
restored.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import model_device
from ..data.endless import EndlessLoader
from ..data.kept_out import keep_out
from ..errors import require, warn
from ..models.buffers import keep_buffers, put_back
from ..models.modes import set_modes, training_modes
from ..models.names import model_digest
from ..optim.rounding import rounding_check
from ..saliency.fisher import estimate_mask
from ..saliency.mask import SaliencyMask
from ..tasks import Task
from ..tasks.task import check_depends
from ..weights import with_ceiling
from .budget import Budget, mean_over
from .looking import leaving_no_trace
from .outcome import Outcome
from .run_folder import RunFolder, check_readable, save_whole
from .run_state import restore, run_state
from .sfron import Recipe
from .stopwatch import Stopwatch


@dataclass
class UnlearnResult:
    """What ``unlearn`` did. ``model`` is the model passed in, changed in place."""

    model: nn.Module
    mask: SaliencyMask
    history: list[dict[str, float]] = field(default_factory=list)  # one entry per evaluation
    seconds: float = 0.0  # Fisher and mask included, evaluations and checkpoints excluded
    skipped_steps: int = 0
    forgotten_steps: int = 0  # of them: forget steps whose samples had all reached the ceiling
    budget_spent: float | None = None  # of retain_budget, 1 = all of it, at the end of the run
    stopped_early: bool = False


class Run:
    """The state of one run; ``position`` counts forget and retain steps done."""

    def __init__(
        self,
        model: nn.Module,
        forget: Iterable[Any],
        retain: Iterable[Any],
        recipe: Recipe,
        task: Task,
        folder: Path | None,
        holdout: Iterable[Any] | None = None,
        retain_budget: float | None = None,
    ) -> None:
        self.model, self.recipe, self.task = model, recipe, task
        self.folder = None if folder is None else RunFolder(folder)
        self.device = model_device(model)
        self.holdout, self.share = holdout, retain_budget
        self.reference = recipe.reference_loss
        self.budget: Budget | None = None
        self.kept: list[Any] = []
        if retain_budget is not None:
            retain, self.kept = keep_out(retain, "retain")
        self.retain = EndlessLoader(retain, "retain")
        self.forget = EndlessLoader(forget, "forget")
        if self.folder is not None:
            self.retain.check_resumable()
            self.forget.check_resumable()
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        require(bool(trainable), "model", "at least one parameter that requires grad", "none")
        bad = [name for name, p in trainable.items() if not bool(torch.isfinite(p.detach()).all())]
        require(
            not bad,
            "model",
            "finite weights",
            f"NaN or inf in {', '.join(bad[:3])}",
            "load a sound checkpoint",
        )
        self.position, self.earlier_seconds = 0, 0.0
        self.watch = Stopwatch()
        self.start = model_digest(model)
        self.modes = training_modes(model)
        self.outcome = Outcome(model, recipe, in_nats=task.in_nats)

    def prepare(self, mask: SaliencyMask | None, progress: bool) -> None:
        """Mask (given, saved or estimated), optimizer, schedule; and the place to resume from."""
        saved = (
            None if self.folder is None else self.folder.read(self.recipe, self.start, self.device)
        )
        if saved is not None:
            assert self.folder is not None
            given, mask = mask, SaliencyMask.load(self.folder.mask)
            require(
                given is None or given == mask,
                "mask",
                "the mask the checkpointed run began with",
                "another",
            )
        elif mask is None:
            mask = self._select(progress)
        self.result = UnlearnResult(self.model, mask)
        self.optimizer = self.recipe.make_optimizer(self.model, mask)
        self.schedule = self.recipe.make_scheduler(self.optimizer)
        self._check_mask(mask)
        self._measure(saved)
        if saved is not None:
            restore(self, saved)
        else:
            self._check_sizes(mask)

    def _measure(self, saved: dict[str, Any] | None) -> None:
        """The holdout loss before the first step, where a ceiling or a budget is relative to it."""
        ceiling = self.recipe.ceiling is not None and self.reference is None
        if saved is not None:
            self.reference = saved.get("reference", self.reference)
        elif ceiling or self.share is not None:
            assert self.holdout is not None
            with leaving_no_trace(self.task, self.forget, self.retain):
                found = mean_over(self.model, self.holdout, self.task, "holdout").item()
            remedy = "hold out data the model has not learnt by heart"
            require(found > 0.0, "holdout", "a mean loss > 0", found, remedy)
            self.reference = found if ceiling else self.reference
        if self.share is not None:
            scale = 1.0 if saved is not None else found
            with leaving_no_trace(self.task, self.forget, self.retain):
                self.budget = Budget(self.model, self.kept, self.task, self.share, scale)

    def _select(self, progress: bool) -> SaliencyMask:
        """The recipe's mask: from both Fishers, or everything."""
        if self.recipe.threshold is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            return SaliencyMask.from_bool(
                {n: torch.ones_like(p, dtype=torch.bool) for n, p in named}
            )

        return estimate_mask(
            self.model,
            forget=self.forget.loader,
            retain=self.retain.loader,
            task=self.task,
            threshold=self.recipe.threshold,
            zero_over_zero=self.recipe.zero_over_zero,
            estimator=self.recipe.estimator,
            progress=progress,
        )

    def _check_mask(self, mask: SaliencyMask) -> None:
        """One that selects nothing is found before anything moves."""
        names = mask.coverage(self.model.named_parameters())["matched"]
        selects = any(bool(mask[name].any()) for name in names)
        require(
            selects,
            "mask",
            "at least one selected weight",
            f"none of {sum(map(mask.size, mask))}",
            "lower the recipe's threshold, or give another mask",
        )

    def _check_sizes(self, mask: SaliencyMask) -> None:
        """Sets in the wrong order look like this."""
        forget, retain = (
            mask.metadata.get(side, {}).get("samples") or _samples(loader.loader)
            for side, loader in (("forget", self.forget), ("retain", self.retain))
        )
        if forget and retain and forget > retain:
            warn(
                f"the forget set is larger than the retain set: {forget} samples in forget,"
                f" {retain} in retain; are they swapped?"
            )

    @property
    def cycle(self) -> int:
        """Cycles begun so far."""
        return self.position // (1 + self.recipe.retain_steps)

    def advance(self) -> None:
        """One forget or retain step."""
        cycle, done = divmod(self.position, 1 + self.recipe.retain_steps)
        set_modes(self.model, self.modes)
        self.optimizer.zero_grad()
        with rounding_check(self.optimizer) if self.position < 2 else nullcontext():
            if done == 0:
                self._forget_step(self.recipe.forget_weight_at(cycle))
            else:
                self._retain_step()
        self.position += 1

    def _forget_step(self, weight: float) -> None:
        batch = self.forget.batch(self.task, self.device)
        if self.forget.passes == 2 and not self.outcome.pass_length:
            self.outcome.pass_length = len(self.outcome.losses)
        kept = keep_buffers(self.model)
        try:
            loss, each, reached = self._forget_loss(batch)
            check_depends(loss, self.task)
        except Exception:
            put_back(kept)  # bad input changes nothing
            raise
        (-weight * loss).backward()
        if reached is not None:
            self.optimizer.found_inf = reached.float()  # skipped on the device, and counted
            self.outcome.reached.append(reached)
        self.optimizer.forget_step()
        self.optimizer.found_inf = None
        norm = self.optimizer.grad_norm
        done = [] if norm is None else [torch.isfinite(norm)]
        done += [] if reached is None else [~reached]
        if not self.recipe.forget_updates_buffers:
            put_back(kept)
        elif done:  # a skipped step changes nothing
            put_back(kept, unless=torch.stack(done).all())
        self.outcome.losses.append(each.detach().mean())
        if norm is not None:
            self.outcome.norms.append(norm.detach().clone())

    def _forget_loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss [], losses [samples], and whether all have reached the recipe's ceiling: bool [], or
        None without one.
        """
        recipe = self.recipe
        weighing = self.model, batch, recipe.temperature, recipe.loss_floor
        if recipe.ceiling is None or self.reference is None:
            loss, each = self.task.adaptive_loss(*weighing)
            return loss, each, None
        limit = recipe.ceiling, self.reference
        loss, each = self.task.ceiling_loss(*weighing, *limit)
        return loss, each, ~with_ceiling(torch.ones_like(each), each, *limit).any()

    def _retain_step(self) -> None:
        batch = self.retain.batch(self.task, self.device)
        kept = keep_buffers(self.model)
        try:
            loss = self.task.mean_loss(self.model, batch)
            check_depends(loss, self.task)
        except Exception:
            put_back(kept)
            raise
        loss.backward()
        finite = torch.isfinite(loss.detach())
        self.optimizer.found_inf = (~finite).float()  # skipped on the device, and counted
        self.optimizer.step()
        self.optimizer.found_inf = None
        put_back(kept, unless=finite)
        self.outcome.retained.append(finite)
        self.schedule.step()

    def settle(self) -> None:
        """After a cycle: what it cost, where there is a budget."""
        if self.budget is not None:
            recipe = self.recipe
            forget_lr = recipe.lr if recipe.forget_lr is None else recipe.forget_lr
            self.budget.follow(self.optimizer, forget_lr, self.cycle, recipe.cycles)

    def open_folder(self) -> None:
        """Make the checkpoint folder, once it is known that what goes there can be read again."""
        if self.folder is not None:
            check_readable(run_state(self))
            self.folder.open(self.result.mask)

    def save(self) -> None:
        """Write the checkpoint."""
        assert self.folder is not None
        save_whole(run_state(self), self.folder.checkpoint)


def _samples(loader: Any) -> int | None:
    """How many there are, where that can be known without reading them."""
    dataset: Any = getattr(loader, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else None
