"""Checklist A: what code for torch.optim expects beyond the stock step."""

import copy
import inspect
import pickle

import pytest
import torch
from models import SHAPES, build, gradients, masks, parameters, run, same, values
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD
from sfron_fast.optim import base as cycle

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


@pytest.mark.checklist("A2")
@BOTH
def test_overridden_methods_have_torchs_parameters(kind):
    overridden = [
        n
        for n, v in vars(Optimizer).items()
        if callable(v) and getattr(kind, n) is not v and n != "__init__"
    ]
    assert {
        "step",
        "add_param_group",
        "state_dict",
        "load_state_dict",
        "__getstate__",
        "__setstate__",
    } <= {*overridden}
    for name in overridden:
        ours, base = (
            inspect.signature(getattr(c, name)).parameters.values() for c in (kind, Optimizer)
        )
        assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in base], name


@pytest.mark.checklist("A4")
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"momentum": 0.5},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.5},
        {"weight_decay": 0.125},
        {"momentum": 0.5, "weight_decay": 0.125, "maximize": True},
    ],
)
def test_stock_sgd_to_the_bit_where_contraction_changes_nothing(flags, foreach):
    """torch may contract a * b + c, we never do; with powers of two as factors the product is exact
    either way.
    """
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    a = SFRonSGD(ours.items(), lr=0.0625, **flags)
    b = torch.optim.SGD(theirs.values(), lr=0.0625, foreach=foreach, **flags)
    for step in gradients(50, torch.float32):
        for name in SHAPES:
            ours[name].grad, theirs[name].grad = step[name].clone(), step[name].clone()
        a.step()
        b.step()
    assert same(values(ours), values(theirs))


@pytest.mark.checklist("A5")
@BOTH
@pytest.mark.parametrize("method", ["step", "forget_step"])
def test_every_hook_fires_once_per_public_step(kind, method):
    params, seen = parameters(torch.float32), []
    optimizer = kind(params.items(), slow_lr=0.5, max_norm=1.0, clip_retain=True)
    handles = [
        register_optimizer_step_pre_hook(lambda *a: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *a: seen.append("global post")),
    ]
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    try:
        for step in gradients(2, torch.float32):
            for name, param in params.items():
                param.grad = step[name]
            seen.clear()
            getattr(optimizer, method)()
            assert seen == ["global pre", "pre", "post", "global post"]
            optimizer.param_groups[0]["retain_pending"] = 0
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.checklist("A6")
@BOTH
def test_a_group_added_later_gets_the_defaults(kind):
    params = parameters(torch.float32)
    optimizer = kind(
        [("a", params["a"])],
        lr=0.25,
        weight_decay=0.5,
        slow_lr=0.5,
        moments="separate",
        fused=False,
    )
    optimizer.add_param_group({"params": [("b", params["b"])], "lr": 0.125})
    first, second = (
        {k: v for k, v in g.items() if not k.startswith("param")} for g in optimizer.param_groups
    )
    assert second == {**first, "lr": 0.125}


@pytest.mark.checklist("A7")
@BOTH
def test_parameters_without_gradient_are_skipped(kind):
    params = parameters(torch.float32)
    params["e"].requires_grad_(False)
    extra = {"momentum": 0.9} if kind is SFRonSGD else {}
    optimizer = kind(
        params.items(), lr=0.1, weight_decay=0.1, saliency=SaliencyMask.from_bool(masks()), **extra
    )
    before = values(params)
    run(
        optimizer,
        params,
        gradients(6, torch.float32, without=[(i, n) for i in range(6) for n in "be"]),
        1,
    )
    for name in "be":
        assert params[name] not in optimizer.state
        assert torch.equal(params[name], before[name])
    assert not torch.equal(params["a"], before["a"])


@pytest.mark.checklist("A8")
@BOTH
def test_a_pickle_from_before_a_setting_existed(kind):
    params = parameters(torch.float32)
    optimizer = kind(params.items(), lr=0.25)
    run(optimizer, params, gradients(2, torch.float32), 1)
    new = ("foreach", "fused", "capturable", "differentiable", "moments", "slow_lr", "maximize")
    state = copy.deepcopy(optimizer.__getstate__())
    for settings in (state["defaults"], *state["param_groups"]):
        for name in new:
            del settings[name]
    old = kind.__new__(kind)
    old.__setstate__(pickle.loads(pickle.dumps(state)))
    assert old.defaults == optimizer.defaults
    assert {k: v for k, v in old.param_groups[0].items() if k != "params"} == {
        k: v for k, v in optimizer.param_groups[0].items() if k != "params"
    }
    theirs = dict(zip(params, old.param_groups[0]["params"], strict=True))
    for each, weights in ((optimizer, params), (old, theirs)):
        run(each, weights, gradients(4, torch.float32, seed=3), 1)
    assert same(values(params), values(theirs))


@pytest.mark.checklist("A9")
@BOTH
def test_implementation_flags_are_carried_and_change_no_bit(kind):
    expected = parameters(torch.float32)
    run(kind(expected.items(), lr=0.1), expected, gradients(4, torch.float32), 1)
    flags = [{name: value} for name in ("foreach", "fused") for value in (None, False, True)]
    for given in (
        *flags,
        {"capturable": True},
        {"foreach": True, "capturable": True},
        {"differentiable": False},
    ):
        params = parameters(torch.float32)
        optimizer = kind(params.items(), lr=0.1, **given)
        assert given.items() <= optimizer.param_groups[0].items()
        assert hasattr(optimizer, "_step_supports_amp_scaling") == (given.get("fused") is True)
        run(optimizer, params, gradients(4, torch.float32), 1)
        assert same(values(params), values(expected)), given


