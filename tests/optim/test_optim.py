"""Cycles, masks and phases of SFRonSGD and SFRonAdamW against loops over single parameters."""

import copy
import warnings

import pytest
import torch
from models import SHAPES, bits, build, gradients, masks, parameters, random_mask, run, same
from torch import nn

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


class Literal:
    """One parameter at a time, as the papers write it. ``knobs`` may differ by name."""

    def __init__(self, params, adam, selected, inner, **knobs):
        self.params, self.adam, self.selected, self.inner = params, adam, selected, inner
        self.knobs = {
            "lr": 0.1,
            "forget_lr": None,
            "momentum": 0.0,
            "wd": 0.0,
            "alpha": 1.0,
            "moments": "shared",
            "freeze": False,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            **knobs,
        }
        self.state, self.slow = {}, {}

    def run(self, grads):
        for i, step in enumerate(grads):
            forget = i % (self.inner + 1) == 0
            if forget:
                self.slow = {n: p.clone() for n, p in self.params.items()}
            for name, grad in step.items():
                if grad is not None:
                    self.update(name, grad, forget)
            if i % (self.inner + 1) == self.inner:
                for name, p in self.params.items():
                    p.copy_(self.slow[name] + self.value("alpha", name) * (p - self.slow[name]))

    def value(self, key, name):
        value = self.knobs[key]
        return value[name] if isinstance(value, dict) else value

    def update(self, name, grad, forget):
        p, free = (
            self.params[name],
            (self.selected[name] if forget else torch.ones(SHAPES[name], dtype=torch.bool)),
        )
        lr, moments = self.value("lr", name), self.knobs["moments"]
        if forget and self.knobs["forget_lr"] is not None:
            lr = self.value("forget_lr", name)
        grad = torch.where(free, grad, 0)
        if forget and moments == "none":
            p -= lr * grad
            return
        movable = free if self.knobs["freeze"] else torch.ones_like(free)
        key = (name, forget and moments == "separate")
        new, state = (self.adamw if self.adam else self.sgd)(p, grad, lr, self.state.get(key), name)
        old = self.state.get(key) or {k: torch.zeros_like(v) for k, v in state.items()}
        self.state[key] = {
            k: v if k == "step" else torch.where(movable, v, old[k]) for k, v in state.items()
        }
        p.copy_(torch.where(movable, new, p))

    def sgd(self, p, grad, lr, state, name):
        grad = grad + self.knobs["wd"] * p
        buffer = grad if state is None else self.knobs["momentum"] * state["m"] + grad
        return p - lr * buffer, {"m": buffer}

    def adamw(self, p, grad, lr, state, name):
        b1, b2 = self.knobs["betas"]
        zero = {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "step": torch.zeros(())}
        m, v, t = (state or zero)["m"], (state or zero)["v"], (state or zero)["step"] + 1
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        denominator = (v / (1 - b2 ** t.item())).sqrt() + self.knobs["eps"]
        return p * (1 - lr * self.knobs["wd"]) - lr * m / (1 - b1 ** t.item()) / denominator, {
            "m": m,
            "v": v,
            "step": t,
        }


def run_freezing(optimizer, params, grads, inner):
    """As ``run``; what has no gradient in a step is frozen in it."""
    for i, step in enumerate(grads):
        for name, param in params.items():
            param.requires_grad_(step[name] is not None)
            param.grad = step[name]
        (optimizer.step if i % (inner + 1) else optimizer.forget_step)()


def check(kind, grads, inner, groups=None, run=run, **knobs):
    """The optimizer and the literal loop end in the same fp64 weights."""
    params, selected = parameters(), masks()
    expected = Literal(
        {n: p.detach().clone() for n, p in params.items()},
        kind is SFRonAdamW,
        selected,
        inner,
        **knobs,
    )
    expected.run(grads)
    own = {"lr": 0.1, "forget_lr": knobs.get("forget_lr"), "slow_lr": knobs.get("alpha", 1.0)}
    if groups is not None:
        own = {"lr": 0.1}
    own |= {"weight_decay": knobs.get("wd", 0.0), "moments": knobs.get("moments", "shared")}
    own |= {
        "mask_semantics": "update" if knobs.get("freeze") else "gradient",
        "retain_steps": inner,
    }
    own |= {"momentum": knobs.get("momentum", 0.0)} if kind is SFRonSGD else {}
    named = (
        list(params.items())
        if groups is None
        else [{**g, "params": [(n, params[n]) for n in g["params"]]} for g in groups]
    )
    optimizer = kind(named, saliency=SaliencyMask.from_bool(selected), **own)
    run(optimizer, params, grads, inner)
    start = parameters()
    for name, param in params.items():
        torch.testing.assert_close(param.detach(), expected.params[name], rtol=1e-12, atol=1e-13)
        assert param.numel() == 0 or not torch.equal(param, start[name])
    return optimizer, params


