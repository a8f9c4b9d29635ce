"""What a run says of itself: losses and accuracies before and after, and the sets it was given."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import bits, build, data, loader, same
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

import sfron_fast as sf
from sfron_fast import Recipe
from sfron_fast.runs.known import LOOKED, Known, digests, shared_samples

RECIPE = Recipe.paper(cycles=4, retain_steps=1, forget_lr=0.5)
FORGET, RETAIN, HOLDOUT = data(8, seed=1), data(24, seed=2), data(12, seed=3)
SETS = {"forget": [FORGET], "retain": [RETAIN]}


def measured(model, **sets):
    """The same figures by hand."""
    found = {}
    for name, (x, y) in sets.items():
        with torch.no_grad():
            logits = model.eval()(x)
        found[f"{name}_loss"] = pytest.approx(F.cross_entropy(logits, y).item())
        found[f"{name}_accuracy"] = pytest.approx(
            100 * (logits.argmax(1) == y).double().mean().item()
        )
    return found


@pytest.mark.parametrize("kind", ["bn", "dropout"])
def test_before_and_after_are_those_of_the_sets(kind):
    sets = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}
    model = build(kind)
    before = measured(build(kind), **sets)
    result = sf.unlearn(model, **{n: [pair] for n, pair in sets.items()}, recipe=RECIPE)
    assert result.before == before
    assert result.after == measured(model, **sets)
    assert result.before != result.after
    without = sf.unlearn(build(kind), **SETS, recipe=RECIPE)
    assert same(bits(without.model), bits(model))  # a holdout set changes nothing
    assert "holdout_loss" not in without.before


def test_a_resumed_run_knows_how_it_began(tmp_path):
    def kill(cycle, _):
        if cycle == 2:
            raise KeyboardInterrupt

    settings = {**SETS, "recipe": RECIPE, "checkpoint": tmp_path, "checkpoint_every": 1}
    whole = sf.unlearn(build(), **SETS, recipe=RECIPE)
    with pytest.raises(KeyboardInterrupt):
        sf.unlearn(build(), on_cycle=kill, **settings)
    resumed = sf.unlearn(build(), **settings)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert resumed.cycles == whole.cycles == 4


def test_of_a_large_set_some_are_looked_at_the_same_both_times():
    many = TensorDataset(*data(5 * LOOKED, seed=4))
    model, still = build(), RECIPE.replace(lr=0.0, forget_lr=0.0)
    shuffled = DataLoader(many, 32, shuffle=True)
    with pytest.warns(RuntimeWarning, match="changed no weight"):
        result = sf.unlearn(model, forget=shuffled, retain=loader(2000, 8, seed=2), recipe=still)
    assert result.before == result.after
    chosen = torch.linspace(0, len(many) - 1, LOOKED).round().long()
    expected = measured(build(), forget=tuple(t[chosen] for t in many.tensors))
    assert result.before["forget_loss"] == expected["forget_loss"]


def test_a_forget_set_that_is_still_known_is_told():
    """Beside a holdout set, beyond chance; half of it without one, by the default recipe alone,
    below its ceiling.
    """
    begun = {"forget_accuracy": 100.0}
    known = Known.__new__(Known)
    known.looked = {"forget": 100, "holdout": 100}
    known.run = SimpleNamespace(chosen=False, recipe=Recipe.paper(ceiling=0.5), reference=4.0)

    def still(forget, holdout=None, loss=1.9):
        after = {"forget_accuracy": forget, "forget_loss": loss}
        after |= {} if holdout is None else {"holdout_accuracy": holdout}
        return known.still(begun, after)

    assert "70.0 % of it are right, and 30.0 % of the holdout set" in still(70.0, 30.0)
    assert not still(40.0, 30.0)  # 10 points are 1.5 of chance
    assert still(100.0, 90.0)
    assert not still(100.0, 98.0)
    assert "only a holdout set tells" in still(51.0)
    assert not still(50.0)
    assert not still(51.0, loss=2.0)
    known.run.chosen = True
    assert not still(51.0)
    assert still(70.0, 30.0)
    assert known.still({"forget_loss": 1.0}, {"forget_loss": 2.0}) == ""


def test_a_run_that_forgets_in_part_says_so():
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(FORGET[0]), FORGET[1]).backward()
        optimizer.step()
    unseen = data(64, seed=9)
    little = RECIPE.replace(forget_lr=0.3, lr=0.0, threshold=None)
    with pytest.warns(RuntimeWarning, match="forgotten in part: 100.0 % of it are right, and"):
        result = sf.unlearn(model, **SETS, holdout=[unseen], recipe=little)
    assert any("forgotten in part" in said for said in result.warnings)


class Regression(sf.Task):
    def losses(self, model, batch):
        return (model(batch["x"])[:, 0] - batch["y"]).square()


def test_a_task_that_does_not_say_what_is_right_has_losses_alone():
    sets = {n: [{"x": x, "y": y.float()}] for n, (x, y) in zip(SETS, (FORGET, RETAIN), strict=True)}
    result = sf.unlearn(build(), **sets, task=Regression(), recipe=RECIPE)
    assert set(result.before) == {"forget_loss", "retain_loss"}
    assert "accuracy" not in result.summary()


# --- one line -------------------------------------------------------------------------------------


def test_the_summary_is_one_short_line():
    result = sf.unlearn(build(), **SETS, holdout=[HOLDOUT], recipe=RECIPE)
    line = result.summary()
    before, after = result.before, result.after
    assert "\n" not in line
    assert line.startswith("SFR-on (paper): forget loss ")
    assert f"{before['forget_loss']:.3g} -> {after['forget_loss']:.3g}, accuracy" in line
    assert f"holdout loss {before['holdout_loss']:.3g} -> " in line
    assert "4 cycles" in line
    assert repr(result) == f"<UnlearnResult {line}>"
    assert str(result) == line
    assert len(line) < 400
    with pytest.warns(RuntimeWarning):
        still = sf.unlearn(build(), **SETS, recipe=RECIPE.replace(lr=0.0, forget_lr=0.0))
    assert still.summary().endswith("1 warning")
    assert str(still) == f"{still.summary()}\n  warning: {still.warnings[0]}"


def test_a_budget_and_a_ceiling_are_in_it():
    sets = {**SETS, "retain": list(loader(24, 4, seed=2)), "holdout": [HOLDOUT]}
    recipe = Recipe.budgeted(cycles=6, ceiling=1e-6, reference_loss=1.0)
    with pytest.warns(RuntimeWarning):
        line = sf.unlearn(build(), **sets, retain_budget=0.1, recipe=recipe).summary()
    assert "% of the budget spent" in line
    assert "6 forget steps past the ceiling" in line
    assert "skipped" not in line


# --- sets that a run can do little with -----------------------------------------------------------


def warned(match, **settings):
    with pytest.warns(RuntimeWarning, match=match) as caught:
        result = sf.unlearn(build(), **{**SETS, "recipe": RECIPE, **settings})
    assert len(result.warnings) == len({str(c.message) for c in caught})
    assert caught[0].filename == __file__


def test_sets_that_overlap():
    some = FORGET[0][:3], FORGET[1][:3]
    both = tuple(torch.cat([a, b]) for a, b in zip(RETAIN, some, strict=True))
    warned(r"forget and retain have samples in common \(3 of those", retain=[both])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relabelled = [(FORGET[0], (FORGET[1] + 1) % 4)]  # the same inputs may be taught otherwise
        sf.unlearn(build(), forget=[FORGET], retain=relabelled, recipe=RECIPE)


def test_sets_that_overlap_in_their_data_set():
    """Also where none of the samples looked at shows it."""
    whole = TensorDataset(*data(40))
    first, last = Subset(whole, range(10)), Subset(Subset(whole, range(5, 40)), range(4, 35))
    assert shared_samples(DataLoader(first), DataLoader(last)) == 1
    assert shared_samples(DataLoader(first), DataLoader(whole, shuffle=True)) == 10
    sampled = DataLoader(whole, sampler=SubsetRandomSampler([7, 30, 31]))
    assert shared_samples(DataLoader(first), sampled) == 1
    assert shared_samples(sampled, DataLoader(Subset(whole, [1, 2]))) == 0
    assert shared_samples(DataLoader(first), DataLoader(TensorDataset(*data(40)))) == 0
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 40, 5)
    assert shared_samples(DataLoader(first), DataLoader(whole, sampler=weighted)) == 0
    assert shared_samples([FORGET], [RETAIN]) == 0


def test_samples_are_told_apart_by_all_their_tensors():
    x, y = data(5)
    batch = {"x": x, "more": [y, x.bfloat16()], "name": "a"}
    assert len(set(digests([batch]))) == 5
    assert list(digests([batch])) == list(digests([{**batch, "name": "b"}]))
    assert not set(digests([batch])) & set(digests([{**batch, "x": x + 1}]))


def test_a_forget_set_that_is_not_known():
    x = FORGET[0]
    with torch.no_grad():
        hard, easy = (build().eval()(x) * s for s in (-1, 1))
    sets = {"forget": [(x, hard.argmax(1))], "holdout": [(x + 1e-4, easy.argmax(1))]}
    warned("knows the forget set no better than the holdout set", **sets)


def test_losses_of_the_wrong_sign():
    def log_probability(output, targets):
        return -F.cross_entropy(output, targets, reduction="none")

    warned("the forget losses are negative", loss_fn=log_probability)


def test_a_model_that_is_lost():
    def lose(cycle, model):
        if cycle == RECIPE.cycles:
            model[0].weight.data.fill_(float("nan"))

    with pytest.warns(RuntimeWarning, match=r"the model is lost: its losses of the forget and ret"):
        result = sf.unlearn(build(), **SETS, recipe=RECIPE, on_cycle=lose)
    assert "-> nan, accuracy" in result.summary()
    assert "forget_accuracy" not in result.after


def test_a_loss_that_falls_where_it_should_rise():
    """Descended retain samples that are nearly those to be forgotten."""
    near = [(FORGET[0] + 1e-3, FORGET[1])]
    with pytest.warns(RuntimeWarning, match=r"nothing was forgotten.*it fell"):
        sf.unlearn(
            build(),
            forget=[FORGET],
            retain=near,
            recipe=RECIPE.replace(cycles=60, lr=0.5, forget_lr=1e-9),
            loss_fn=lambda o, t: F.cross_entropy(o, t, reduction="none"),
        )
