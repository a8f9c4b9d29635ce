"""Figures of the caller's along a run, and the end they may put to it."""

import pytest
import torch
from denoisers import KEPT, NULL, denoiser, images
from models import build, loader

import sfron_fast as sf
from sfron_fast import Denoising, Recipe

RECIPE = Recipe.paper(cycles=8, retain_steps=2, lr=0.02, forget_lr=0.05)


def run(task=None, model=None, **settings):
    model = model or denoiser()
    sets = {"forget": [images(6, label=0)], "retain": [images(6, seed=2), images(6, seed=3)]}
    task = task or Denoising(KEPT, null=NULL)
    return model, sf.unlearn(model, **sets, recipe=RECIPE, task=task, **settings)


def first_weight(model):
    return float(next(model.parameters()).flatten()[0])


def test_metrics_are_noted_and_leave_no_trace():
    """Asked in eval mode, without gradients; what they draw does not change the run."""
    seen = []

    def metric(model):
        seen.append((model.training, torch.is_grad_enabled()))
        torch.rand(3)
        return first_weight(model)

    plain, _ = run()
    model, result = run(eval_every=2, metrics={"weight": metric})
    assert [entry["cycle"] for entry in result.history] == [0, 2, 4, 6, 8]
    assert result.history[-1]["weight"] == first_weight(model)
    assert "forget_accuracy" not in result.history[0]
    assert set(seen) == {(False, False)}
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_stops_where_it_is_told_and_stays_stopped(tmp_path):
    def far(entry):
        return entry["cycle"] >= 4

    settings = {"eval_every": 2, "metrics": {"weight": first_weight}, "stop_when": far}
    model, result = run(checkpoint=tmp_path, checkpoint_every=3, **settings)
    assert result.stopped_early
    assert result.history[-1]["cycle"] == 4
    at_the_end = [p.detach().clone() for p in model.parameters()]
    whole = []
    run(on_cycle=lambda cycle, m: whole.append([p.detach().clone() for p in m.parameters()]))
    for a, b in zip(at_the_end, whole[3], strict=True):
        assert torch.equal(a, b)
    again, resumed = run(checkpoint=tmp_path, checkpoint_every=3, **settings)
    assert resumed.stopped_early
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accuracies_are_there_beside_metrics_where_the_task_has_them():
    model = build("plain", torch.float32)
    result = sf.unlearn(
        model,
        forget=loader(8, 4, torch.float32, seed=5),
        retain=loader(16, 4, torch.float32, seed=6),
        recipe=RECIPE,
        eval_every=4,
        metrics={"weight": first_weight},
        stop_when=lambda entry: entry["forget_accuracy"] < -1,
    )
    assert not result.stopped_early
    assert {"forget_accuracy", "weight"} <= set(result.history[0])


def test_losses_are_there_where_the_task_has_no_accuracies():
    held = [images(6, seed=4)]
    _, result = run(eval_every=4, holdout=held, stop_when=lambda entry: entry["val_loss"] < 0)
    assert not result.stopped_early
    assert set(result.history[0]) == {"cycle", "skipped_steps", "forget_loss", "val_loss"}
    assert result.history[0]["forget_loss"] != result.history[-1]["forget_loss"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"metrics": {"a": first_weight}}, "eval_every"),
        ({"stop_when": bool}, "eval_every"),
        ({"eval_every": 1, "metrics": {"cycle": first_weight}}, "metrics"),
        ({"eval_every": 1, "metrics": {"a": 1.0}}, "metrics"),
        ({"eval_every": 1, "metrics": {"a": first_weight}, "stop_when": 3}, "stop_when"),
        ({"best": "best.pt"}, "eval_every"),
        ({"eval_every": 1, "best": "best.pt"}, "task"),
        (
            {
                "eval_every": 1,
                "metrics": {"a": first_weight},
                "over_forgetting": "stop",
                "forget_floor": 1.0,
            },
            "task",
        ),
    ],
)
def test_refusals(settings, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        run(**settings)
