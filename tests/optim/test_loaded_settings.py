"""Whose settings count: the constructor's, a loaded run's, or those of groups used before."""

import copy

import pytest
import torch
from models import gradients, masks, parameters, run

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
CHOSEN = {
    "forget_lr": 0.3,
    "max_norm": 2.0,
    "clip_retain": True,
    "retain_steps": 3,
    "slow_lr": 0.5,
    "moments": "separate",
    "mask_semantics": "update",
    "state_dtype": torch.bfloat16,
}


@pytest.mark.checklist("C8")
@BOTH
@pytest.mark.parametrize("trained_by", ["ours", "ours, masked", "torch"])
def test_the_state_of_a_training_run_leaves_what_the_constructor_was_told(kind, trained_by):
    """Two groups, decay and none; the training's lr, decay and moments come, nothing of forgetting
    goes.
    """
    params = parameters(torch.float32)
    mask = SaliencyMask.from_bool(masks())

    def groups():
        parts = {"ab": 0.5, "cde": 0.0}
        return [
            {"params": [(n, params[n]) for n in names], "weight_decay": decay}
            for names, decay in parts.items()
        ]

    known = {"saliency": mask} if trained_by == "ours, masked" else {}
    trained = (kind.stock if trained_by == "torch" else kind)(groups(), lr=0.25, **known)
    for name, grad in gradients(1, torch.float32)[0].items():
        params[name].grad = grad
    trained.step()
    optimizer = kind(groups(), lr=0.5, saliency=mask, **CHOSEN)
    optimizer.load_state_dict(copy.deepcopy(trained.state_dict()))
    for group, decay in zip(optimizer.param_groups, (0.5, 0.0), strict=True):
        assert (group["lr"], group["weight_decay"], group["masked"]) == (0.25, decay, True)
        assert {name: group[name] for name in CHOSEN} == CHOSEN
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer.forget_step()
    for name, p in params.items():
        # "update" semantics, masked
        assert torch.equal(p[~masks()[name]], before[name][~masks()[name]])
    assert optimizer.param_groups[0]["retain_pending"] == 3
    assert not torch.equal(params["e"], before["e"])


@pytest.mark.checklist("C8")
@BOTH
def test_a_run_that_forgets_goes_on_with_its_settings_or_not_at_all(kind):
    """Its schedules' values are its own; another setting is refused by name, whole."""
    params = parameters(torch.float32)
    mask = SaliencyMask.from_bool(masks())
    chosen = {**CHOSEN, "state_dtype": torch.float32}
    optimizer = kind(params.items(), saliency=mask, **chosen)
    run(optimizer, params, gradients(2, torch.float32), 3)
    optimizer.param_groups[0].update(forget_lr=0.125, slow_lr=0.25)
    saved = copy.deepcopy(optimizer.state_dict())
    again = kind(params.items(), saliency=mask, **chosen)
    again.load_state_dict(saved)
    assert [again.param_groups[0][k] for k in ("retain_pending", "forget_lr", "slow_lr")] == [
        2,
        0.125,
        0.25,
    ]
    others = {
        "max_norm": 1.0,
        "clip_retain": False,
        "retain_steps": 2,
        "moments": "shared",
        "mask_semantics": "gradient",
        "state_dtype": None,
    }
    for name, value in others.items():
        other = kind(params.items(), saliency=mask, **{**chosen, name: value})
        before = str(other.state_dict())
        with pytest.raises(
            ValueError, match=rf"state_dict: expected .*settings \({name} .*found one with {name} "
        ):
            other.load_state_dict(saved)
        assert str(other.state_dict()) == before
    plain = kind(params.items(), **chosen)  # forgets without a mask
    run(plain, params, gradients(1, torch.float32), 3)
    with pytest.raises(ValueError, match=r"settings \(masked True\), found one with masked False"):
        kind(params.items(), saliency=mask, **chosen).load_state_dict(plain.state_dict())
    other = kind(params.items(), saliency=mask, **{**chosen, "max_norm": 1.0})
    del saved["param_groups"][0]["max_norm"]  # the remedy of the message
    other.load_state_dict(saved)
    assert other.param_groups[0]["max_norm"] == 1.0


def test_groups_that_were_given_before_are_as_they_were_given():
    """torch writes an optimizer's defaults into them, and the next optimizer would take them for
    the user's.
    """
    params = parameters(torch.float32)
    mask = SaliencyMask.from_bool(masks())
    groups = [
        {"params": iter(list(params.items())[:2]), "weight_decay": 0.5},
        {"params": list(params.items())[2:]},
    ]
    first = SFRonAdamW(groups, lr=0.25)
    second = SFRonAdamW(groups, lr=0.5, saliency=mask, **CHOSEN)
    assert [len(g["params"]) for g in second.param_groups] == [2, 3]
    for group in second.param_groups:
        assert (group["lr"], group["masked"]) == (0.5, True)
        assert {name: group[name] for name in CHOSEN} == CHOSEN
    assert groups[1].keys() == {"params"}
    with pytest.raises(
        ValueError, match=r"params: expected groups with what differs .*retain_pending"
    ):
        SFRonAdamW(first.param_groups, saliency=mask)


@pytest.mark.parametrize("pending", [-1, 4, 1.5, "2", None, [0, 1]])
def test_a_phase_that_cannot_be_is_refused(pending):
    params = parameters(torch.float32)
    groups = [{"params": [(n, params[n]) for n in names]} for names in ("ab", "cde")]
    optimizer = SFRonSGD(groups, retain_steps=3)
    saved = copy.deepcopy(optimizer.state_dict())
    for i, group in enumerate(saved["param_groups"]):
        group["retain_pending"] = pending[i] if isinstance(pending, list) else pending
    with pytest.raises(ValueError, match=r"retain_pending: expected .*found"):
        optimizer.load_state_dict(saved)
    assert not optimizer.mid_cycle
