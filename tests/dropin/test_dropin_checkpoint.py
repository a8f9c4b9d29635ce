"""Checklist C: torch.distributed.checkpoint in one process, and the step it makes state with."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import (
    EVERYTHING,
    build,
    data,
    gradients,
    parameters,
    random_mask,
    run,
    same,
    states,
    values,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sfron_fast import SFRonAdamW, SFRonSGD

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


@pytest.mark.checklist("C6", "B5")
@BOTH
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("phase", [0, 1, 2])
@pytest.mark.parametrize("stateless", [True, False])
def test_the_step_of_a_checkpoint_consumes_nothing(kind, tensor, phase, stateless):
    """torch.distributed.checkpoint asks an optimizer without state for it by step() with zero
    gradients and lr 0.
    """
    settings = {"retain_steps": 2, "moments": "none"} if stateless else EVERYTHING[kind]
    params = parameters(torch.float32)
    optimizer = kind(params.items(), lr=torch.tensor(0.1) if tensor else 0.1, **settings)
    run(optimizer, params, gradients(3 + phase, torch.float32), 2)
    weights, before = values(params), states(optimizer)
    pending = optimizer.param_groups[0]["retain_pending"]
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0) if tensor else 0.0
    for p in params.values():
        p.grad = torch.zeros_like(p)
    assert optimizer.step(closure=None) is None
    optimizer.param_groups[0]["lr"] = lr
    assert same(values(params), weights)
    assert optimizer.param_groups[0]["retain_pending"] == pending == (0, 2, 1)[phase]
    assert same({k: v for k, v in states(optimizer).items() if k in before}, before)
    run_on = gradients(1, torch.float32, seed=9)[0]
    for n, p in params.items():
        p.grad = run_on[n]
    optimizer.param_groups[0]["lr"] = 0.0  # but a step of a schedule that is at 0 counts
    optimizer.step()
    assert optimizer.param_groups[0]["retain_pending"] == max(0, pending - 1)


def made(kind, steps, seed=0):
    model = build("bn", seed=seed)
    optimizer = kind(
        model.named_parameters(), lr=0.1, saliency=random_mask(model), **EVERYTHING[kind]
    )
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    inputs, labels = data(16)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        (optimizer.step if optimizer.mid_cycle else optimizer.forget_step)()
    optimizer.zero_grad()


OPTIONS = {
    "plain": {},
    "full": {"full_state_dict": True},
    "offload": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


@pytest.mark.checklist("C7")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@BOTH
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("stop", [0, 3, 4, 5])
def test_distributed_checkpoint_round_trip(kind, options, stop, tmp_path):
    """Stopped before anything, between cycles and inside one; on from a file, in another model,
    with the same bits.
    """
    options = StateDictOptions(**options)
    whole, part = made(kind, 9), made(kind, stop)
    dcp.save(
        {"optimizer": get_optimizer_state_dict(*part, options=options)},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    model, optimizer = made(kind, 0, seed=1)
    model.load_state_dict(part[0].state_dict())
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
    assert same(states(optimizer), states(part[1]))
    assert optimizer.mid_cycle == part[1].mid_cycle == (stop % 3 != 0)
    for each in ((model, optimizer), part):  # who was saved goes on as well
        train(*each, 9 - stop)
        assert same(dict(each[0].state_dict()), dict(whole[0].state_dict()))
        assert same(states(each[1]), states(whole[1]))


@pytest.mark.checklist("C7")
@BOTH
def test_optimizer_state_dicts_by_name_in_memory(kind):
    whole, part = made(kind, 7), made(kind, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(*part))
    assert {*saved["state"]} == {n for n, _ in part[0].named_parameters()}
    model, optimizer = made(kind, 0, seed=1)
    model.load_state_dict(part[0].state_dict())
    set_optimizer_state_dict(model, optimizer, saved)
    train(model, optimizer, 3)
    assert same(dict(model.state_dict()), dict(whole[0].state_dict()))


@pytest.mark.checklist("C3", "C7")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_mask_is_refused_here_too(options):
    options = StateDictOptions(**options)
    saved = get_optimizer_state_dict(*made(SFRonSGD, 3), options=options)
    model, optimizer = made(SFRonSGD, 0)
    optimizer.saliency = random_mask(model, seed=7)
    with pytest.raises(ValueError, match="state_dict: expected mask digest"):
        set_optimizer_state_dict(model, optimizer, saved, options=options)
    optimizer.saliency = random_mask(model)
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    assert [g["mask_digest"] for g in optimizer.param_groups] == [None]


@pytest.mark.checklist("C6", "C7")
def test_asking_for_the_state_of_a_stateless_optimizer_keeps_its_phase():
    model = build()
    optimizer = SFRonSGD(model.named_parameters(), lr=0.1, retain_steps=2)
    train(model, optimizer, 1)
    for _ in range(3):
        get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["retain_pending"] == 2
    assert optimizer.state == {}
