"""unlearn(): a saliency mask, then cycles of one forget step and T_in retain steps; schedule, guards, checkpoints."""

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .batches import check_labels, keeping_modes, model_device, move, progress_bar
from .checkpoint import EndlessLoader, random_state, save_whole, set_random_state
from .checks import number, require
from .evaluation import Stopwatch
from .files import remove_leftovers
from .fisher import estimate_mask
from .guard import Guard
from .naming import model_digest
from .precision import rounding_check
from .ranks import shared
from .recipes.sfron import Recipe
from .saliency import SaliencyMask

SampleLoss = Callable[[Any, Tensor], Tensor]
CHECKPOINT = "checkpoint.pt"
MASK = "mask.safetensors"


@dataclass
class UnlearnResult:
    """What ``unlearn`` did. ``model`` is the model passed in, changed in place."""

    model: nn.Module
    mask: SaliencyMask
    history: list[dict[str, float]] = field(default_factory=list)  # one entry per evaluation
    seconds: float = 0.0  # Fisher and mask included, evaluations and checkpoints excluded
    skipped_steps: int = 0
    stopped_early: bool = False


def unlearn(
    model: nn.Module,
    retain_loader: Iterable[Any],
    forget_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    *,
    recipe: Recipe | None = None,
    mask: SaliencyMask | None = None,
    loss_fn: SampleLoss | None = None,
    eval_every: int = 0,
    forget_floor: float | None = None,
    over_forgetting: Literal["warn", "stop"] = "warn",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    on_cycle: Callable[[int, nn.Module], None] | None = None,
    progress: bool = False,
) -> UnlearnResult:
    """Make ``model`` forget the samples of ``forget_loader`` and keep what it knows of ``retain_loader``.

    Args:
        model: a trained model of this process alone, changed in place; training flags are restored.
        retain_loader, forget_loader: batches ``(inputs, targets)``, drawn again and again.
        val_loader: held-out batches for the evaluations.
        recipe: ``Recipe.paper()`` (default) or ``Recipe.official()``, with overrides.
        mask: a saliency mask made earlier; None = estimate both Fishers now.
        loss_fn: (output, targets) -> per-sample losses [samples]; None = cross-entropy.
        eval_every: evaluate every so many cycles (0 = never): forget and validation accuracy, in percent.
        forget_floor: forget accuracy in percent below which the model has forgotten too much, for example
            what a model that never saw the samples reaches; None = validation accuracy before the run; 0 switches
            the guard off (right when a whole class goes). It acts at evaluations, so it wants ``eval_every``.
        over_forgetting: what the guard does: "warn" once, or "stop" the run.
        checkpoint: folder to save to and to resume from if it holds a checkpoint of this run. A resumed run ends
            with the bits of one never stopped, on the same machine. Give the model it started from.
        checkpoint_every: steps (forget and retain) between checkpoints.
        on_cycle: called as ``on_cycle(cycle, model)`` after every cycle; its time does not count.
        progress: show tqdm bars.
    Raises:
        ValueError: bad argument, empty loader, label outside the classes, or a checkpoint of another run. Found
            before the model changes; only without a Fisher pass is a label first seen when its batch comes.
    """
    require(not shared(model), "model", "one of this process alone", "one of DistributedDataParallel or FSDP",
            "write the loop with the optimizer: README, 'Many GPUs'")  # fmt: skip
    recipe = Recipe.paper() if recipe is None else recipe
    require(isinstance(recipe, Recipe), "recipe", "a Recipe", type(recipe).__name__)
    require(isinstance(eval_every, int) and eval_every >= 0, "eval_every", "an integer >= 0", repr(eval_every))
    require(isinstance(checkpoint_every, int) and checkpoint_every > 0, "checkpoint_every", "an integer > 0",
            repr(checkpoint_every))  # fmt: skip
    require(over_forgetting in ("warn", "stop"), "over_forgetting", "'warn' or 'stop'", repr(over_forgetting))
    if forget_floor is not None:
        number("forget_floor", forget_floor, 0.0, 100.0)
    armed = eval_every > 0 and (forget_floor is not None or val_loader is not None)
    require(armed or over_forgetting == "warn", "over_forgetting", "eval_every > 0 and a val_loader or forget_floor "
            "with 'stop'", "no evaluation to stop at")  # fmt: skip
    folder = None if checkpoint is None else Path(checkpoint)
    run = _Run(model, retain_loader, forget_loader, recipe, loss_fn, folder)
    with keeping_modes(model), run.watch:
        run.prepare(mask, progress)
        with run.watch.pause():
            guard = Guard(run, val_loader, eval_every, forget_floor, over_forgetting)
            run.open_folder()
        total = recipe.cycles * (1 + recipe.retain_steps)
        for position in progress_bar(range(run.position, total), range(run.position, total), "Unlearn", progress):
            if run.result.stopped_early:
                break
            run.advance()
            cycle, inside = divmod(position + 1, 1 + recipe.retain_steps)
            if not inside and (guard.due(cycle) or on_cycle is not None):
                with run.watch.pause():
                    guard.look(cycle)
                    if on_cycle is not None:
                        on_cycle(cycle, model)
            if folder is not None and ((position + 1) % checkpoint_every == 0 or position + 1 == total):
                with run.watch.pause():
                    run.save()
    run.result.seconds = run.earlier_seconds + run.watch.seconds
    run.result.skipped_steps = run.optimizer.skipped_steps
    return run.result


