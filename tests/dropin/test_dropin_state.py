"""Checklist C: state in and out of torch.optim and Accelerate, made at once, and in files."""

import copy
import io
import json

import pytest
import torch
from models import (
    EVERYTHING,
    SHAPES,
    build,
    gradients,
    loader,
    masks,
    near,
    parameters,
    run,
    same,
    states,
    values,
)
from safetensors import safe_open
from torch import nn

import sfron_fast as sf
from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


# --- C2: Accelerate casts state on prepare --------------------------------------------------------


@pytest.mark.checklist("C2")
@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("real", [True, False], ids=["accelerate", "what it does"])
def test_state_survives_accelerate(kind, dtype, real):
    params = parameters(dtype)
    optimizer = kind(
        params.items(),
        state_dtype=torch.float32,
        saliency=SaliencyMask.from_bool(masks()),
        **EVERYTHING[kind],
    )
    run(optimizer, params, gradients(4, dtype), 2)
    before, groups = states(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    if real:
        accelerate = pytest.importorskip("accelerate")
        optimizer = accelerate.Accelerator(cpu=True).prepare(optimizer).optimizer
    else:  # its AcceleratedOptimizer begins so
        moved = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to("cpu"), optimizer.state_dict()
        )
        optimizer.load_state_dict(moved)
    assert same(states(optimizer), before)
    assert {v.dtype for v in before.values()} == {torch.float32, dtype}
    assert optimizer.mid_cycle
    assert optimizer.state_dict()["param_groups"] == groups


# --- C3, C4, C9 -----------------------------------------------------------------------------------


@pytest.mark.checklist("C3", "C4")
@BOTH
def test_every_state_is_a_tensor_like_the_parameter_or_a_scalar(kind):
    params = parameters(torch.float32)
    optimizer = kind(params.items(), saliency=SaliencyMask.from_bool(masks()), **EVERYTHING[kind])
    run(optimizer, params, gradients(3, torch.float32), 2)
    saved = optimizer.state_dict()
    (group,) = optimizer.param_groups
    kinds = optimizer.known_kinds(group)
    for p, state in optimizer.state.items():
        for key, value in state.items():
            assert type(value) is torch.Tensor
            assert value.shape == (() if kinds[key].role == "count" else p.shape)
            assert value.dtype == torch.float32  # no packed bits
    digests = {group["mask_digest"] for group in saved["param_groups"]}
    assert digests == {SaliencyMask.from_bool(masks()).digest()}