@pytest.mark.checklist("B3", "B6")
@BOTH
@pytest.mark.parametrize("freeze", [False, True], ids=["gradient", "update"])
@pytest.mark.parametrize("moments", ["shared", "separate", "none"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.2])
def test_cycles_equal_the_literal_loop(kind, moments, freeze, alpha):
    extra = {"momentum": 0.9} if kind is SFRonSGD else {}
    check(
        kind,
        gradients(12),
        3,
        moments=moments,
        freeze=freeze,
        alpha=alpha,
        forget_lr=0.3,
        wd=0.05,
        **extra,
    )


@pytest.mark.checklist("B3")
def test_separate_momentum_is_two_buffers():
    """Written out: each phase has a buffer that starts as its own first gradient."""
    params = parameters()
    optimizer = SFRonSGD(params.items(), lr=0.1, momentum=0.9, retain_steps=2, moments="separate")
    grads = gradients(9)
    weights = {n: p.detach().clone() for n, p in params.items()}
    run(optimizer, params, grads, 2)
    for name, w in weights.items():
        forget = retain = None
        for i, step in enumerate(grads):
            g = step[name]
            if i % 3 == 0:
                forget = g if forget is None else 0.9 * forget + g
                w -= 0.1 * forget
            else:
                retain = g if retain is None else 0.9 * retain + g
                w -= 0.1 * retain
        torch.testing.assert_close(params[name].detach(), w, rtol=1e-13, atol=1e-14)
        state = optimizer.state[params[name]]
        torch.testing.assert_close(state["momentum_buffer"], retain)
        torch.testing.assert_close(state["forget_momentum_buffer"], forget)


@BOTH
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize(
    "without",
    [
        [(0, "a")],
        [(2, "a")],
        [(1, "a"), (2, "a")],
        [(0, "a"), (2, "a")],
        [(3, "b"), (5, "b"), (4, "a")],
        [(i, "a") for i in (0, 3, 6)],
        [(i, "b") for i in (0, 2, 3, 5, 6)],
        [(i, "b") for i in (3, 4, 5, 6, 8)],
    ],
    ids=[
        "forget",
        "last",
        "retain",
        "forget+last",
        "second",
        "every forget",
        "one retain",
        "a cycle",
    ],
)
@pytest.mark.parametrize("how", [run, run_freezing], ids=["no gradient", "frozen"])
def test_missing_gradients_are_interpolated_as_in_the_literal_loop(kind, without, alpha, how):
    """A layer may be frozen in forget steps and trained in retain steps: its slow weights are of
    its own cycle.
    """
    check(kind, gradients(9, without=without), 2, run=how, alpha=alpha, wd=0.02)


@BOTH
def test_groups_with_their_own_rates(kind):
    groups = [
        {"params": ["a", "c"], "lr": 0.05, "slow_lr": 0.5},
        {"params": ["b", "d"], "lr": 0.2, "forget_lr": 0.4},
        {"params": ["e"], "slow_lr": 0.25},
    ]
    check(
        kind,
        gradients(9),
        2,
        groups,
        lr={"a": 0.05, "c": 0.05, "b": 0.2, "d": 0.2, "e": 0.1},
        alpha={"a": 0.5, "c": 0.5, "b": 1.0, "d": 1.0, "e": 0.25},
        forget_lr={"a": 0.05, "c": 0.05, "b": 0.4, "d": 0.4, "e": 0.1},
    )


@pytest.mark.checklist("B2")
@BOTH
@pytest.mark.parametrize("moments", ["shared", "separate", "none"])
def test_update_semantics_keep_masked_bits(kind, moments):
    params, selected = parameters(torch.float32), masks()
    extra = {"momentum": 0.9} if kind is SFRonSGD else {"amsgrad": True}
    optimizer = kind(
        params.items(),
        lr=0.1,
        weight_decay=0.1,
        saliency=SaliencyMask.from_bool(selected),
        max_norm=1.0,
        mask_semantics="update",
        moments=moments,
        **extra,
    )
    run(optimizer, params, gradients(4, torch.float32), 1)  # so that there is state to keep
    for step in gradients(5, torch.float32, seed=9):
        before = {n: p.detach().clone() for n, p in params.items()}
        state = {
            n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in params.items()
        }
        for name, param in params.items():
            param.grad = step[name]
        optimizer.forget_step()
        for name, param in params.items():
            frozen = ~selected[name]
            assert torch.equal(param[frozen], before[name][frozen])
            assert param[selected[name]].numel() == 0 or not torch.equal(
                param[selected[name]], before[name][selected[name]]
            )
            for key, value in state[name].items():
                if "step" not in key:
                    assert torch.equal(optimizer.state[param][key][frozen], value[frozen]), key
        optimizer.param_groups[0]["retain_pending"] = 0  # forget steps only