@pytest.mark.checklist("A9")
@BOTH
def test_flags_that_exclude_each_other_raise_torchs_type(kind):
    stock = torch.optim.SGD if kind is SFRonSGD else torch.optim.AdamW
    params = parameters(torch.float32)
    for flags in ({"foreach": True, "fused": True}, {"differentiable": True, "fused": True}):
        errors = []
        for each in (stock, kind):
            with pytest.raises(RuntimeError) as caught:
                each(params.values(), **flags)
            errors.append(caught.type)
        assert errors[0] is errors[1]
    optimizer = kind(params.items())
    with pytest.raises(RuntimeError, match="differentiable: expected False"):
        optimizer.add_param_group(
            {"params": [("x", nn.Parameter(torch.ones(2)))], "differentiable": True}
        )
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="foreach: expected None or True or False, found 'yes'"):
        kind(params.values(), foreach="yes")


@pytest.mark.checklist("A9")
@BOTH
@pytest.mark.parametrize("method", ["step", "forget_step"])
def test_a_graph_is_captured_only_where_it_was_announced(kind, method, monkeypatch):
    monkeypatch.setattr("sfron_fast.optim.scalars.capturing", lambda device: True)
    params = parameters(torch.float32)
    for capturable in (False, True):
        optimizer = kind(params.items(), capturable=capturable)
        before = values(params)
        for name, param in params.items():
            param.grad = gradients(1, torch.float32)[0][name]
        if capturable:
            getattr(optimizer, method)()
            assert not same(values(params), before)
        else:
            with pytest.raises(
                RuntimeError, match="capturable: expected True in every group while a graph"
            ):
                getattr(optimizer, method)()
            assert same(values(params), before)
            assert not optimizer.mid_cycle


@pytest.mark.checklist("A9")
@BOTH
@pytest.mark.parametrize("moments", ["shared", "separate", "none"])
def test_settings_as_tensors_are_the_numbers_and_are_not_read(kind, moments, monkeypatch):
    """Every cycle other values; a parameter without gradient in the last retain step too."""
    numbers, tensors = parameters(torch.float32), parameters(torch.float32)
    names = ("lr", "forget_lr", "weight_decay", "slow_lr")
    start = {n: torch.tensor(0.5, dtype=torch.float64) for n in names}
    a = kind(numbers.items(), **dict.fromkeys(names, 0.5), moments=moments, retain_steps=2)
    b = kind(tensors.items(), **start, moments=moments, retain_steps=2, capturable=True)
    read = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: read.append(t) or t.item())
    monkeypatch.setattr(cycle, "is_zero", lambda value: False)  # which may read a tensor on the CPU
    for i in range(4):
        for n, value in zip(
            names, (0.1 / (i + 1), 0.3 - 0.05 * i, 0.01 * i, 1.0 - 0.2 * i), strict=True
        ):
            a.param_groups[0][n] = value
            b.param_groups[0][n].fill_(value)
        for each, params in ((a, numbers), (b, tensors)):
            run(each, params, gradients(3, torch.float32, seed=i, without=[(2, "b")]), 2)
        assert same(values(numbers), values(tensors)), i
    assert not read
    assert not same(values(numbers), values(parameters(torch.float32)))


@pytest.mark.checklist("A10")
@BOTH
def test_made_from_parameters_groups_or_names(kind):
    results = []
    for form in ("parameters", "groups", "named", "named groups"):
        model = build()
        named = list(model.named_parameters())
        params = {
            "parameters": model.parameters(),
            "named": model.named_parameters(),
            "groups": [{"params": [p]} for _, p in named],
            "named groups": [{"params": named[:1]}, {"params": dict(named[1:]).items()}],
        }[form]
        optimizer = kind(params, lr=0.1)
        names = [n for g in optimizer.param_groups for n in g.get("param_names", ())]
        assert names == ([n for n, _ in named] if "named" in form else [])
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        results.append({n: p.detach() for n, p in named})
    assert all(same(results[0], r) for r in results[1:])


@pytest.mark.checklist("A11")
@BOTH
def test_a_mask_of_another_shape_names_the_parameter(kind):
    model = build()
    wrong = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    wrong["2.weight"] = wrong["2.weight"].t()
    with pytest.raises(
        ValueError, match=r"saliency\['2.weight'\]: expected shape \(4, 10\), found \(10, 4\)"
    ):
        kind(model.named_parameters(), saliency=SaliencyMask.from_bool(wrong))
    for name in ("lr", "forget_lr", "weight_decay", "slow_lr"):
        with pytest.raises(
            ValueError, match=f"{name}: expected a number or a tensor of one element"
        ):
            kind(model.named_parameters(), **{name: torch.tensor([0.1, 0.2])})
        with pytest.raises(ValueError, match=f"{name}: expected a number"):
            kind(model.named_parameters(), **{name: "0.1"})


@pytest.mark.checklist("A12")
@BOTH
def test_tied_parameters_are_updated_once(kind):
    def stepped(tie):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.arange(16.0).view(4, 4) / 16)
        if tie:
            model[2].weight = model[0].weight
        mask = SaliencyMask.from_bool({n: torch.eye(4) for n, _ in model.named_parameters()})
        optimizer = kind(model.named_parameters(), lr=0.1, slow_lr=0.5, saliency=mask)
        assert sum(len(g["params"]) for g in optimizer.param_groups) == (1 if tie else 2)
        for method in (optimizer.forget_step, optimizer.step):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            if not tie:  # what the one weight gets from both places
                total = model[0].weight.grad + model[2].weight.grad
                model[0].weight.grad = model[2].weight.grad = total
            method()
        return model[0].weight.detach()

    assert torch.equal(stepped(tie=True), stepped(tie=False))
