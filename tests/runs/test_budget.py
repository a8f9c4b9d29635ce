"""Forgetting under a budget, and a ceiling measured on the holdout set."""

import pytest
import torch
import torch.nn.functional as F
from models import bits, build, data, loader, same
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf
from sfron_fast.data.kept_out import keep_out
from sfron_fast.distributed.ranks import Ranks
from sfron_fast.runs.budget import AHEAD, GAIN, RAMP, RETREAT, WIDTH, Budget

FORGET, RETAIN, HOLDOUT = [data(8, seed=1)], list(loader(24, 4, seed=2)), [data(12, seed=3)]
RECIPE = sf.Recipe.budgeted(cycles=6, lr=1e-2, forget_lr=1e-2)
SETS = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}


def test_what_is_kept_out_is_not_trained_on():
    rest, kept = keep_out(RETAIN, "retain")
    assert len(rest) == 5
    assert kept[0] is RETAIN[5]
    numbers = TensorDataset(torch.arange(50), torch.arange(50))
    source = DataLoader(numbers, batch_size=7, shuffle=True, drop_last=True)
    rest, kept = keep_out(source, "retain")
    out = torch.cat([batch[0] for batch in kept])
    assert out.tolist() == [0, 12, 24, 37, 49]
    seen = [torch.cat([batch[0] for batch in rest]) for _ in range(8)]
    assert all(len(s) == 42 for s in seen)  # drop_last stays
    assert not torch.equal(seen[0], seen[1])  # so does the shuffling
    assert set(torch.cat(seen).tolist()) == set(range(50)) - set(out.tolist())
    in_order, _ = keep_out(DataLoader(numbers, batch_size=7), "retain")
    assert torch.cat([batch[0] for batch in in_order]).tolist() == sorted(
        set(seen[0].tolist()) | {n for n in range(50) if n not in out.tolist()}
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (RETAIN[:1], "retain: expected at least two batches.*found 1"),
        (
            DataLoader(TensorDataset(torch.arange(9))),
            "retain: expected at least 10 samples, found 9",
        ),
        (iter(RETAIN), "retain: expected a list, or a DataLoader with its own sampler"),
    ],
)
def test_what_cannot_be_kept_out_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        keep_out(source, "retain")


def test_the_learning_rates_follow_the_spending():
    """By hand: nothing spent, half of it too early, too much, and too much that falls again."""
    model = build()
    budget = Budget(
        Ranks(model, None), RETAIN[-1:], sf.Classification(), share=0.5, holdout_loss=2.0
    )
    optimizer = RECIPE.make_optimizer(model, None)
    rate, before, lr = 1.0, 0.0, RECIPE.lr
    for cycle, spent in enumerate((0.0, 0.5, 2.0, 1.9), 1):
        rise = torch.tensor(spent, dtype=torch.float64)  # of a limit of 1
        budget.look = (budget.before + rise).clone
        budget.follow(optimizer, 0.1, cycle, 10)
        left = (cycle / 10 / RAMP - spent - AHEAD * max(0.0, spent - before)) / WIDTH
        rate *= torch.tensor(GAIN / 10 * min(1.0, max(-3.0, left))).exp().item()
        opened = min(1.0, max(0.0, 0.5 + 0.5 * left))
        found = optimizer.param_groups[0]["forget_lr"]
        torch.testing.assert_close(found, torch.tensor(0.1 * rate * opened))
        if opened == 0.0 and spent >= before:  # retain steps alone cost it
            lr *= torch.tensor(-RETREAT / 10).exp().item()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        before = spent
    assert found == 0.0
    assert lr < RECIPE.lr


def test_retain_steps_that_cost_too_much_become_smaller():
    """A learning rate that fine-tuning alone could not afford: still within the budget."""
    model = build()
    recipe = RECIPE.replace(lr=0.3, forget_lr=0.0, cycles=40)
    loose = run(build(), 1e9, recipe=recipe).budget_spent * 1e9
    spent = run(model, 0.5, recipe=recipe).budget_spent
    assert loose > 1.0
    assert spent < 1.25


def test_where_nothing_is_chosen_there_is_a_budget():
    """The default, with a holdout set; without one, the paper's recipe."""
    found, expected = build(), build()
    result = sf.unlearn(found, **SETS)
    sf.unlearn(expected, **SETS, retain_budget=0.05)
    assert result.budget_spent is not None
    assert same(bits(found), bits(expected))


def test_a_run_that_spent_too_much_says_so():
    """Retain steps of a learning rate that is far too high."""
    with pytest.warns(RuntimeWarning, match=r"spent .* of its retain_budget of 0.001.*lower lr"):
        run(build(), 1e-3, recipe=RECIPE.replace(lr=1.0))


def run(model, budget, **settings):
    settings = {"recipe": RECIPE, **settings}
    return sf.unlearn(model, **SETS, retain_budget=budget, **settings)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_more_may_be_forgotten_for_more():
    losses, spent = [], []
    for budget in (1e-3, 0.1, 10.0):
        model = build()
        result = run(model, budget, recipe=RECIPE.replace(cycles=30))
        losses.append(F.cross_entropy(model.eval()(FORGET[0][0]), FORGET[0][1]).item())
        spent.append(result.budget_spent * budget)
    assert losses == sorted(losses)
    assert losses[2] > losses[0] + 1.0


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_a_run_under_a_budget_goes_on_from_a_checkpoint(tmp_path):
    whole, model = build(), build()
    expected = run(whole, 0.1)

    def stop(cycle, _):
        if cycle == 3:
            raise KeyboardInterrupt

    settings = {"checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(model, 0.1, on_cycle=stop, **settings)
    for wrong in (0.2, None):
        with pytest.raises(ValueError, match="retain_budget: expected"):
            run(build(), wrong, **settings)
    resumed = build()
    found = run(resumed, 0.1, **settings)
    assert same(bits(resumed), bits(whole))
    assert found.budget_spent == expected.budget_spent


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_a_ceiling_without_a_reference_is_of_the_holdout_set():
    found, expected = build(), build()
    inputs, labels = HOLDOUT[0]
    recipe = sf.Recipe.paper(cycles=3, retain_steps=1, ceiling=0.9)
    sf.unlearn(found, **SETS, recipe=recipe)
    with torch.no_grad():
        reference = F.cross_entropy(build().eval()(inputs), labels).item()
    sf.unlearn(expected, **SETS, recipe=recipe.replace(reference_loss=reference))
    for name, weight in bits(found).items():
        torch.testing.assert_close(weight, bits(expected)[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "settings",
    [{"recipe": RECIPE, "retain_budget": 0.1}, {"recipe": RECIPE.replace(ceiling=1)}],
)
def test_they_want_a_holdout_set(settings):
    with pytest.raises(ValueError, match=r"holdout: expected held-out batches.*found None"):
        sf.unlearn(build(), forget=FORGET, retain=RETAIN, **settings)
    with pytest.raises(ValueError, match="retain_budget: expected"):
        sf.unlearn(build(), **SETS, retain_budget=-1.0)
