"""unlearn(): a saliency mask, then cycles of one forget step and T_in retain steps; schedule,
guards, checkpoints.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..data.batches import check_again, check_model, progress_bar
from ..distributed.ranks import shared
from ..distributed.shards import check_wrapper
from ..errors import by_keyword, noting, number, require
from ..models.modes import keeping_modes, recording
from ..saliency.mask import SaliencyMask
from ..tasks import Classification, Task
from ..tasks.classification import SampleLoss
from ..tasks.task import as_task
from .best import BEST, Best
from .budget import BUDGET
from .defaults import default_recipe, default_task
from .guard import Guard, Metric, StopWhen, check_metrics
from .known import Known
from .recipe import Recipe
from .result import UnlearnResult
from .run import Run

__all__ = ["UnlearnResult", "unlearn"]


@by_keyword
def unlearn(
    model: nn.Module,
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    holdout: Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    mask: SaliencyMask | None = None,
    loss_fn: SampleLoss | None = None,
    task: Task | None = None,
    retain_budget: float | None = None,
    eval_every: int = 0,
    metrics: Mapping[str, Metric] | None = None,
    stop_when: StopWhen | None = None,
    forget_floor: float | None = None,
    over_forgetting: Literal["warn", "stop"] = "warn",
    best: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    on_cycle: Callable[[int, nn.Module], None] | None = None,
    progress: bool | None = None,
    group: Any = None,
) -> UnlearnResult:
    """Make ``model`` forget the samples of ``forget`` and keep what it knows of ``retain``.

    Args:
        model: a trained model, plain or of DistributedDataParallel or ``fully_shard`` (FSDP2),
            changed in place; training flags are restored. One that comes in eval mode is put to
            train() as a whole for its steps; one that comes in training mode keeps each submodule's
            mode, so a BatchNorm put to eval() keeps its statistics.
        forget, retain: batches ``(inputs, targets)``, or whatever the task reads, drawn again and
            again: every ``iter()`` begins a new pass. Inputs as for ``estimate_fisher``; batches
            without samples are skipped. On several ranks each loader gives its rank's part of every
            global batch, as with DistributedSampler; parts may differ in size or be empty.
        holdout: held-out batches for the evaluations, ``retain_budget`` and a recipe's ceiling,
            read again and again as the others.
        recipe: ``Recipe.paper()``, ``.official()``, ``.budgeted()``, ``.language()`` or a diffusion
            model's, with overrides. None = one for the task, under a budget, that ends the
            forgetting of a sample and leaves running statistics as they are (``defaults.py``).
        mask: a saliency mask made earlier; None = estimate both Fishers now.
        loss_fn: short for ``task=Classification(loss_fn)``: (output, targets) -> per-sample losses
            [samples]; None = cross-entropy of outputs [samples, classes].
        task: what one sample's loss is, and how a batch is read (``sfron_fast.tasks.Task``); None =
            classification.
        retain_budget: what forgetting may cost: how far the mean loss of retain samples may rise,
            as a share of the holdout loss before the run. The learning rates follow what is spent,
            looking after every cycle at up to 64 retain samples that the run does not train on.
            None = .05 without a recipe, else no budget. Without a recipe it needs no holdout set:
            its loss is then taken to be a fifth of a guess's, or that of the retain samples.
        eval_every: evaluate every so many cycles (0 = never): forget and validation accuracy, in
            percent, of tasks that have one, else their losses; and the metrics.
        metrics: figures of your own by name, ``metric(model) -> number``, in eval mode and without
            gradients; they go into ``result.history``, and what they draw leaves no trace in the
            run. Several ranks each ask; let them agree.
        stop_when: ``stop_when(entry) -> bool`` of an evaluation's entry of ``result.history``,
            after a cycle: the run ends there if it is true.
        forget_floor: forget accuracy in percent below which the model has forgotten too much, for
            example what a model that never saw the samples reaches; None = validation accuracy
            before the run, or none where the data sets show that whole classes go; 0 switches the
            guard off. It acts at evaluations, so it wants ``eval_every``.
        over_forgetting: what the guard does: "warn" once, or "stop" the run, at the best state that
            was evaluated: the one nearest to the floor, and not below if there is one.
        best: file that this state is kept in along the run, ``{"entry", "model"}``, for
            ``torch.load``; a run with a checkpoint has one of its own.
        checkpoint: folder to save to and to resume from if it holds a checkpoint of this run. A
            resumed run ends with the bits of one never stopped, on the same machine and number of
            ranks; on another number the loaders begin a new pass, with a warning. Give the model
            it started from, and loaders whose order comes from torch's, numpy's or Python's
            generators, global or their own; others are refused when their batches differ,
            persistent workers at once.
        checkpoint_every: steps (forget and retain) between checkpoints.
        on_cycle: called as ``on_cycle(cycle, model)`` after every cycle; its time does not count.
        progress: show tqdm bars, on the first rank; None = where stderr is a terminal.
        group: process group whose ranks share every batch: the result is that of one process on
            the global batches, within rounding (docs/many-gpus.md). None = all ranks
            (``torch.distributed.group.WORLD``) for a model of DistributedDataParallel or
            ``fully_shard``, else this process alone.

    Raises:
        ValueError: bad argument, empty loader, label outside the classes, a checkpoint of another
            run, or a model of FSDP1 or DeepSpeed. Found before the model changes; only without a
            Fisher pass is a label first seen when its batch comes. Also a model with weights that
            are not finite, and a mask that selects nothing. What one rank refuses, all raise.

    Warns:
        RuntimeWarning: the run did nothing, or forgot nothing (steps all skipped, no gradient, no
            weight changed, forget accuracy or loss where it was), or only a part (the forget set is
            right more often than the holdout set, beyond chance), it spent more than its budget,
            the sets look swapped, or their batches differ in size under an estimator that depends
            on it.
    """
    check_model(model)
    check_wrapper(model)
    several = shared(model)
    require(
        group is None or several,
        "group",
        "None for a model of this process alone",
        "a process group",
        "wrap the model: DistributedDataParallel, or fully_shard",
    )
    if several and group is None:
        group = torch.distributed.group.WORLD
    # what can be refused without looking at model or data
    for name, loader in (("forget", forget), ("retain", retain), ("holdout", holdout)):
        if loader is not None or name != "holdout":
            check_again(loader, name)
    given = type(mask).__name__
    require(mask is None or isinstance(mask, SaliencyMask), "mask", "a SaliencyMask", given)
    task = as_task(task, Classification, loss_fn)
    if retain_budget is not None:
        number("retain_budget", retain_budget, 0.0, open_low=True)
    chosen = recipe is not None
    if recipe is None:
        retain_budget = BUDGET if retain_budget is None else retain_budget
        task = default_task(task, model, several)
        recipe = default_recipe(task)
    require(isinstance(recipe, Recipe), "recipe", "a Recipe", type(recipe).__name__)
    relative = chosen and (retain_budget is not None or recipe.wants_reference(task))
    wanted = "held-out batches, for retain_budget or the recipe's ceiling"
    require(holdout is not None or not relative, "holdout", wanted, "None")
    require(
        isinstance(eval_every, int) and eval_every >= 0,
        "eval_every",
        "an integer >= 0",
        repr(eval_every),
    )
    require(
        isinstance(checkpoint_every, int) and checkpoint_every > 0,
        "checkpoint_every",
        "an integer > 0",
        repr(checkpoint_every),
    )
    require(
        over_forgetting in ("warn", "stop"),
        "over_forgetting",
        "'warn' or 'stop'",
        repr(over_forgetting),
    )
    if forget_floor is not None:
        number("forget_floor", forget_floor, 0.0, 100.0)
    armed = eval_every > 0 and (forget_floor is not None or holdout is not None)
    require(
        armed or over_forgetting == "warn",
        "over_forgetting",
        "eval_every > 0 and holdout or forget_floor with 'stop'",
        "no evaluation to stop at",
    )
    check_metrics(metrics, stop_when, eval_every)
    folder = None if checkpoint is None else Path(checkpoint)
    require(best is None or eval_every > 0, "eval_every", "an integer > 0, with best", eval_every)
    guarded = eval_every > 0 and forget_floor is not None and not metrics
    if guarded or over_forgetting == "stop" or best is not None:
        task.needs("correct")
    if recipe.objective == "replace":
        task.needs("replacement_losses")
    if recipe.ceiling_of == "token":
        task.needs("token_ceiling_loss")
    run = Run(model, forget, retain, recipe, task, folder, holdout, retain_budget, group, chosen)
    progress = progress if run.ranks.rank == 0 else False
    said: list[str] = []
    modes = keeping_modes(model), recording(model)
    with modes[0], modes[1], run.ranks.first_warns(), noting(said), run.watch:
        # mask, optimizer, and the place to resume from; the guard measures the model as it is
        run.prepare(mask, progress)
        with run.watch.pause():
            keeps = best is not None or over_forgetting == "stop"
            found = Best(run, _best_file(run, best)) if keeps else None
            limits = forget_floor, over_forgetting
            guard = Guard(run, holdout, eval_every, *limits, metrics or {}, stop_when, found)
            known = Known(run)
            if run.position == 0:
                run.result.before = known.look()
                known.check(run.result.before)
            run.open_folder()
        # one forget or retain step at a time; looks and checkpoints do not count as its time
        total = recipe.cycles * (1 + recipe.retain_steps)
        for position in progress_bar(
            range(run.position, total), range(run.position, total), "Unlearn", progress
        ):
            if run.result.stopped_early:
                break
            run.advance()
            cycle, inside = divmod(position + 1, 1 + recipe.retain_steps)
            if not inside:
                run.settle()
            if not inside and (guard.due(cycle) or on_cycle is not None):
                with run.watch.pause():
                    guard.look(cycle)
                    if on_cycle is not None:
                        on_cycle(cycle, model)
                        run.ranks.reshard()
            if folder is not None and (
                (position + 1) % checkpoint_every == 0
                or position + 1 == total
                or run.result.stopped_early
            ):
                with run.watch.pause():
                    run.save()
        task.end(model)
        with run.watch.pause():
            _conclude(run, known, guard.floor)
    run.result.seconds = run.earlier_seconds + run.watch.seconds
    run.result.warnings = list(dict.fromkeys(said))
    return run.result


def _best_file(run: Run, best: str | os.PathLike[str] | None) -> Path | None:
    """Where the best state is kept: a run that can be resumed has its own on disk."""
    if best is None and run.folder is not None and not run.ranks.sharded:
        return run.folder.path / BEST
    return None if best is None else Path(best)


def _conclude(run: Run, known: Known, floor: float | None) -> None:
    """What the run did, for its result, and warnings of what it did not do."""
    result, budget = run.result, run.budget
    result.cycles = run.cycle
    result.skipped_steps = run.optimizer.skipped_steps
    result.forgotten_steps = run.outcome.forgotten
    result.after = known.look()
    if budget is not None:
        result.budget_spent = budget.settled(run.recipe.lr)
    if not result.stopped_early:
        with run.looking():
            still = known.still(result.before, result.after)
            run.outcome.judge(result, floor, run.share, still)
