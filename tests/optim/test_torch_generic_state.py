"""torch's generic optimizer tests over its inputs: state dicts, their hooks, copies."""

import copy
import io

import pytest
import torch
from models import equal
from optimizer_infos import EACH, EACH_INPUT, inputs, line
from torch import nn
from torch.nn import Parameter

pytestmark = pytest.mark.checklist("A13")
NAMED = pytest.mark.parametrize("named", [False, True])


def made(kind, params, named, kwargs):
    return kind(
        [(f"name{i}", p) for i, p in enumerate(params)] if named else params,
        **copy.deepcopy(kwargs),
    )


def steps(optimizer, params, count, seed=0):
    torch.manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        line(*params, torch.randn(3)).backward()
        optimizer.step()


def pair():
    return Parameter(torch.randn(2, 3)), Parameter(torch.randn(2))


def nameless(state):
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]]
    return {**state, "param_groups": groups}


@NAMED
@pytest.mark.parametrize("named_too", [False, True])
@EACH_INPUT
def test_state_dict_is_deterministic(info, i, named, named_too):
    kwargs, params = inputs(info)[i], pair()
    optimizer = made(info.optim_cls, params, named, kwargs)
    steps(optimizer, params, 10)
    twins = [Parameter(p.detach().clone()) for p in params]
    other = made(info.optim_cls, twins, named_too, kwargs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((optimizer, params), (other, twins)):
        steps(each, its, 10, seed=1)
    assert all(map(torch.equal, params, twins))
    assert equal(nameless(optimizer.state_dict()), nameless(other.state_dict()))
    names = [g.get("param_names") for g in other.param_groups]
    assert names == [["name0", "name1"] if named or named_too else None]
    # the same parameter is the same index wherever it is
    other.param_groups.extend(other.param_groups)
    last = [nameless(o.state_dict())["param_groups"][-1] for o in (optimizer, other)]
    assert equal(*last)


@EACH_INPUT
def test_older_state_dict_loads(info, i):
    """From before a flag existed, and from when a step was no tensor."""
    kwargs, params = inputs(info)[i], pair()
    optimizer = info.optim_cls(params, **kwargs)
    steps(optimizer, params, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in info.not_og_supported_flags:
            group.pop(flag, None)
    for state in old["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(old)
    assert equal(optimizer.state_dict(), before)
    steps(optimizer, params, 1)


@NAMED
@EACH_INPUT
def test_file_holds_the_same(info, i, named):
    params = pair()
    optimizer = made(info.optim_cls, params, named, inputs(info)[i])
    steps(optimizer, params, 3)
    for weights_only in (False, True):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        assert equal(torch.load(file, weights_only=weights_only), optimizer.state_dict())


@pytest.mark.parametrize("flag", ["fused", "capturable"])
@EACH_INPUT
def test_state_loads_into_another_implementation(info, i, flag):
    params = pair()
    optimizer = info.optim_cls(params, **inputs(info)[i])
    steps(optimizer, params, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0] |= {flag: True, "foreach": None}
    twins = [Parameter(p.detach().clone()) for p in params]
    other = info.optim_cls(twins, **{**inputs(info)[i], flag: True, "foreach": None})
    other.load_state_dict(state)
    for each, its in ((optimizer, params), (other, twins)):
        steps(each, its, 2, seed=1)
    assert all(map(torch.equal, params, twins))


@EACH_INPUT
def test_state_dict_is_not_changed_by_loading_or_stepping(info, i):
    params = pair()
    optimizer = info.optim_cls(params, **inputs(info)[i])
    steps(optimizer, params, 2)
    given = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(given)
    optimizer.load_state_dict(given)
    steps(optimizer, params, 3)
    assert equal(given, kept)


@EACH_INPUT
def test_state_dict_hooks(info, i):
    optimizer = info.optim_cls([torch.rand(2, 3)], **inputs(info)[i])

    def mark(optimizer):
        optimizer.state["test"] = 1

    def note(optimizer, state):
        return {**state, "saw": state["state"].pop("test", None)}

    after = optimizer.register_state_dict_post_hook(note)
    assert optimizer.state_dict()["saw"] is None
    before = optimizer.register_state_dict_pre_hook(mark)
    assert optimizer.state_dict()["saw"] == 1
    after.remove()
    assert optimizer.state_dict()["state"]["test"] == 1
    before.remove()
    steps_on = optimizer.param_groups[0]["params"][0]
    steps_on.grad = torch.ones_like(steps_on)
    optimizer.step()  # with a stranger in the state


@EACH_INPUT
def test_load_state_dict_hooks(info, i):
    optimizer, seen = info.optim_cls([torch.rand(2, 3)], **inputs(info)[i]), []
    state = optimizer.state_dict()

    def in_place(optimizer, state):
        state["param_groups"][0]["lr"] = 0.002

    def anew(optimizer, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        return state

    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(copy.deepcopy(state))
    first = optimizer.register_load_state_dict_pre_hook(anew, prepend=True)
    optimizer.load_state_dict(copy.deepcopy(state))
    first.remove()
    optimizer.register_load_state_dict_pre_hook(anew)
    optimizer.load_state_dict(copy.deepcopy(state))
    assert seen == [0.002, 0.002, 0.003]


@EACH_INPUT
def test_deepcopy_has_all_public_attributes(info, i):
    params = pair()
    optimizer = info.optim_cls(params, **inputs(info)[i])
    steps(optimizer, params, 3)
    public = [
        {k for k in vars(o) if not k.startswith("_")} for o in (optimizer, copy.deepcopy(optimizer))
    ]
    assert public[0] == public[1]


@NAMED
@pytest.mark.parametrize("named_too", [False, True])
@EACH
def test_state_goes_between_named_and_unnamed_models(info, named, named_too):
    def build(named):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
        return model, info.optim_cls(model.named_parameters() if named else model.parameters())

    x = torch.rand(1, 4, 16, 16)
    (model, optimizer), (other_model, other) = build(named), build(named_too)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for each, opt in ((model, optimizer), (other_model, other)):
        opt.zero_grad()
        each(x).square().sum().backward()
        opt.step()
    assert all(map(torch.equal, model.parameters(), other_model.parameters()))
    expected = ["0.weight", "0.bias", "1.weight", "1.bias"] if named or named_too else None
    assert other.state_dict()["param_groups"][0].get("param_names") == expected
