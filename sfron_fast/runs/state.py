"""What a checkpoint of a run holds, and how the run goes on from it."""

from dataclasses import asdict
from typing import Any

from ..data.endless import random_state, set_random_state
from ..errors import require
from ..models.buffers import fit_buffers, set_unsaved_buffers, unsaved_buffers
from .folder import FORMAT
from .shards import bare, gathered


def run_state(run: Any) -> dict[str, Any]:
    """All that ``restore`` needs, in types that ``torch.load(weights_only=True)`` reads."""
    return {
        "format": FORMAT,
        "recipe": asdict(run.recipe),
        "start": run.start,
        "position": run.position,
        "model": bare(run).state_dict(),
        "buffers": unsaved_buffers(bare(run)),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "retain": run.retain.state_dict(),
        "forget": run.forget.state_dict(),
        "random": random_state(),
        "task": {"kind": type(run.task).__qualname__, "state": run.task.state_dict()},
        "reference": run.reference,
        "budget": None if run.budget is None else run.budget.state_dict(),
        "history": run.result.history,
        "outcome": run.outcome.state_dict(),
        "stopped_early": run.result.stopped_early,
        "before": run.result.before,
        "seconds": run.earlier_seconds + run.watch.seconds,
    }


def restore(run: Any, saved: dict[str, Any]) -> None:
    """Put the run where the checkpoint was written.

    Raises:
        ValueError: it is of another task, budget or data; before anything of the caller's changes.
    """
    saved = gathered(run, saved)
    # these may refuse
    with run.ranks.together():
        _restore_budget(run, saved.get("budget"))
        _restore_task(run.task, saved.get("task"))
        run.optimizer.load_state_dict(saved["optimizer"])
        run.schedule.load_state_dict(saved["schedule"])
        for name in ("retain", "forget"):
            if name in saved:
                getattr(run, name).load_state_dict(saved[name])
    model = bare(run)
    fit_buffers(model, saved["model"], persistent=True)
    model.load_state_dict(saved["model"])
    set_unsaved_buffers(model, saved["buffers"])
    if "random" in saved:
        set_random_state(saved["random"])
    run.outcome.load_state_dict(saved["outcome"])
    run.position, run.earlier_seconds = saved["position"], saved["seconds"]
    run.result.history = saved["history"]
    run.result.stopped_early = saved["stopped_early"]
    run.result.before = saved.get("before", {})


def _restore_budget(run: Any, saved: dict[str, Any] | None) -> None:
    ours = run.budget is not None
    wanted = "the budget of the checkpointed run" if saved else "None, as in the checkpointed run"
    same, found = ours == (saved is not None), run.share
    require(same, "retain_budget", wanted, found, "use another folder, or the run's budget")
    if saved is not None:
        run.budget.load_state_dict(saved)


def _restore_task(task: Any, saved: dict[str, Any] | None) -> None:
    """Its draws go on; a checkpoint of before there were tasks has none."""
    if saved is None:
        return
    kind, ours = saved["kind"], type(task).__qualname__
    require(kind == ours, "task", f"the {kind} that the checkpointed run began with", ours)
    try:
        task.load_state_dict(saved["state"])
    except Exception as error:
        raise ValueError(
            f"task: expected one that takes the checkpoint's state {sorted(saved['state'])},"
            f" found {ours}, which raised {error!r}; resume with the task of the run"
        ) from error
