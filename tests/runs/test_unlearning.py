"""unlearn(): evaluation, guards, callbacks, settings, and what it must leave alone."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import bits, build, data, loader, random_mask, same
from runs import CYCLES, EACH_RECIPE, RECIPES, Stop, loaders, run, whole_run

import sfron_fast as sf
from sfron_fast import Recipe

# --- evaluation, guards, callbacks ----------------------------------------------------------------


@EACH_RECIPE
@pytest.mark.parametrize("kind", ["global", "shared", "noisy"])
def test_evaluation_does_not_change_the_run(name, kind):
    expected = whole_run(RECIPES[name], kind)
    for every in (1, 2):
        result = run(
            RECIPES[name], kind, eval_every=every, holdout=loaders(kind)[0], forget_floor=0
        )
        assert same(bits(result.model), expected)
        assert [e["cycle"] for e in result.history] == [0, *range(every, CYCLES + 1, every)]


def test_history_measures_what_it_says():
    model, (x, y) = build("bn"), data(40, seed=2)
    retain, forget = loaders("own")
    seen = []

    def look(cycle, m):
        m.eval()
        pairs = (forget.dataset.tensors, (x, y))
        seen.append((cycle, *[100 * (m(a).argmax(1) == b).float().mean().item() for a, b in pairs]))
        m.train()

    recipe, val = RECIPES["paper"], [(x, y)]
    result = sf.unlearn(
        model,
        retain=retain,
        forget=forget,
        holdout=val,
        recipe=recipe,
        eval_every=1,
        forget_floor=0,
        on_cycle=look,
    )
    assert [s[0] for s in seen] == [1, 2, 3]
    for entry, (cycle, forgotten, val) in zip(result.history[1:], seen, strict=True):
        assert entry["cycle"] == cycle
        assert entry["forget_accuracy"] == pytest.approx(forgotten)
        assert entry["val_accuracy"] == pytest.approx(val)
    assert result.seconds > 0
    assert result.skipped_steps == 0
    assert not result.stopped_early


def forgetful(forget=None, **settings):
    """A run whose forget accuracy falls; of 8 samples that are known by heart, or others."""
    torch.manual_seed(0)
    model, (x, y) = build(), data(8, seed=6)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    recipe = Recipe.paper(
        cycles=6, retain_steps=1, lr=1e-4, forget_lr=3000.0, slow_lr=1.0, forget_decay="constant"
    )
    everything = sf.SaliencyMask.from_bool(
        {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    )
    sets = {"retain": loader(8, 4), "forget": forget or [(x, y)]}
    return sf.unlearn(model, **sets, recipe=recipe, mask=everything, **settings)


def test_guard_warns_once():
    with pytest.warns(RuntimeWarning, match="over-forgetting: forget accuracy") as caught:
        result = forgetful(eval_every=1, forget_floor=90.0)
    assert len(caught) == 1
    assert not result.stopped_early
    assert result.history[-1]["cycle"] == 6
    assert result.history[0]["forget_accuracy"] == 100


def test_guard_stops():
    with pytest.warns(RuntimeWarning, match="over-forgetting"):
        result = forgetful(eval_every=1, forget_floor=90.0, over_forgetting="stop")
    assert result.stopped_early
    below = [e["forget_accuracy"] < 90 for e in result.history]
    assert below == [False] * (len(below) - 1) + [True]
    assert len(below) < 7


def test_guard_takes_the_validation_accuracy_before_the_run():
    x, y = data(8, seed=6)
    with pytest.warns(RuntimeWarning, match=r"fell below 100.0 %"):
        forgetful(eval_every=2, holdout=[(x, y)])


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_every": 1, "forget_floor": 0},
        {"eval_every": 1},
        {"forget_floor": 90.0},
        {"eval_every": 1, "forget_floor": 0, "over_forgetting": "stop"},
    ],
)
def test_guard_off(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*reference kernels")
        result = forgetful(**settings)
    assert not result.stopped_early
    if "eval_every" in settings:
        assert result.history[-1]["forget_accuracy"] < 90


@pytest.mark.parametrize("settings", [{"forget_floor": 90.0}, {"eval_every": 1}])
def test_a_stop_that_could_never_come_is_refused(settings):
    with pytest.raises(
        ValueError,
        match="over_forgetting: expected eval_every > 0 and holdout or forget_floor",
    ):
        forgetful(over_forgetting="stop", **settings)


@pytest.mark.checklist("B10")
@pytest.mark.parametrize("recipe", [sf.Recipe.paper, sf.Recipe.official])
@pytest.mark.parametrize("bad", ["retain", "forget"])
def test_a_skipped_step_leaves_batchnorm_alone(recipe, bad):
    x, y = data(8)
    broken = x.clone()
    broken[0, 0] = float("nan")
    batches = {"retain": [(x, y)], "forget": [(x, y)]}
    batches[bad] = [(x, y), (broken, y)]
    model = build("bn")
    mask = random_mask(model)
    result = sf.unlearn(
        model,
        retain=batches["retain"],
        forget=batches["forget"],
        recipe=recipe(cycles=4),
        mask=mask,
    )
    assert result.skipped_steps > 0
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_a_bad_label_changes_nothing_not_even_running_statistics():
    x, y = data(8)
    model = build("bn")
    mask, before = random_mask(model), bits(model)
    with pytest.raises(ValueError, match="targets: expected classes"):
        sf.unlearn(
            model,
            retain=[(x, y)],
            forget=[(x, y + 50)],
            recipe=sf.Recipe.official(cycles=1),
            mask=mask,
        )
    assert same(bits(model), before)


def test_another_mask_in_the_checkpoint_folder_is_not_overwritten(tmp_path):
    x, y = data(8)
    model = build()
    other = random_mask(model, seed=9)
    other.save(tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match="checkpoint: expected no other mask"):
        sf.unlearn(
            model,
            retain=[(x, y)],
            forget=[(x, y)],
            recipe=sf.Recipe.paper(cycles=1),
            checkpoint=tmp_path,
        )
    assert sf.SaliencyMask.load(tmp_path / "mask.safetensors") == other


def test_a_recipe_of_numpy_numbers_can_be_resumed(tmp_path):
    x, y = data(8)
    recipe = sf.Recipe.official(cycles=1, lr=np.float64(0.01), betas=[np.float64(0.9), 0.99])
    for _ in range(2):
        sf.unlearn(build(), retain=[(x, y)], forget=[(x, y)], recipe=recipe, checkpoint=tmp_path)


def test_stopped_run_stays_stopped(tmp_path):
    with pytest.warns(RuntimeWarning):
        first = forgetful(
            eval_every=1,
            forget_floor=90.0,
            over_forgetting="stop",
            checkpoint=tmp_path,
            checkpoint_every=1,
        )
    again = forgetful(
        eval_every=1,
        forget_floor=90.0,
        over_forgetting="stop",
        checkpoint=tmp_path,
        checkpoint_every=1,
    )
    assert again.stopped_early
    assert again.history == first.history
    assert same(bits(again.model), bits(first.model))


def test_on_cycle_sees_the_model_after_every_cycle():
    seen = []
    result = run(RECIPES["paper"], "own", on_cycle=lambda c, m: seen.append((c, bits(m))))
    assert [c for c, _ in seen] == [1, 2, 3]
    assert same(seen[-1][1], bits(result.model))
    assert not same(seen[0][1], seen[1][1])


# --- settings that reach the loop -----------------------------------------------------------------


def test_custom_loss_is_used_everywhere():
    """The default loss given as a custom one is the same run; half of it is another."""
    expected = whole_run(RECIPES["paper"], "own")

    def near(a, b):
        return max((a[n].double() - b[n].double()).abs().max().item() for n in a)

    custom = whole_run(
        RECIPES["paper"], "own", loss_fn=lambda o, t: F.cross_entropy(o, t, reduction="none")
    )
    assert near(custom, expected) < 1e-5
    doubled = whole_run(
        RECIPES["paper"], "own", loss_fn=lambda o, t: 2 * F.cross_entropy(o, t, reduction="none")
    )
    assert near(doubled, expected) > 1e-3


@pytest.mark.parametrize("updates", [False, True])
def test_forget_batches_and_running_statistics(updates):
    recipe = Recipe.paper(
        cycles=1, retain_steps=1, lr=0.0, forget_lr=0.0, slow_lr=1.0, forget_updates_buffers=updates
    )
    model, expected = build("bn"), build("bn")
    forget, retain = data(6, seed=6), data(10, seed=5)
    sf.unlearn(model, retain=[retain], forget=[forget], recipe=recipe)
    expected.train()
    for x, _ in ([forget] if updates else []) + [retain]:
        expected(x)
    assert same(bits(model), bits(expected))
    assert model[1].num_batches_tracked == 1 + updates


def test_training_flags_come_back_also_after_errors():
    model = build("dropout").eval()
    model[2].train()
    flags = [m.training for m in model.modules()]
    retain, forget = loaders("own")
    sf.unlearn(model, retain=retain, forget=forget, recipe=RECIPES["paper"])
    assert [m.training for m in model.modules()] == flags

    def fails(cycle, m):
        assert m.training
        raise Stop

    with pytest.raises(Stop):
        sf.unlearn(model, retain=retain, forget=forget, recipe=RECIPES["paper"], on_cycle=fails)
    assert [m.training for m in model.modules()] == flags


def test_short_loaders_are_drawn_again_and_again():
    recipe = Recipe.paper(cycles=4, retain_steps=5, lr=0.05, forget_lr=0.2)
    once, often = build("bn"), build("bn")
    batches = [data(4, seed=s) for s in range(5)]
    mask = random_mask(once)
    # 20 steps of 5 batches
    sf.unlearn(once, retain=batches, forget=[data(4, seed=9)], recipe=recipe, mask=mask)
    sf.unlearn(often, retain=batches * 4, forget=[data(4, seed=9)] * 4, recipe=recipe, mask=mask)
    assert same(bits(once), bits(often))


@pytest.mark.checklist("B10")
def test_non_finite_batches_are_skipped_and_counted():
    model = build()
    bad, good = data(4, seed=1), data(4, seed=2)
    bad[0][1, 1] = float("nan")
    recipe = Recipe.paper(cycles=2, retain_steps=2, lr=0.1, forget_lr=0.1, slow_lr=1.0)
    result = sf.unlearn(
        model, retain=[bad, good], forget=[bad], recipe=recipe, mask=random_mask(model)
    )
    assert result.skipped_steps == 4  # two forget steps, two retain steps
    assert all(torch.isfinite(p).all() for p in model.parameters())
    twin = build()
    for _ in range(2):
        F.cross_entropy(twin(good[0]), good[1]).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_stay(tmp_path):
    model = build("bn")
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    retain, forget = loaders("own")
    result = sf.unlearn(
        model, retain=retain, forget=forget, recipe=RECIPES["official"], checkpoint=tmp_path
    )
    assert torch.equal(model[0].weight, before)
    assert "0.weight" not in result.mask


def test_progress_bars_change_nothing(capsys):
    expected = whole_run(RECIPES["paper"], "own")
    assert same(whole_run(RECIPES["paper"], "own", progress=True), expected)
