"""Runs that do nothing, and say so; models and callers that would make one do nothing."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import bits, build, data, random_mask, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf
from sfron_fast import Recipe
from sfron_fast.runs.outcome import Outcome

X, Y = data(8, seed=6)
BAD = torch.full_like(X, float("nan"))
GOOD = {"cycles": 4, "retain_steps": 1, "lr": 0.01, "forget_lr": 0.5}


def by_heart():
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


def run(retain=((X + 1e-4, Y),), forget=((X, Y),), model=None, recipe=None, **settings):
    model = {None: build, "by heart": by_heart}[model]() if model in (None, "by heart") else model
    recipe = Recipe.paper(**GOOD | (recipe or {}))
    settings = {"mask": random_mask(build())} | settings
    return sf.unlearn(model, retain=list(retain), forget=list(forget), recipe=recipe, **settings)


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ("all 4 forget steps had gradients that are not finite", {"forget": [(BAD, Y)]}),
        ("all 4 retain steps had losses that are not finite", {"retain": [(BAD, Y)]}),
        (
            "in all 4 forget steps the gradient of the selected weights was zero",
            {"recipe": {"forget_weight": 0.0}},
        ),
        ("the run changed no weight", {"recipe": {"lr": 0.0, "forget_lr": 0.0}}),
        ("the run changed no weight", {"recipe": {"lr": 1e-30, "forget_lr": 1e-30}}),
        ("the loss of the forget batches was", {"recipe": {"forget_lr": 1e-9}}),
        (
            "the loss of the forget batches was",
            {"recipe": {"forget_lr": 1e-9}, "loss_fn": lambda o, t: o.square().mean(1)},
        ),
        (
            "the forget accuracy was",
            {"model": "by heart", "recipe": {"forget_lr": 1e-9}, "eval_every": 4},
        ),
    ],
)
def test_a_run_that_does_nothing_says_so(said, settings):
    with pytest.warns(RuntimeWarning, match=said) as caught:
        run(**settings)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the caller


REACHED = {"ceiling": 1e-6, "reference_loss": 1.0}  # by every loss


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("moments", ["none", "separate"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_forget_step_at_the_ceiling_is_skipped_and_counted(optimizer, moments, max_norm):
    """What is left is the run without forgetting: no weight, moment or buffer moves."""
    recipe = {
        "optimizer": optimizer,
        "moments": moments,
        "max_norm": max_norm,
        "momentum": 0.9 if optimizer == "sgd" else 0.0,
        "forget_updates_buffers": True,
        "forget_lr": 0.5,
    }
    with pytest.warns(RuntimeWarning, match="all 4 forget steps the losses were at the ceiling"):
        found = run(model=build("bn"), mask=random_mask(build("bn")), recipe=recipe | REACHED)
    assert (found.forgotten_steps, found.skipped_steps) == (4, 4)
    # samples that cannot be read are skipped too
    with pytest.warns(RuntimeWarning, match="not finite"):
        bad = run(
            forget=[(BAD, Y)], model=build("bn"), mask=random_mask(build("bn")), recipe=recipe
        )
    assert bad.skipped_steps == 4
    assert same(bits(found.model), bits(bad.model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free = run(model=build("bn"), mask=random_mask(build("bn")), recipe=recipe)
    assert free.forgotten_steps == free.skipped_steps == 0
    assert not same(bits(found.model), bits(free.model))


@pytest.mark.parametrize("loss_fn", [None, lambda o, t: F.cross_entropy(o, t, reduction="none")])
def test_the_samples_below_the_ceiling_keep_their_weights(loss_fn):
    """One step, against the loop by hand."""
    recipe = {"cycles": 1, "lr": 0.0, "slow_lr": 1.0, "forget_decay": "constant"}
    model = build()
    losses = F.cross_entropy(model(X), Y, reduction="none")
    reference = float(losses.detach().median())
    weights = sf.with_ceiling(sf.adaptive_weights(losses), losses, 1.0, reference)
    assert 0 < (weights > 0).sum() < len(weights)
    grads = torch.autograd.grad((weights * losses).sum(), list(model.parameters()))
    mask = random_mask(build())
    chosen = [mask.to_bool(n) for n, _ in model.named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(recipe=recipe | {"ceiling": 1.0, "reference_loss": reference}, loss_fn=loss_fn)
    for p, q, g, m in zip(model.parameters(), found.model.parameters(), grads, chosen, strict=True):
        torch.testing.assert_close(q, p + 0.5 * g * m)


def test_a_run_that_reaches_the_ceiling_goes_on_from_a_checkpoint(tmp_path):
    class Stop(Exception):
        pass

    def stop(cycle, _):
        if cycle == 2:
            raise Stop

    settings = {"recipe": REACHED, "checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Stop):
        run(on_cycle=stop, **settings)
    with pytest.warns(RuntimeWarning, match="at the ceiling"):
        assert run(**settings).forgotten_steps == 4


def test_a_reference_wants_its_ceiling():
    with pytest.raises(ValueError, match=r"^ceiling: expected a number, with reference_loss"):
        Recipe.paper(reference_loss=1.0)
    with pytest.raises(ValueError, match=r"^reference_loss: expected a number"):
        Recipe.paper(ceiling=1.0, reference_loss=-1.0)


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_that_forgets_says_nothing(every):
    settings = {
        "recipe": {"forget_lr": 3000.0, "lr": 1e-4, "cycles": 8, "forget_decay": "constant"}
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run([data(8, seed=1)], model="by heart", eval_every=every, forget_floor=0, **settings)


def test_a_resumed_run_is_judged_as_a_whole(tmp_path):
    class Stop(Exception):
        pass

    def stop(cycle, _):
        if cycle == 3:
            raise Stop

    settings = {"recipe": {"forget_lr": 1e-9}, "checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Stop):
        run(on_cycle=stop, **settings)
    with pytest.warns(RuntimeWarning, match="the loss of the forget batches was"):
        run(**settings)


@pytest.mark.parametrize("estimated", [True, False])
def test_a_mask_that_selects_nothing_is_refused(estimated):
    none = sf.SaliencyMask.from_bool(
        {n: torch.zeros(p.shape) for n, p in build().named_parameters()}
    )
    model = build()
    with pytest.raises(
        ValueError, match=r"mask: expected at least one selected weight, found none of \d+"
    ):
        run(model=model, mask=None if estimated else none, recipe={"threshold": 1e30})
    assert same(bits(model), bits(build()))


def test_a_mask_that_leaves_nothing_out_is_told_of():
    recipe = {"threshold": 1e-9, "zero_over_zero": True}
    with pytest.warns(RuntimeWarning, match=r"the mask selects all 114 weights.*threshold \(1e-09"):
        run(mask=None, recipe=recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(mask=None, recipe={"threshold": None, "forget_lr": 5.0})  # nobody asked for one


def test_sets_in_the_wrong_order():
    loaders = [DataLoader(TensorDataset(*data(n)), 4) for n in (8, 16)]
    with pytest.warns(RuntimeWarning, match="16 samples in forget, 8 in retain; are they swapped"):
        sf.unlearn(
            build(),
            forget=loaders[1],
            retain=loaders[0],
            recipe=Recipe.paper(**GOOD),
            mask=random_mask(build()),
        )
    with pytest.warns(RuntimeWarning, match="16 samples in forget, 8 in retain; are they swapped"):
        # counted by the Fisher
        sf.unlearn(
            build(), retain=[data(8)], forget=[data(8), data(8)], recipe=Recipe.paper(**GOOD)
        )


def test_models_that_cannot_move_are_refused():
    broken = build()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"model: expected finite weights, found NaN or inf in 2\.weight"
    ):
        run(model=broken)
    with pytest.raises(
        ValueError, match="model: expected at least one parameter that requires grad"
    ):
        run(model=build().requires_grad_(False))
    with pytest.raises(
        ValueError, match="loss_fn: expected a loss that depends on a trainable parameter"
    ):
        run(loss_fn=lambda o, t: torch.ones(len(t)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_autograd(mode):
    """unlearn, the Fisher and the baselines record by themselves, on inputs made in there too."""
    expected, found = build(), build()
    run(
        [(X, Y)],
        model=sf.methods.finetune(expected, [(X, Y)], epochs=1),
        mask=None,
        recipe={"forget_lr": 5.0},
    )
    with mode():
        inside = [(X.clone(), Y.clone())]
        sf.methods.finetune(found, inside, epochs=1)
        run(inside, inside, model=found, mask=None, recipe={"forget_lr": 5.0})
        sf.methods.gradient_saliency(found, inside)
    assert same(bits(found), bits(expected))


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        model = build()
    with pytest.raises(
        ValueError, match=r"model: expected parameters that autograd can record for"
    ):
        run(model=model)


def test_submodules_keep_the_mode_they_were_given():
    """A model in training mode keeps a BatchNorm put to eval(); one in eval mode is trained as a
    whole.
    """
    for frozen in (True, False):
        for baseline in (True, False):
            model = build("bn")
            if frozen:
                model[1].eval()
            else:
                model.eval()
            before, modes = model[1].running_mean.clone(), [m.training for m in model]
            if baseline:
                sf.methods.finetune(model, [(X, Y)], epochs=1)
            else:
                run(
                    model=model,
                    mask=None,
                    recipe={"forget_lr": 50.0},
                    on_cycle=lambda _, m: m.train(),
                )
            assert torch.equal(model[1].running_mean, before) == frozen
            assert [m.training for m in model] == modes


# --- buffers that the forward pass makes ----------------------------------------------------------


class Cached(nn.Module):
    """A buffer that is enlarged, one that is made, one that is made and saved, and one that counts,
    unsaved.
    """

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(X.shape[1], 4)
        self.register_buffer("scale", torch.ones(2, 1))
        self.register_buffer("late", None, persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x):
        if len(self.scale) < len(x):
            self.scale = torch.ones(len(x), 1)
        if self.late is None:
            self.late = torch.ones(1)
        if not hasattr(self, "made"):
            self.register_buffer("made", torch.ones(1))
        self.count += self.training
        return self.layer(x) * self.scale[: len(x)] * self.late * self.made


def test_buffers_made_or_enlarged_in_forward(tmp_path):
    """A run, whole or resumed; a skipped step leaves none of them behind."""
    batches = [(X, Y), (X[:5], Y[:5])]
    ends = []
    for stops in (False, True):
        torch.manual_seed(0)
        model, everything = Cached(), None
        start = {n: t.clone() for n, t in model.state_dict().items()}
        everything = sf.SaliencyMask.from_bool(
            {n: torch.ones(p.shape) for n, p in model.named_parameters()}
        )
        settings = {
            "recipe": {"forget_lr": 5.0},
            "mask": everything,
            "checkpoint": tmp_path / str(stops),
        }
        if stops:
            with pytest.raises(ZeroDivisionError):
                run(
                    batches,
                    batches,
                    model,
                    **settings,
                    checkpoint_every=1,
                    on_cycle=lambda c, m: c == 2 and 1 / 0,
                )
            model = Cached()
            model.load_state_dict(start)
        run(batches, batches, model, **settings)
        ends.append({**bits(model), "count": model.count.clone()})
    assert same(*ends)
    assert ends[0]["count"] == 4  # retain steps: paper's forget batches do not enter buffers
    assert ends[0]["scale"].shape == (8, 1)
    model = Cached()
    with pytest.warns(RuntimeWarning, match="nothing was retained"):
        run([(BAD, Y)], [(X[:2], Y[:2])], model, mask=everything)
    assert (model.scale.shape, model.late, hasattr(model, "made")) == ((2, 1), None, False)


@pytest.mark.parametrize(
    ("remedy", "budget", "spent", "reached"),
    [
        ("raise max_norm (7), forget_lr or forget_weight", None, None, 0),
        ("raise retain_budget (0.05), or take more cycles (300)", 0.05, 1.1, 1),
        ("take more cycles (300), or raise forget_lr: 20% of retain_budget", 0.05, 0.2, 1),
        ("raise the recipe's ceiling", 0.05, 0.2, 3),
    ],
)
def test_the_remedy_is_for_what_ended_the_forgetting(remedy, budget, spent, reached):
    model = by_heart()
    asked = SimpleNamespace(model=model, recipe=Recipe.official(), task=sf.Classification())
    outcome = Outcome(asked)
    outcome.before = outcome.before + 1  # the weights have moved
    outcome.losses = [torch.tensor(0.5)] * 4
    outcome.reached = [torch.tensor(i < reached) for i in range(4)]
    result = sf.UnlearnResult(model, None, budget_spent=spent)
    result.before, result.after = {"forget_loss": 0.1}, {"forget_loss": 0.5, "retain_loss": 0.1}
    with pytest.warns(RuntimeWarning) as said:
        outcome.judge(result, None, budget, "90.0 % of it are right")
    found = str(said[0].message)
    assert "in part: 90.0 % of it are right; to forget more, " in found
    assert remedy in found
