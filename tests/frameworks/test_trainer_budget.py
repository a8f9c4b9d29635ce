"""A budget for the forget steps of a Hugging Face Trainer."""

import math

import pytest
import torch
from models import bits, same
from test_transformers import arguments, bert, half, unlearner
from tiny import gpt, sequences
from transformers import Trainer

import sfron_fast as sf
from sfron_fast.integrations.transformers import ForgetCallback, RetainBudget
from sfron_fast.runs.budget import RETREAT

RETAIN, FORGET, KEPT, HOLDOUT = (sequences(8, seed=seed) for seed in (3, 4, 5, 6))
LOGGED = {"logging_strategy": "steps", "logging_steps": 1}
LR = 0.1  # of `arguments` and the optimizer


def run(
    folder, share=0.05, *, resume=None, model=None, budget="made", max_steps=8, more=(), **settings
):
    """The model, the Trainer and its budget after a run."""
    model = gpt() if model is None else model
    args = arguments(folder, max_steps=max_steps, learning_rate=LR, **LOGGED, **settings)
    if budget == "made":
        budget = RetainBudget(KEPT, HOLDOUT, share=share)
    sets = {"retain": RETAIN, "forget": FORGET}
    trainer, _ = unlearner(
        model, args, half(gpt()), weight=1.0, budget=budget, **sets, **dict(more)
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer, budget


def loss(model, rows):
    """The mean over samples of the mean over their labelled tokens."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    task = sf.Language()
    with torch.no_grad():
        return task.mean_loss(model.eval(), task.prepare(batch, torch.device("cpu"))).item()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_what_is_spent_is_what_the_retain_loss_has_risen(tmp_path):
    model, trainer, _ = run(tmp_path, share=0.2)
    limit = 0.2 * loss(gpt(), HOLDOUT)
    logged = [e["budget_spent"] for e in trainer.state.log_history if "budget_spent" in e]
    assert len(logged) == 8
    assert logged[0] == 0.0  # inside the first cycle
    assert logged[-1] == pytest.approx((loss(model, KEPT) - loss(gpt(), KEPT)) / limit)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_both_learning_rates_follow_it(tmp_path):
    """Of next to nothing: the forget steps are shut, and the Trainer's schedule goes on lower."""
    budget = RetainBudget(FORGET, HOLDOUT, share=1e-9)  # what is kept is what is forgotten
    _, trainer, _ = run(tmp_path, budget=budget, more={"forget_lr": 50.0})
    group = trainer.optimizer.param_groups[0]
    assert group["forget_lr"] == 0.0
    logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert logged[:2] == [LR, LR * 7 / 8]  # the first cycle is the schedule's
    for step in range(2, 8):  # from the schedule's by whole retreats
        retreats = math.log(LR * (1 - step / 8) / logged[step]) / (RETREAT / 4)
        assert retreats == pytest.approx(round(retreats), abs=1e-5)
    assert retreats > 0.5
    _, trainer, _ = run(tmp_path, share=1e9)
    logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert logged == pytest.approx([LR * (1 - step / 8) for step in range(8)])
    assert trainer.optimizer.param_groups[0]["forget_lr"] > LR


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_goes_on_with_its_budget(stop, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": stop, "share": 0.02}
    whole, trainer, budget = run(tmp_path, **saving)
    other = sequences(8, seed=9)  # the scale is the checkpoint's
    resumed, again, found = run(
        tmp_path / "again",
        resume=str(tmp_path / f"checkpoint-{stop}"),
        budget=RetainBudget(KEPT, other, share=0.02),
        **saving,
    )
    assert same(bits(whole), bits(resumed))
    assert found.logs() == budget.logs()
    rates = [
        [(g["lr"], g["forget_lr"]) for g in t.optimizer.param_groups] for t in (trainer, again)
    ]
    assert rates[0] == rates[1]
    for wrong in (0.5, None):
        given = RetainBudget(KEPT, HOLDOUT, share=0.5) if wrong else "made"
        source = tmp_path / f"checkpoint-{stop}"
        if wrong is None:
            run(tmp_path / "plain", budget=None, save_strategy="steps", save_steps=stop)
            source = tmp_path / "plain" / f"checkpoint-{stop}"
        with pytest.raises(ValueError, match="retain_budget: expected"):
            run(tmp_path / "wrong", resume=str(source), budget=given)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_classifiers(tmp_path):
    model = bert()
    rows = [{**e, "labels": torch.tensor(i % 3)} for i, e in enumerate(KEPT)]
    budget = RetainBudget(rows[:4], rows[4:], task=sf.Classification())
    args = arguments(tmp_path)
    sets = {"retain": rows, "forget": rows[:2]}
    unlearner(model, args, half(model), budget=budget, **sets)[0].train()
    assert budget.logs()["budget_spent"] != 0.0


def test_a_run_that_costs_too_much_says_so(tmp_path):
    budget = RetainBudget(FORGET, HOLDOUT, share=1e-6)
    with pytest.warns(RuntimeWarning, match="of its retain_budget of 1e-06.*lower lr"):
        run(tmp_path, budget=budget, max_steps=2, more={"forget_lr": 50.0})


def test_bad_input_is_refused_by_name(tmp_path):
    for kept, holdout, name in (([], HOLDOUT, "kept_dataset"), (KEPT, None, "holdout_dataset")):
        with pytest.raises(ValueError, match=f"{name}: expected a dataset with a length"):
            RetainBudget(kept, holdout)
    with pytest.raises(ValueError, match="share: expected"):
        RetainBudget(KEPT, HOLDOUT, share=0.0)
    with pytest.raises(ValueError, match="task: expected a Task"):
        RetainBudget(KEPT, HOLDOUT, task="language")
    model = gpt()
    start = bits(model)
    with pytest.raises(ValueError, match="retain_budget: expected a RetainBudget"):
        run(tmp_path, model=model, budget=0.05)
    optimizer = sf.SFRonSGD(model.named_parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=RETAIN, optimizers=(optimizer, schedule)
    )
    budget = RetainBudget(KEPT, HOLDOUT)
    trainer.add_callback(ForgetCallback(trainer, FORGET, retain_budget=budget))
    with pytest.raises(ValueError, match="lr_scheduler_type: expected a LambdaLR"):
        trainer.train()
    assert same(bits(model), start)
