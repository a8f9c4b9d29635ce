"""`unlearn` without a recipe: it forgets, keeps, ends, and says when it cannot."""

import copy
import math
import warnings

import pytest
import torch
from denoisers import KEPT, NULL, denoiser, images
from models import CLASSES, bits, build, data, loader, random_mask, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import sfron_fast as sf
from sfron_fast.distributed.ranks import Ranks
from sfron_fast.runs.budget import Budget
from sfron_fast.runs.defaults import UNSEEN, default_recipe, default_task, frozen_norms, guess


def blobs(count, seed, wrong=False, classes=CLASSES):
    """Features of which the first say the class; labels that are another's, if ``wrong``."""
    inputs, _ = data(count, seed=seed)
    labels = torch.arange(count) % classes
    inputs = inputs + 4.0 * nn.functional.one_hot(labels, inputs.shape[1])
    return inputs, (labels + 1 + torch.arange(count) % 3) % CLASSES if wrong else labels


def batches(pair, size=16, shuffle=True):
    return DataLoader(TensorDataset(*pair), size, shuffle=shuffle)


def taught(*pairs, epochs=200):
    """A model with BatchNorm that knows them by heart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    )
    model.append(nn.Linear(64, CLASSES))
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    return model.eval()


WRONG, RETAIN, HOLDOUT = blobs(12, 1, wrong=True), blobs(160, 2), blobs(80, 3)


@pytest.mark.parametrize("holdout", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_a_classifier_forgets_wrong_labels_without_a_knob(holdout, seed):
    model = taught(WRONG, RETAIN)
    torch.manual_seed(seed)
    more = {"holdout": batches(HOLDOUT)} if holdout else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sf.unlearn(model, forget=batches(WRONG), retain=batches(RETAIN), **more)
    assert result.before["forget_accuracy"] > 90.0
    assert result.after["forget_accuracy"] < 10.0
    assert result.after["retain_accuracy"] > 95.0
    assert result.after["forget_loss"] > math.log(CLASSES)
    assert result.forgotten_steps > 0  # it ends where labels are as unlikely as a guess
    assert result.budget_spent is not None


@pytest.mark.parametrize("seed", range(2))
def test_a_second_deletion_leaves_the_first_deleted(seed):
    first, second = (tuple(t[i::2] for t in WRONG) for i in range(2))
    model = taught(WRONG, RETAIN)
    torch.manual_seed(seed)
    # what is asked for later is retained until then
    both = tuple(torch.cat([a, b]) for a, b in zip(RETAIN, second, strict=True))
    before = sf.unlearn(model, forget=batches(first), retain=batches(both))
    kept = sf.unlearn(copy.deepcopy(model), forget=batches(second), retain=batches(RETAIN)).before
    assert before.after["forget_accuracy"] < 20.0
    assert kept["forget_accuracy"] > 60.0
    after = sf.unlearn(model, forget=batches(second), retain=batches(RETAIN))
    assert after.after["forget_accuracy"] < 20.0
    assert after.after["retain_accuracy"] > 95.0
    with torch.no_grad():
        again = (model.eval()(first[0]).argmax(1) == first[1]).double().mean()
    assert again < 0.2


def test_what_has_been_deleted_is_known_as_such():
    model = taught(WRONG, RETAIN)
    sets = {"forget": batches(WRONG), "retain": batches(RETAIN), "holdout": batches(HOLDOUT)}
    sf.unlearn(model, **sets)
    with pytest.warns(RuntimeWarning, match="no better than the holdout set.*forgotten before"):
        sf.unlearn(model, **sets)


def test_statistics_of_norms_stay():
    """Of forget batches alone they would be others, and losses would say little."""
    model = taught(WRONG, RETAIN)
    before = {n: b.clone() for n, b in model.named_buffers()}
    sf.unlearn(model, forget=batches(WRONG), retain=batches(RETAIN))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    modes = dict.fromkeys(model.modules(), True)
    assert [m for m, train in frozen_norms(modes).items() if not train] == [model[1]]


@pytest.mark.filterwarnings("ignore:the run spent:RuntimeWarning")
def test_what_cannot_be_forgotten_within_the_budget_says_so():
    """Copies of retain samples, which retain steps teach again, and next to no budget."""
    x, y = RETAIN
    forget = x[:16] + 1e-4, y[:16]
    with pytest.warns(RuntimeWarning, match="nothing was forgotten.*raise retain_budget"):
        result = sf.unlearn(
            taught(RETAIN), forget=batches(forget), retain=batches(RETAIN), retain_budget=1e-5
        )
    assert result.after["retain_accuracy"] > 95.0
    assert any("nothing was forgotten" in said for said in result.warnings)


def test_the_rate_does_not_rise_while_nothing_is_left_to_forget():
    """Else the next sample that falls below the ceiling would get a step far too long."""
    model = build()
    kept = [data(8, seed=2)]
    budget = Budget(Ranks(model, None), kept, sf.Classification(), share=0.5, holdout_loss=2.0)
    optimizer = default_recipe(sf.Classification()).make_optimizer(model, None)
    rates = []
    for idle in (None, torch.tensor(False), torch.tensor(True)):
        budget.follow(optimizer, 0.1, 5, 10, idle)
        rates.append(budget.rate.item())
    assert 1.0 < rates[0] < rates[1] == rates[2]
    budget.before -= 10.0  # overspent: it falls all the same
    budget.follow(optimizer, 0.1, 5, 10, torch.tensor(True))
    assert budget.rate.item() < rates[2]


# --- what stands in for a holdout set -------------------------------------------------------------


class Regression(sf.Task):
    """Of batches (inputs, values)."""

    def losses(self, model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square()


def test_a_guess_among_all_classes():
    ranks = Ranks(build(), None)
    kept = [data(4), data(3)]
    assert guess(sf.Classification(), ranks, kept) == pytest.approx(math.log(CLASSES))
    own = sf.Classification(lambda o, t: o.square().mean(1))
    assert guess(own, ranks, kept) is None
    assert guess(Regression(), ranks, kept) is None
    assert 0.0 < UNSEEN < 1.0


def test_any_other_loss_is_measured_on_retain_samples():
    x, y = blobs(60, 5)
    sets = {"forget": [(x[:6], y[:6].float())], "retain": batches((x[6:], y[6:].float()))}
    result = sf.unlearn(build(), **sets, task=Regression())
    assert result.after["forget_loss"] > 1.01 * result.before["forget_loss"]
    zero = {"forget": [(x[:6], y[:6])], "retain": batches((x[6:], y[6:]))}
    settings = {"mask": random_mask(build()), "loss_fn": lambda o, t: 0.0 * o.sum(1)}
    with pytest.raises(ValueError, match=r"^holdout: expected batches of unseen samples.*found 0"):
        sf.unlearn(build(), **zero, **settings)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(*RETAIN, strict=True))


@pytest.mark.parametrize("kind", ["one batch", "stream", "sampler"])
def test_a_retain_set_that_cannot_be_split_is_looked_at_as_it_is(kind, tmp_path):
    weights = WeightedRandomSampler([1.0] * 160, 160)
    retain = {
        "one batch": [RETAIN],
        "stream": DataLoader(Endless(), 16),
        "sampler": DataLoader(TensorDataset(*RETAIN), 16, sampler=weights),
    }[kind]
    model = taught(WRONG, RETAIN)
    with pytest.warns(RuntimeWarning, match="no samples can be kept out of this loader") as caught:
        result = sf.unlearn(model, forget=batches(WRONG), retain=retain)
    assert len(caught) == 1
    assert result.after["forget_accuracy"] < 10.0
    with pytest.raises(ValueError, match=r"^retain: expected"):  # others might be seen there
        sf.unlearn(model, forget=batches(WRONG), retain=retain, checkpoint=tmp_path)


# --- what an explicit recipe does is its own ------------------------------------------------------


def test_a_recipe_has_no_budget_unless_it_is_asked_for():
    sets = {"forget": loader(8, 4, seed=1), "retain": loader(24, 4, seed=2)}
    recipe = sf.Recipe.paper(cycles=3, forget_lr=0.5)
    result = sf.unlearn(build(), **sets, recipe=recipe)
    assert result.budget_spent is None
    explicit = sf.Recipe.budgeted(cycles=3)
    assert (explicit.ceiling, explicit.lr, explicit.forget_lr) == (None, 1e-3, 1e-4)
    model = build("bn")
    before = {n: b.clone() for n, b in model.named_buffers()}
    sf.unlearn(model, **sets, recipe=recipe)
    assert not all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_default_run_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    short = default_recipe(sf.Classification()).replace(cycles=6)
    monkeypatch.setattr("sfron_fast.runs.unlearn.default_recipe", lambda task: short)
    sets = {"forget": [WRONG], "retain": [tuple(t[i::8] for t in RETAIN) for i in range(8)]}

    def kill(cycle, _):
        if cycle == 3:
            raise KeyboardInterrupt

    whole, resumed = taught(WRONG, RETAIN, epochs=40), taught(WRONG, RETAIN, epochs=40)
    expected = sf.unlearn(whole, **sets)
    settings = {**sets, "checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        sf.unlearn(taught(WRONG, RETAIN, epochs=40), on_cycle=kill, **settings)
    found = sf.unlearn(resumed, **settings)
    assert same(bits(resumed), bits(whole))
    assert (found.budget_spent, found.after) == (expected.budget_spent, expected.after)


# --- other tasks ----------------------------------------------------------------------------------


def test_each_task_has_its_recipe():
    names = {
        sf.Classification(): "SFR-on (default)",
        sf.Language(): "SFR-on (default)",
        sf.Denoising(KEPT): "SFR-on (diffusion, ascent)",
        sf.Denoising(KEPT, instead=sf.Relabel(1)): "SFR-on (diffusion)",
        Regression(): "SFR-on (default)",
    }
    assert {task: default_recipe(task).name for task in names} == names


def test_a_diffusion_model_says_what_it_says_without_the_condition():
    model, own = denoiser(), sf.Denoising(KEPT, null=NULL)
    given = default_task(own, model, several=False)
    assert own.instead is None
    assert isinstance(given.instead, sf.Unconditional)
    assert given.instead.teacher is not model
    assert given.places is own.places  # a run's draws go on
    for kept in (
        sf.Denoising(KEPT),
        sf.Denoising(KEPT, null=NULL, instead=sf.Relabel(1)),
        sf.Denoising(KEPT, condition=None),
    ):
        assert default_task(kept, model, several=False).instead is kept.instead
    assert default_task(own, model, several=True).instead is None
    assert default_task(sf.Language(), model, several=False).__class__ is sf.Language


@pytest.mark.parametrize("null", [None, NULL])
def test_a_diffusion_model_forgets_a_class_without_a_knob(null):
    """By the loss of the class it was to forget, beside that of the others."""
    model, teaching = denoiser(), sf.Denoising(KEPT, null=NULL)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(400):
        adam.zero_grad()
        batch = teaching.prepare(images(64), torch.device("cpu"), "retain")
        teaching.mean_loss(model, batch).backward()
        adam.step()
    x, labels = images(240, seed=7)
    sets = {
        "forget": batches(images(40, label=1)),
        "retain": batches((x[labels != 1], labels[labels != 1])),
    }
    task = sf.Denoising(KEPT, null=null)
    result = sf.unlearn(copy.deepcopy(model), **sets, task=task)
    rise = {n: result.after[f"{n}_loss"] / result.before[f"{n}_loss"] for n in sets}
    assert rise["forget"] > 1.2
    assert rise["retain"] < 1.1
    assert result.budget_spent < 1.5
    assert task.reference is None  # the caller's is as it was
    assert task.instead is None
