"""State dicts, pickles and copies of the optimizers."""

import copy
import io
import pickle

import pytest
import torch
from models import SHAPES, gradients, masks, near, parameters, run, same
from torch import nn

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


@pytest.mark.checklist("B6")
@pytest.mark.checklist("A7", "C6")
@BOTH
def test_state_is_lazy_and_slow_weights_cost_nothing_at_one(kind):
    params = parameters(torch.float32)
    extra = {"momentum": 0.9} if kind is SFRonSGD else {}
    optimizer = kind(params.items(), saliency=SaliencyMask.from_bool(masks()), **extra)
    assert not optimizer.state
    run(optimizer, params, gradients(2, torch.float32, without=[(0, "b"), (1, "b")]), 1)
    keys = {"momentum_buffer"} if kind is SFRonSGD else {"exp_avg", "exp_avg_sq", "step"}
    assert params["b"] not in optimizer.state
    assert all(set(optimizer.state[params[n]]) == keys for n in "acde")
    assert SFRonSGD(parameters().items(), slow_lr=0.5).state == {}


@pytest.mark.checklist("B6")
def test_slow_copy_is_one_tensor_per_parameter():
    params = parameters(torch.float32)
    optimizer = SFRonSGD(params.items(), slow_lr=0.5, retain_steps=2)
    run(optimizer, params, gradients(3, torch.float32), 2)
    assert {k for s in optimizer.state.values() for k in s} == {"slow"}
    assert all(
        torch.equal(optimizer.state[p]["slow"], parameters(torch.float32)[n])
        for n, p in params.items()
    )


@pytest.mark.checklist("C8")
@pytest.mark.parametrize(
    ("kind", "stock", "flags"),
    [
        (SFRonSGD, torch.optim.SGD, {"momentum": 0.9}),
        (SFRonSGD, torch.optim.SGD, {}),
        (SFRonAdamW, torch.optim.AdamW, {"amsgrad": True}),
    ],
)
def test_stock_state_dict_loads_and_goes_on(kind, stock, flags):
    theirs = parameters(torch.float32)
    b = stock([(n, p) for n, p in theirs.items()], lr=0.01, weight_decay=0.1, **flags)
    grads = gradients(10, torch.float32)
    for i, step in enumerate(grads):
        if i == 5:
            ours = {n: nn.Parameter(p.detach().clone()) for n, p in theirs.items()}
            a = kind(ours.items(), lr=7.0, retain_steps=4, slow_lr=0.5, max_norm=3.0)
            a.load_state_dict(b.state_dict())
        for name in SHAPES:
            theirs[name].grad = step[name].clone()
            if i >= 5:
                ours[name].grad = step[name].clone()
        b.step()
        if i >= 5:
            a.step()
    near(ours, theirs, 5)
    group = a.param_groups[0]
    assert (group["lr"], group["retain_steps"], group["slow_lr"], group["max_norm"]) == (
        0.01,
        4,
        0.5,
        3.0,
    )
    b.load_state_dict(a.state_dict())  # and back
    b.step()


@pytest.mark.checklist("C8")
def test_stock_state_dict_leaves_a_groups_own_settings():
    params = parameters(torch.float32)
    groups = [
        {"params": [("a", params["a"])], "masked": False, "slow_lr": 0.5},
        {"params": [("b", params["b"])]},
    ]
    optimizer = SFRonSGD(groups, saliency=SaliencyMask.from_bool(masks()))
    stock = torch.optim.SGD([{"params": [params["a"]]}, {"params": [params["b"]]}], lr=0.3)
    optimizer.load_state_dict(stock.state_dict())
    assert [(g["lr"], g["masked"], g["slow_lr"]) for g in optimizer.param_groups] == [
        (0.3, False, 0.5),
        (0.3, True, 1.0),
    ]


def test_float64_step_counts_load():
    params = parameters(torch.float32)
    stock = torch.optim.AdamW(params.values())
    run_stock = gradients(1, torch.float32)[0]
    for n, p in params.items():
        p.grad = run_stock[n]
    stock.step()
    state = stock.state_dict()
    for s in state["state"].values():
        s["step"] = s["step"].double()  # what torch keeps where fp64 is the default dtype
    optimizer = SFRonAdamW(params.items())
    optimizer.load_state_dict(state)
    optimizer.step()
    assert all(s["step"] == 2 for s in optimizer.state.values())


@pytest.mark.checklist("C1", "C9")
@BOTH
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (dtype, state_dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for state_dtype in (None, torch.float32, torch.bfloat16)
        if (dtype, state_dtype) != (torch.float16, torch.bfloat16)
    ],
)
def test_state_dict_keeps_dtype_and_value(kind, dtype, state_dtype):
    params = parameters(dtype)
    extra = {"momentum": 0.9} if kind is SFRonSGD else {}
    optimizer = kind(
        params.items(),
        slow_lr=0.5,
        retain_steps=3,
        state_dtype=state_dtype,
        moments="separate",
        **extra,
    )
    run(optimizer, params, gradients(6, dtype), 3)  # stops inside the second cycle
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = kind(
        params.items(),
        slow_lr=0.5,
        retain_steps=3,
        state_dtype=state_dtype,
        moments="separate",
        **extra,
    )
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.mid_cycle
    for p in params.values():
        for key, value in optimizer.state[p].items():
            loaded = again.state[p][key]
            assert loaded.dtype == value.dtype, key
            assert torch.equal(loaded, value), key
            assert loaded.data_ptr() != value.data_ptr() or value.numel() == 0
    momentum = "momentum_buffer" if kind is SFRonSGD else "exp_avg"
    assert again.state[params["a"]][momentum].dtype == (state_dtype or dtype)
    assert again.state[params["a"]]["slow"].dtype == dtype


