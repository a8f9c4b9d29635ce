"""What ``unlearn`` does where nobody says how: a recipe for the kind of task, under a budget.

A sample of a classifier is forgotten when its loss is that of a guess, log(classes), or that of the
holdout set where this is larger. Until then the budget bounds what forgetting costs, so samples
that the rest of the data explain are let go no further than they can be.

Without a holdout set nobody knows the loss of unseen samples. Of a negative log-likelihood it is
taken to be a fifth of a guess's, as of many models that generalise; of any other loss that of the
retain samples kept out.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

from ..data.kept_out import SAMPLES, can_keep_out, keep_out, some_of
from ..distributed.ranks import Ranks
from ..errors import require, warn
from ..evaluation.diffusion import loss_profile
from ..models.modes import Modes, evaluating
from ..tasks import Denoising, Language, Task, Unconditional
from .budget import holdout_scale, mean_over
from .recipe import Recipe

UNSEEN = 0.2  # of the loss of a guess: that of unseen samples, where there are none
_NORMS = nn.modules.batchnorm._NormBase  # those with running statistics


def default_recipe(task: Task) -> Recipe:
    """The recipe for a task whose caller has chosen none."""
    if isinstance(task, Language):
        # a ceiling of sequences leaves half of their answers where they were
        return Recipe.language(name="SFR-on (default)", cycles=100, ceiling_of="token")
    if isinstance(task, Denoising):
        replaces = task.instead is not None
        return Recipe.diffusion(cycles=48) if replaces else Recipe.diffusion_ascent(cycles=24)
    return Recipe.budgeted(name="SFR-on (default)", lr=3e-4, forget_lr=3e-4, ceiling=1.0)


def default_task(task: Task, model: nn.Module, several: bool) -> Task:
    """What a diffusion model shall say instead, where its task does not say: what it would say
    without the condition, less what the condition adds (ESD). ``several``: other processes have a
    part in the model, which cannot be copied for a teacher then.
    """
    if not isinstance(task, Denoising) or task.instead is not None or task.reference is not None:
        return task
    task = copy.copy(task)  # its draws are shared
    if task.null is not None and task.condition is not None and not several:
        task.instead = Unconditional(copy.deepcopy(model).requires_grad_(False))
    return task


def set_profile(task: Task, ranks: Ranks, kept: list[Any]) -> None:
    """Of a diffusion model that is to ascend: losses relative to what is usual at a timestep."""
    if isinstance(task, Denoising) and task.instead is None and task.reference is None:
        draws, each = 8, 5  # a bin that holds fewer on average may hold none
        count = sum(_of_all(ranks, sum(map(task.samples, kept))))
        bins = max(1, min(10, task.timesteps, draws * count // each))
        rest: dict[str, Any] = {"bins": bins, "draws": draws, "group": ranks.group}
        task.reference = loss_profile(ranks.model, kept, task=task, **rest)
        task.relative = True


def _of_all(ranks: Ranks, number: int) -> list[int]:
    """The number of each rank."""
    if ranks.group is None:
        return [number]
    return [there for (there,) in ranks.exchange(None, number)]


def keep_some(loader: Any, strictly: bool) -> tuple[Any, list[Any]]:
    """``keep_out`` of the retain set; unless ``strictly``, of a loader that cannot be split samples
    that stay in it.
    """
    if strictly or can_keep_out(loader):
        return keep_out(loader, "retain")
    warn(
        "retain: no samples can be kept out of this loader, so the budget looks at some that are"
        " trained on too, and sees less than forgetting costs; pass a list of batches, or a"
        " DataLoader over a data set"
    )
    kept: list[Any] = []
    batches = 1 + SAMPLES // 16
    for batch in some_of(loader, SAMPLES):
        kept.append(batch)
        if len(kept) == batches:
            break
    return loader, kept


def guess(task: Task, ranks: Ranks, kept: list[Any]) -> float | None:
    """The loss of a guess among all classes; None of a task whose losses are no likelihoods."""
    if not (task.in_nats and task.has("logits")):
        return None
    model, classes = ranks.model, 0
    with evaluating(model), torch.no_grad():
        prepared = task.prepared(kept, ranks.device, "retain")
        for batch, _ in ranks.rounds((b, task.samples(b)) for b in prepared):
            if batch is not None:
                classes = task.logits(task.outputs(model, batch), batch).shape[-1]
            break
    # a rank may have no sample to look at
    return math.log(max(2, *_of_all(ranks, classes)))


def scales(run: Any) -> tuple[float, float]:
    """Of a ``Run``, before its first step: the mean loss of samples that the model has never seen,
    or what stands in for it; and what a ceiling is a multiple of.

    Raises:
        ValueError: the holdout set, or the retain samples kept out, have no loss > 0.
    """
    task, ranks, kept = run.task, run.ranks, run.kept
    of_guess = None if run.chosen else guess(task, ranks, kept)
    if run.holdout is not None:
        unseen = holdout_scale(ranks, run.holdout, task)
    elif of_guess is not None:
        unseen = UNSEEN * of_guess
    else:
        unseen = mean_over(ranks, kept, task, "retain").item()
        wanted = "batches of unseen samples, as the retain samples stand in with a mean loss > 0"
        require(unseen > 0.0, "holdout", wanted, unseen)
    if of_guess is None or isinstance(task, Language):
        return unseen, unseen
    return unseen, max(unseen, of_guess)


def frozen_norms(modes: Modes) -> Modes:
    """The modes with running statistics as they are: of forget batches alone they would be other
    ones, under which losses say little of the model in eval mode.
    """
    return {m: training and not isinstance(m, _NORMS) for m, training in modes.items()}