class _Run:
    """The state of one run; ``position`` counts forget and retain steps done."""

    def __init__(
        self, model: nn.Module, retain: Iterable[Any], forget: Iterable[Any], recipe: Recipe,
        loss_fn: SampleLoss | None, folder: Path | None,
    ) -> None:  # fmt: skip
        self.model, self.recipe, self.loss_fn, self.folder = model, recipe, loss_fn, folder
        self.device = model_device(model)
        self.retain, self.forget = EndlessLoader(retain, "retain_loader"), EndlessLoader(forget, "forget_loader")
        self.position, self.earlier_seconds = 0, 0.0
        self.watch = Stopwatch()
        self.start = model_digest(model)

    def prepare(self, mask: SaliencyMask | None, progress: bool) -> None:
        """Mask (given, saved or estimated), optimizer, schedule; and the place to resume from."""
        saved = self._saved()
        if saved is not None:
            given, mask = mask, SaliencyMask.load(self._in_folder(MASK))
            require(given is None or given == mask, "mask", "the mask the checkpointed run began with", "another")
        elif mask is None:
            mask = self._select(progress)
        self.result = UnlearnResult(self.model, mask)
        self.optimizer = self.recipe.make_optimizer(self.model, mask)
        self.schedule = self.recipe.make_scheduler(self.optimizer)
        if saved is not None:
            self._restore(saved)

    def _select(self, progress: bool) -> SaliencyMask:
        """The recipe's mask: from both Fishers, or everything."""
        if self.recipe.threshold is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            return SaliencyMask.from_bool({n: torch.ones_like(p, dtype=torch.bool) for n, p in named})

        def mean_loss(output: Any, targets: Tensor) -> Tensor:
            return self._losses(output, targets).mean()

        return estimate_mask(
            self.model, self.forget.loader, self.retain.loader, mean_loss,
            threshold=self.recipe.threshold, estimator=self.recipe.estimator, progress=progress,
        )  # fmt: skip

    @property
    def cycle(self) -> int:
        """Cycles begun so far."""
        return self.position // (1 + self.recipe.retain_steps)

    def open_folder(self) -> None:
        """Make the checkpoint folder and save the mask in it; nothing else in it is overwritten."""
        if self.folder is None:
            return
        path, mask = self.folder / MASK, self.result.mask
        remove_leftovers(path)
        remove_leftovers(self.folder / CHECKPOINT)
        if (self.folder / CHECKPOINT).exists():
            return
        theirs = path.exists() and SaliencyMask.load(path) != mask
        require(not theirs, "checkpoint", f"no other mask at {path}", "one", "use another folder, or remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        mask.save(path)

    def _losses(self, output: Any, targets: Tensor) -> Tensor:
        if self.loss_fn is None:
            require(targets.dtype == torch.int64, "targets", "int64 labels", targets.dtype, "use targets.long()")
            return F.cross_entropy(output, targets, reduction="none")
        values = self.loss_fn(output, targets)
        require(values.shape == (len(targets),), "loss_fn", f"per-sample losses [{len(targets)}]", list(values.shape))
        return values

    def advance(self) -> None:
        """One forget or retain step."""
        cycle, done = divmod(self.position, 1 + self.recipe.retain_steps)
        self.model.train()
        self.optimizer.zero_grad()
        with rounding_check(self.optimizer) if self.position < 2 else nullcontext():
            if done == 0:
                self._forget_step(self.recipe.forget_weight_at(cycle))
            else:
                self._retain_step()
        self.position += 1

    def _forget_step(self, weight: float) -> None:
        inputs, targets = move(self.forget.next(), self.device, "forget_loader")
        kept = self._buffers()
        try:
            loss = self._forget_loss(self.model(inputs), targets)
        except Exception:
            self._put_back(kept)  # bad input changes nothing
            raise
        (-weight * loss).backward()
        self.optimizer.forget_step()
        norm = self.optimizer.grad_norm
        if not self.recipe.forget_updates_buffers:
            self._put_back(kept)
        elif norm is not None:
            self._put_back(kept, unless=torch.isfinite(norm))  # a skipped step changes nothing

    def _forget_loss(self, output: Any, targets: Tensor) -> Tensor:
        temperature, floor = self.recipe.temperature, self.recipe.loss_floor
        if self.loss_fn is None:
            check_labels(output, targets)
            return losses.adaptive_cross_entropy(output, targets, temperature, floor=floor)
        values = self._losses(output, targets)
        return (losses.adaptive_weights(values, temperature, floor) * values).sum()

    def _retain_step(self) -> None:
        inputs, targets = move(self.retain.next(), self.device, "retain_loader")
        kept = self._buffers()
        try:
            output = self.model(inputs)
            if self.loss_fn is None:
                check_labels(output, targets)
            loss = self._losses(output, targets).mean()
        except Exception:
            self._put_back(kept)
            raise
        loss.backward()
        finite = torch.isfinite(loss.detach())
        self.optimizer.found_inf = (~finite).float()  # skipped on the device, and counted
        self.optimizer.step()
        self.optimizer.found_inf = None
        self._put_back(kept, unless=finite)
        self.schedule.step()

    def _buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def _put_back(self, kept: list[Tensor], unless: Tensor | None = None) -> None:
        """Buffers, such as BatchNorm's statistics, as they were; decided on the device."""
        for buffer, value in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(value if unless is None else torch.where(unless.to(buffer.device), buffer, value))

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save(self) -> None:
        state = {
            "recipe": asdict(self.recipe), "start": self.start, "position": self.position,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "retain": self.retain.state_dict(),
            "forget": self.forget.state_dict(), "random": random_state(), "history": self.result.history,
            "stopped_early": self.result.stopped_early, "seconds": self.earlier_seconds + self.watch.seconds,
        }  # fmt: skip
        save_whole(state, self._in_folder(CHECKPOINT))

    def _in_folder(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    def _saved(self) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return None
        path = self.folder / CHECKPOINT
        try:
            saved = torch.load(path, weights_only=True, map_location=self.device)
            theirs = saved["recipe"]
        except Exception as error:
            raise ValueError(f"checkpoint: expected a checkpoint of unlearn, found {path}: {error!r}; remove it to "
                             "start again") from error  # fmt: skip
        same = theirs == asdict(self.recipe)
        require(same, "checkpoint", f"a run with this recipe ({self.recipe.name})", "another recipe's",
                "use another folder, or the recipe the run began with")  # fmt: skip
        require(saved["start"] == self.start, "model", "the weights the checkpointed run started from", "other weights",
                "load the original model first")  # fmt: skip
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved["optimizer"])  # may refuse, so before anything of the caller's changes
        self.schedule.load_state_dict(saved["schedule"])
        self.retain.load_state_dict(saved["retain"])
        self.forget.load_state_dict(saved["forget"])
        self.model.load_state_dict(saved["model"])
        set_random_state(saved["random"])
        self.position, self.earlier_seconds = saved["position"], saved["seconds"]
        self.result.history = saved["history"]
        self.result.stopped_early = saved["stopped_early"]