@BOTH
def test_gradient_semantics_let_decay_and_momentum_move_masked_weights(kind):
    params = parameters()
    nothing = SaliencyMask.from_bool({n: torch.zeros(s) for n, s in SHAPES.items()})
    for extra in ({"weight_decay": 0.1}, {"weight_decay": 0.0, "moments": "shared"}):
        if kind is SFRonSGD:
            extra["momentum"] = 0.9
        optimizer = kind(params.items(), lr=0.1, saliency=nothing, **extra)
        run(optimizer, params, gradients(2), 1)
        before = params["a"].detach().clone()
        run(optimizer, params, gradients(1), 1)
        assert not torch.equal(params["a"], before)


@pytest.mark.checklist("E6")
def test_masks_are_found_behind_wrappers():
    model = build("bn")
    mask = random_mask(model)
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(model),
        torch.compile(nn.DataParallel(model)),
    ):
        names = [n for n, _ in wrapped.named_parameters()]
        assert any(n.startswith(("module.", "_orig_mod.")) for n in names)
        optimizer = SFRonSGD(wrapped.named_parameters(), lr=1.0, saliency=mask)
        before = bits(model)
        for p in wrapped.parameters():
            p.grad = torch.ones_like(p)
        optimizer.forget_step()
        for name, p in model.named_parameters():
            assert torch.equal(p != before[name], mask.to_bool(name)), name


@pytest.mark.checklist("A6", "A10")
def test_mask_wants_names():
    model = build()
    with pytest.raises(ValueError, match="params: expected named parameters"):
        SFRonSGD(model.parameters(), saliency=random_mask(model))
    SFRonSGD([{"params": model.parameters(), "masked": False}], saliency=random_mask(model))
    with pytest.raises(ValueError, match="masked"):
        SFRonSGD([{"params": list(model.named_parameters()), "masked": True}])


@pytest.mark.checklist("A6")
def test_add_param_group_with_and_without_mask():
    params, selected = parameters(torch.float32), masks()
    del selected["e"]
    mask = SaliencyMask.from_bool(selected)
    optimizer = SFRonSGD([(n, params[n]) for n in "abc"], lr=1.0, saliency=mask, retain_steps=2)
    with pytest.raises(ValueError, match=r"found none for 1 \(e\)"):
        optimizer.add_param_group({"params": [("e", params["e"])]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("e", params["e"])], "masked": False, "lr": 0.5})
    optimizer.add_param_group({"params": [("d", params["d"])]})
    assert [g["masked"] for g in optimizer.param_groups] == [True, False, True]
    assert [g["retain_steps"] for g in optimizer.param_groups] == [2, 2, 2]
    before = {n: p.detach().clone() for n, p in params.items()}
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.forget_step()
    assert torch.equal(params["a"] != before["a"], selected["a"])
    assert torch.equal(params["e"], before["e"] - 0.5)


@BOTH
def test_forget_step_inside_a_cycle_is_an_error_and_changes_nothing(kind):
    params = parameters()
    optimizer = kind(params.items(), retain_steps=3)
    grads = gradients(2)
    run(optimizer, params, grads, 3)
    before, state = (
        {n: p.detach().clone() for n, p in params.items()},
        copy.deepcopy(optimizer.state_dict()),
    )
    called = []
    with pytest.raises(
        RuntimeError, match=r"forget_step: expected a finished cycle, found 2 retain step"
    ):
        optimizer.forget_step(lambda: called.append(1))
    assert not called
    assert same(before, {n: p.detach() for n, p in params.items()})
    assert str(state) == str(optimizer.state_dict())
    assert optimizer.mid_cycle
    optimizer.step()
    optimizer.step()
    assert not optimizer.mid_cycle
    optimizer.forget_step()


@pytest.mark.checklist("A6")
@pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
def test_a_group_that_joins_inside_a_cycle_starts_its_slow_weights_there(kind):
    """Two retain steps later it has gone half of its way."""
    first, second = (torch.nn.Parameter(torch.zeros(5)) for _ in range(2))
    optimizer = kind([first], lr=1.0, weight_decay=0.0, retain_steps=2, slow_lr=0.5)
    first.grad = torch.ones(5)
    optimizer.forget_step()
    optimizer.add_param_group({"params": [second]})
    way = torch.nn.Parameter(torch.zeros(5))
    plain = kind([way], lr=1.0, weight_decay=0.0)
    for _ in range(2):
        second.grad, way.grad = torch.ones(5), torch.ones(5)
        optimizer.step()
        plain.step()
    assert torch.equal(second, way / 2)


@BOTH
def test_a_step_of_a_cycle_without_gradients_says_so(kind):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = kind(params, lr=0.1, retain_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()  # outside a cycle it is torch's step, as silent as that
    with pytest.warns(RuntimeWarning, match="forget_step found no gradients") as caught:
        opt.forget_step()
    assert caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="step found no gradients"):
        opt.step()
    params[0].grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()  # one gradient is enough: parts of a model may be frozen
        opt.forget_step()
