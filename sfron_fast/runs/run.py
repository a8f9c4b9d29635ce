"""One run of ``unlearn``: its state, a forget or retain step at a time, and how it is saved and
restored.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.endless import EndlessLoader
from ..distributed.loader import SharedLoader
from ..distributed.ranks import Ranks
from ..distributed.shards import finite
from ..errors import require, warn
from ..models.buffers import keep_buffers, put_back
from ..models.modes import set_modes, training_modes
from ..models.names import model_digest
from ..optim.rounding import rounding_check
from ..optim.validation import check_dtypes
from ..saliency.fisher import estimate_mask
from ..saliency.mask import SaliencyMask
from ..tasks import Task
from .budget import Budget
from .defaults import frozen_norms, keep_some, scales, set_profile
from .folder import RunFolder, check_readable, save_whole
from .gradients import gradients_reach
from .looking import leaving_no_trace
from .outcome import Outcome
from .recipe import Recipe
from .result import UnlearnResult
from .shards import check_shared, save_shared
from .state import restore, run_state
from .step_losses import StepLosses
from .stopwatch import Stopwatch


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
        group: Any = None,
        chosen: bool = True,
    ) -> None:
        """``chosen``: the caller has given a recipe."""
        self.ranks = Ranks(model, group)
        self.model, self.recipe, self.task = model, recipe, task
        self.folder = None if folder is None else RunFolder(folder)
        self.device = self.ranks.device
        with self.ranks.together():
            task.begin(model, self.ranks.rank, self.ranks.size)
        self.losses = StepLosses(model, task, self.ranks, recipe)
        self.holdout, self.share, self.chosen = holdout, retain_budget, chosen
        self.reference = recipe.reference_loss
        self.budget: Budget | None = None
        self.kept: list[Any] = []
        with self.ranks.together():
            self._take(forget, retain)
        self.position, self.earlier_seconds = 0, 0.0
        self.watch = Stopwatch()
        self.start = model_digest(model)
        self.modes = training_modes(model) if chosen else frozen_norms(training_modes(model))
        self.outcome = Outcome(self.losses)

    def _take(self, forget: Iterable[Any], retain: Iterable[Any]) -> None:
        """The loaders, and a look at the weights."""
        if self.share is not None:
            retain, self.kept = keep_some(retain, self.chosen or self.folder is not None)
        self.retain = self._endless(retain, "retain")
        self.forget = self._endless(forget, "forget")
        if self.folder is not None:
            self.retain.check_resumable()
            self.forget.check_resumable()
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        require(bool(trainable), "model", "at least one parameter that requires grad", "none")
        bad = [name for name, p in trainable.items() if not finite(p)]
        found, remedy = f"NaN or inf in {', '.join(bad[:3])}", "load a sound checkpoint"
        require(not bad, "model", "finite weights", found, remedy)
        check_dtypes(vars(self.recipe), list(trainable.values()))

    def _endless(self, loader: Iterable[Any], name: str) -> EndlessLoader:
        if self.ranks.group is None:
            return EndlessLoader(loader, name)
        return SharedLoader(loader, name, self.ranks)

    def prepare(self, mask: SaliencyMask | None, progress: bool | None) -> None:
        """Mask (given, saved or estimated), optimizer, schedule; and the place to resume from."""
        saved, folder = None, self.folder
        if folder is not None:
            with self.ranks.together():
                saved = folder.read(self.recipe, self.start, self.device)
            mixed = all(self.ranks.any([saved is None, saved is not None]))
            remedy = "keep it where all ranks can read it"
            require(not mixed, "checkpoint", "the same folder on every rank", "others", remedy)
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
        self.result = UnlearnResult(self.model, mask, recipe=self.recipe.name)
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
        if not self.chosen:
            with self.looking():
                set_profile(self.task, self.ranks, self.kept)
        ceiling = self.recipe.wants_reference(self.task)
        if saved is not None:
            self.reference = saved.get("reference", self.reference)
        elif ceiling or self.share is not None:
            with self.looking():
                found, end = scales(self)
            self.reference = end if ceiling else self.reference
        if self.share is not None:
            scale = 1.0 if saved is not None else found
            with self.looking():
                self.budget = Budget(self.ranks, self.kept, self.task, self.share, scale)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Looks at the model, which change nothing of the run."""
        with leaving_no_trace(self.task, self.forget, self.retain):
            yield
        self.ranks.reshard()

    def _select(self, progress: bool | None) -> SaliencyMask:
        """The recipe's mask: from both Fishers, or everything."""
        if self.recipe.threshold is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            return SaliencyMask.from_bool(
                {n: torch.ones(p.shape, dtype=torch.bool, device=p.device) for n, p in named}
            )
        return estimate_mask(
            self.model,
            forget=self.forget.loader,
            retain=self.retain.loader,
            task=self.task,
            threshold=self.recipe.threshold,
            zero_over_zero=self.recipe.zero_over_zero,
            estimator=self.recipe.estimator,
            draws=self.recipe.draws,
            progress=progress,
            group=self.ranks.group,
        )

    def _check_mask(self, mask: SaliencyMask) -> None:
        """One that selects nothing is found before anything moves; one that leaves nothing out,
        where the recipe's threshold was to leave some, is told of.
        """
        unused = set(mask.coverage(self.model.named_parameters())["unused"])
        counts = {n: count for n, count in mask.counts().items() if n not in unused}
        selected, size = sum(counts.values()), sum(map(mask.size, counts))
        remedy = (
            "lower the recipe's threshold, give another mask, or look whether a loss of the forget"
            " set has a gradient (labels of -100 count for nothing)"
        )
        found = f"none of {sum(map(mask.size, mask))}"
        require(selected > 0, "mask", "at least one selected weight", found, remedy)
        if self.chosen and mask.metadata.get("threshold") and selected == size:
            warn(
                f"the mask selects all {size} weights, so it protects none: raise the recipe's"
                f" threshold ({mask.metadata['threshold']:g})"
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
                if self.position == 0:
                    gradients_reach(self.model)
            else:
                self._retain_step()
        self.ranks.share_buffers()
        self.position += 1

    def _forget_step(self, weight: float) -> None:
        batch = self.forget.batch(self.task, self.device)
        if self.forget.passes == 2 and not self.outcome.pass_length:
            self.outcome.pass_length = len(self.outcome.losses)
        if self.position == 0 and self.outcome.draws:
            with self.watch.pause(), self.looking():
                self.outcome.begin(batch, self.forget.here)
        kept = keep_buffers(self.model)
        try:
            loss, mean, reached = self.losses.forget(batch, self.forget.here, self.reference)
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
        self.outcome.losses.append(mean)
        if norm is not None:
            self.outcome.norms.append(norm.detach().clone())

    def _retain_step(self) -> None:
        batch = self.retain.batch(self.task, self.device)
        kept = keep_buffers(self.model)
        try:
            loss, sound = self.losses.retain(batch, self.retain.here)
        except Exception:
            put_back(kept)
            raise
        loss.backward()
        self.optimizer.found_inf = (~sound).float()  # skipped on the device, and counted
        self.optimizer.step()
        self.optimizer.found_inf = None
        put_back(kept, unless=sound)
        self.outcome.retained.append(sound)
        self.schedule.step()

    def settle(self) -> None:
        """After a cycle: what it cost, where there is a budget."""
        if self.budget is not None:
            recipe = self.recipe
            forget_lr = recipe.lr if recipe.forget_lr is None else recipe.forget_lr
            idle = self.outcome.reached[-1] if self.outcome.reached and not self.chosen else None
            self.budget.follow(self.optimizer, forget_lr, self.cycle, recipe.cycles, idle)

    def open_folder(self) -> None:
        """Make the checkpoint folder, once it is known that what goes there can be read again."""
        if self.folder is not None:
            with self.ranks.together():
                if self.ranks.group is None:
                    check_readable(run_state(self))
                else:
                    check_shared(self, run_state(self))
                if self.ranks.rank == 0:
                    self.folder.open(self.result.mask)

    def save(self) -> None:
        """Write the checkpoint."""
        assert self.folder is not None
        if self.ranks.group is None:
            save_whole(run_state(self), self.folder.checkpoint)
        else:
            save_shared(self, run_state(self))


def _samples(loader: Any) -> int | None:
    """How many there are, where that can be known without reading them."""
    dataset: Any = getattr(loader, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else None