@pytest.mark.checklist("C5")
@BOTH
def test_save_and_load_anywhere_continues_with_the_same_bits(kind):
    extra = {"momentum": 0.9, "dampening": 0.2} if kind is SFRonSGD else {"amsgrad": True}
    settings = {
        "saliency": SaliencyMask.from_bool(masks()),
        "slow_lr": 0.5,
        "retain_steps": 2,
        "max_norm": 2.0,
        **extra,
    }
    grads = gradients(9, torch.float32)
    whole = parameters(torch.float32)
    run(kind(whole.items(), **settings), whole, grads, 2)
    for stop in range(10):
        first = parameters(torch.float32)
        optimizer = kind(first.items(), **settings)
        run(optimizer, first, grads[:stop], 2)
        second = {n: nn.Parameter(p.detach().clone()) for n, p in first.items()}
        resumed = kind(second.items(), **settings)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for i in range(stop, 9):
            for n, p in second.items():
                p.grad = grads[i][n].clone()
            (resumed.step if i % 3 else resumed.forget_step)()
        assert same(
            {n: p.detach() for n, p in whole.items()}, {n: p.detach() for n, p in second.items()}
        ), stop


@pytest.mark.checklist("A8")
@BOTH
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies_keep_saliency_phase_and_counts(kind, way):
    params = parameters(torch.float32)
    optimizer = kind(
        params.items(), saliency=SaliencyMask.from_bool(masks()), retain_steps=2, slow_lr=0.5
    )
    grads = gradients(4, torch.float32)
    grads[0]["a"][masks()["a"]] = float("nan")
    run(optimizer, params, grads, 2)
    if way == "pickle":
        copied = pickle.loads(pickle.dumps(optimizer))
    elif way == "deepcopy":
        copied = copy.deepcopy(optimizer)
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert copied.saliency == optimizer.saliency
    assert copied.mid_cycle
    assert copied.skipped_steps == optimizer.skipped_steps == 1
    theirs = copied.param_groups[0]["params"]
    for p, q, g in zip(
        params.values(), theirs, gradients(1, torch.float32, seed=5)[0].values(), strict=True
    ):
        p.grad, q.grad = g.clone(), g.clone()
    for each in (optimizer, copied):
        each.step()
        each.step()
        each.forget_step()
    for p, q, (name, g) in zip(params.values(), theirs, SHAPES.items(), strict=True):
        assert torch.equal(p, q), (name, g)


@pytest.mark.checklist("C3")
def test_another_mask_is_refused():
    params = parameters(torch.float32)
    optimizer = SFRonSGD(params.items(), saliency=SaliencyMask.from_bool(masks()), momentum=0.9)
    run(optimizer, params, gradients(2, torch.float32), 1)
    saved = copy.deepcopy(optimizer.state_dict())
    assert optimizer.param_groups[0]["mask_digest"] is None
    for saliency in (SaliencyMask.from_bool(masks(seed=8)), None):
        other = SFRonSGD(params.items(), lr=0.7, saliency=saliency, momentum=0.9)
        before = str(other.state_dict())
        with pytest.raises(ValueError, match="state_dict: expected mask digest"):
            other.load_state_dict(saved)
        assert str(other.state_dict()) == before


@pytest.mark.checklist("C3", "C4")
def test_state_holds_tensors_only_and_no_mask():
    params = parameters(torch.float32)
    for kind in (SFRonSGD, SFRonAdamW):
        optimizer = kind(params.items(), saliency=SaliencyMask.from_bool(masks()), slow_lr=0.5)
        run(optimizer, params, gradients(2, torch.float32), 1)
        for p, state in optimizer.state.items():
            assert all(v.shape in (p.shape, ()) and v.dtype != torch.uint8 for v in state.values())


@pytest.mark.checklist("A5")
def test_state_dict_hooks_see_and_change_what_is_loaded():
    params, seen = parameters(torch.float32), []
    optimizer = SFRonSGD(params.items(), momentum=0.9)
    run(optimizer, params, gradients(2, torch.float32), 1)
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("saved"))

    def doubled(o, state):
        seen.append("load")
        return {
            **state,
            "state": {k: {n: v * 2 for n, v in s.items()} for k, s in state["state"].items()},
        }

    def loaded(o):
        seen.append("loaded")
        o.state[params["b"]]["momentum_buffer"].zero_()

    optimizer.register_load_state_dict_pre_hook(doubled)
    optimizer.register_load_state_dict_post_hook(loaded)
    before = optimizer.state[params["a"]]["momentum_buffer"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "saved", "load", "loaded"]
    assert torch.equal(optimizer.state[params["a"]]["momentum_buffer"], 2 * before)
    assert not optimizer.state[params["b"]]["momentum_buffer"].any()