@pytest.mark.checklist("C3")
def test_a_mask_is_not_carried_over_to_other_names():
    """torch loads by position; a mask goes by name."""
    params = {"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(3))}
    mask = SaliencyMask.from_bool({"a": torch.ones(3), "b": torch.zeros(3)})
    saved = SFRonSGD(params.items(), saliency=mask).state_dict()
    for names in ("ba", "ab"):
        optimizer = SFRonSGD([(n, params[n]) for n in names], saliency=mask, lr=0.5)
        if names == "ba":
            with pytest.raises(
                ValueError,
                match=r"state_dict: expected parameters \['b', 'a'\], found \['a', 'b'\]",
            ):
                optimizer.load_state_dict(saved)
            assert optimizer.param_groups[0]["lr"] == 0.5
        else:
            optimizer.load_state_dict(saved)
    # a wrapper's prefix is no other name
    saved["param_groups"][0]["param_names"] = ["module.a", "module.b"]
    optimizer.load_state_dict(saved)


@pytest.mark.checklist("C9")
@BOTH
def test_files_load_with_weights_only_and_masks_say_how_they_were_made(kind, tmp_path):
    model = build()
    fishers = [sf.estimate_fisher(model, loader(6, 4, seed=s), estimator="batch") for s in (1, 2)]
    mask = SaliencyMask.from_fisher(forget=fishers[0], retain=fishers[1], threshold=1.5)
    optimizer = kind(model.named_parameters(), saliency=mask, **EVERYTHING[kind])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.forget_step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = kind(model.named_parameters(), saliency=mask, **EVERYTHING[kind])
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert same(states(again), states(optimizer))

    mask.save(tmp_path / "mask.safetensors")
    with safe_open(tmp_path / "mask.safetensors", framework="pt") as file:  # without the package
        header = file.metadata()
    made = json.loads(header["provenance"])
    assert made["threshold"] == 1.5
    assert made["versions"] == {"sfron_fast": sf.__version__, "torch": torch.__version__}
    for side in ("forget", "retain"):
        expected = {"estimator": "batch", "batch_size": 4, "world_size": 1, "samples": 6}
        assert expected.items() <= made[side].items()
        assert made[side]["model"] == fishers[0].metadata["model"]
    assert SaliencyMask.load(tmp_path / "mask.safetensors").metadata == made


# --- C6, C10: state made at once ------------------------------------------------------------------


@pytest.mark.checklist("C6", "C10")
@BOTH
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
def test_init_state_makes_all_of_it_and_changes_nothing_else(kind, state_dtype):
    params, plain = parameters(torch.bfloat16), parameters(torch.bfloat16)
    settings = {"lr": 0.1, "state_dtype": state_dtype, **EVERYTHING[kind]}
    optimizer, other = kind(params.items(), **settings), kind(plain.items(), **settings)
    assert optimizer.state == {}
    params["e"].requires_grad_(False)
    optimizer.init_state()
    params["e"].requires_grad_(True)
    assert params["e"] not in optimizer.state
    assert same(values(params), values(plain))
    optimizer.init_state()
    ranks = []  # as two ranks, with gradients missing in different places, see it
    for each, weights in ((optimizer, params), (other, plain)):
        grads = gradients(6, torch.bfloat16, without=[(i, "b") for i in range(3)])
        run(each, weights, grads, 2)
        ranks.append(
            {
                n: {k: (v.shape, v.dtype) for k, v in each.state[p].items()}
                for n, p in weights.items()
            }
        )
    assert ranks[0] == ranks[1]
    # bit by bit, though all state was there from the start
    assert same(values(params), values(plain))
    keys = {frozenset(state) for state in ranks[0].values()}
    assert len(keys) == 1
    moments = (
        {"momentum_buffer"}
        if kind is SFRonSGD
        else {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}
    )
    assert keys.pop() == moments | {f"forget_{k}" for k in moments} | {"slow"}


# --- C8: in and out of torch.optim ----------------------------------------------------------------


@pytest.mark.checklist("C8")
@pytest.mark.parametrize(
    ("kind", "stock", "flags"),
    [
        (SFRonSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (SFRonSGD, torch.optim.SGD, {}),
        (SFRonAdamW, torch.optim.AdamW, {"amsgrad": True}),
        (SFRonAdamW, torch.optim.AdamW, {}),
        (SFRonAdamW, torch.optim.Adam, {"weight_decay": 0.1}),
    ],
)
@pytest.mark.parametrize("own", ["shared", "separate"])
def test_stock_state_dict_goes_on_in_torch_optim(kind, stock, flags, own):
    ours = parameters(torch.float32)
    also = {"decoupled_weight_decay": False} if stock is torch.optim.Adam else {}
    optimizer = kind(
        ours.items(), lr=0.01, moments=own, slow_lr=0.5, retain_steps=2, **flags, **also
    )
    run(optimizer, ours, gradients(3, torch.float32), 2)
    theirs = {n: nn.Parameter(p.detach().clone()) for n, p in ours.items()}
    other = stock(theirs.items(), lr=7.0)
    exported = optimizer.stock_state_dict()
    file = io.BytesIO()
    torch.save(exported, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    like = stock(parameters(torch.float32).items(), lr=0.01, **flags)
    for each in (like, other):
        for n, p in zip(SHAPES, each.param_groups[0]["params"], strict=True):
            p.grad = torch.ones(SHAPES[n])
    like.step()
    assert exported["param_groups"] == like.state_dict()["param_groups"]
    assert exported["state"].keys() == like.state_dict()["state"].keys()
    for i, state in exported["state"].items():
        assert state.keys() == like.state_dict()["state"][i].keys()
    for step in gradients(5, torch.float32, seed=4):
        for n in SHAPES:
            ours[n].grad, theirs[n].grad = step[n].clone(), step[n].clone()
        optimizer.step()
        other.step()
    near(ours, theirs, 5)
    assert not same(values(ours), values(parameters(torch.float32)))


@pytest.mark.checklist("C8")
@BOTH
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("now", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
def test_loaded_state_has_the_dtype_it_would_be_made_in(kind, saved, now, state_dtype):
    """Ours and torch's, from a run in another precision."""
    flags = {"momentum": 0.9} if kind is SFRonSGD else {}
    moment = "momentum_buffer" if kind is SFRonSGD else "exp_avg"
    for each in (kind, kind.stock):
        before, params = parameters(saved), parameters(now)
        first = each(before.items(), **flags, **({"slow_lr": 0.5} if each is kind else {}))
        for n, g in gradients(1, saved)[0].items():
            before[n].grad = g
        (first.forget_step if each is kind else first.step)()
        state = first.state_dict()
        if each is kind:
            state["param_groups"][0]["state_dtype"] = state_dtype  # a group's own travels with it
        optimizer = kind(params.items(), state_dtype=state_dtype, **flags)
        optimizer.load_state_dict(state)
        for n, p in params.items():
            loaded = optimizer.state[p][moment]
            assert loaded.dtype == (state_dtype or now)
            assert torch.equal(loaded, first.state[before[n]][moment].to(loaded.dtype))
            assert each is not kind or optimizer.state[p]["slow"].dtype == now
            p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.checklist("C8")
@BOTH
def test_a_cycle_under_way_is_not_exported(kind):
    params = parameters(torch.float32)
    optimizer = kind(params.items(), retain_steps=2)
    run(optimizer, params, gradients(1, torch.float32), 2)
    with pytest.raises(RuntimeError, match="stock_state_dict: expected a finished cycle"):
        optimizer.stock_state_dict()


@pytest.mark.checklist("C8")
def test_a_stock_state_dict_that_cannot_be_is_refused_whole():
    params = parameters(torch.float32)
    optimizer = SFRonSGD(params.items(), lr=0.1, momentum=0.9)
    before = str(optimizer.state_dict())
    theirs = torch.optim.SGD(parameters(torch.float32).values(), lr=0.3, differentiable=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        optimizer.load_state_dict(theirs.state_dict())
    assert str(optimizer.state_dict()) == before
