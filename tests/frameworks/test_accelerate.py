"""Accelerate, on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from models import bits, build, data, random_mask, same

from sfron_fast import SFRonAdamW, SFRonSGD
from sfron_fast.integrations import forget_step, unwrap

KINDS = {"sgd": (SFRonSGD, {"momentum": 0.9}), "adamw": (SFRonAdamW, {"eps": 1e-3})}
BOTH = pytest.mark.parametrize("kind", KINDS)
KNOBS = {
    "lr": 0.05,
    "weight_decay": 0.1,
    "max_norm": 0.3,
    "retain_steps": 2,
    "slow_lr": 0.5,
    "moments": "separate",
}


def make(kind, model, **more):
    cls, own = KINDS[kind]
    return cls(model.named_parameters(), saliency=random_mask(model), **{**KNOBS, **own, **more})


def batches(count, dtype=torch.float32, size=4):
    inputs, targets = data(count * size, dtype)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def plain(model, optimizer, steps, first=0):
    """Without Accelerate: a forget step where a cycle begins, then a clipped retain step."""
    for inputs, targets in batches(8)[first:steps]:
        if not optimizer.mid_cycle:
            optimizer.zero_grad()
            (-F.cross_entropy(model(inputs.flip(0)), targets)).backward()
            optimizer.forget_step()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)
        optimizer.step()


def accelerated(accelerator, model, optimizer, steps, first=0):
    for inputs, targets in batches(8)[first:steps]:
        if not unwrap(optimizer).mid_cycle:
            optimizer.zero_grad()
            accelerator.backward(-F.cross_entropy(model(inputs.flip(0)), targets))
            forget_step(optimizer, accelerator.scaler)
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(inputs), targets))
        accelerator.clip_grad_norm_(model.parameters(), 0.4)
        optimizer.step()


@BOTH
@pytest.mark.checklist("G4")
def test_prepared_optimizer_gives_the_bits_of_a_plain_loop(kind):
    ours, theirs = build(), build()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(ours, make(kind, ours))
    schedule = torch.optim.lr_scheduler.LambdaLR(unwrap(optimizer), lambda step: 1.0)
    accelerated(accelerator, model, optimizer, 5)
    accelerator.prepare(schedule).step()
    plain(theirs, make(kind, theirs), 5)
    assert same(bits(ours), bits(theirs))
    assert unwrap(optimizer).mid_cycle
    assert optimizer.optimizer is unwrap(optimizer)
    with pytest.raises(RuntimeError, match="forget_step: expected a finished cycle"):
        forget_step(optimizer)


@BOTH
@pytest.mark.checklist("G4")
@pytest.mark.checklist("C5")
@pytest.mark.parametrize("stop", [3, 4])
def test_save_state_and_load_state_go_on_with_the_same_bits(kind, stop, tmp_path):
    """Within a cycle and between two; the loading side starts from other weights and a fresh
    optimizer.
    """
    whole = build()
    plain(whole, make(kind, whole), 7)
    accelerator = Accelerator(cpu=True)
    first = build()
    model, optimizer = accelerator.prepare(first, make(kind, first))
    accelerated(accelerator, model, optimizer, stop)
    assert unwrap(optimizer).mid_cycle == (stop == 3)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.free_memory()
    second = build(seed=5)
    model, optimizer = accelerator.prepare(second, make(kind, second))
    accelerator.load_state(str(tmp_path / "state"))
    accelerated(accelerator, model, optimizer, 7, first=stop)
    assert same(bits(second), bits(whole))


@BOTH
@pytest.mark.checklist("C2")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_prepare_keeps_every_dtype_and_value(kind, dtype):
    """prepare() loads the optimizer's own state dict; torch's casts what it loads to the
    parameters' dtype.
    """
    model = build(dtype=dtype)
    optimizer = make(kind, model, state_dtype=torch.float32)
    for step in (optimizer.forget_step, optimizer.step):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.01 * (i + 1))
        step()
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    dtypes = {v.dtype for state in before for k, v in state.items() if "slow" not in k}
    assert dtypes == {torch.float32}
    prepared = Accelerator(cpu=True).prepare(optimizer)
    after = [prepared.state[p] for p in model.parameters()]
    for old, new in zip(before, after, strict=True):
        assert len(old) > 1
        assert same(old, new)
    for old, new in zip(groups, prepared.param_groups, strict=True):
        assert old == {k: v for k, v in new.items() if k in old}
    assert unwrap(prepared).mid_cycle


@pytest.mark.checklist("G4")
def test_accumulation_per_phase():
    """accumulate() counts batches of both phases; both have as many, so the gradients agree with
    one large batch's.
    """
    ours, theirs = build(dtype=torch.float64), build(dtype=torch.float64)
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model, optimizer = accelerator.prepare(ours, make("sgd", ours, retain_steps=1))
    steps = []
    for i, (inputs, targets) in enumerate(batches(8, torch.float64)):
        forget = i % 4 < 2
        with accelerator.accumulate(model):
            accelerator.backward((-1 if forget else 1) * F.cross_entropy(model(inputs), targets))
            if not forget:
                optimizer.step()
            elif accelerator.sync_gradients:
                forget_step(optimizer, accelerator.scaler)
            steps.append(unwrap(optimizer).mid_cycle)
            optimizer.zero_grad()
    assert steps == [False, True, True, False] * 2
    other = make("sgd", theirs, retain_steps=1)
    for i, (inputs, targets) in enumerate(batches(4, torch.float64, size=8)):
        loss = F.cross_entropy(theirs(inputs), targets)
        (loss if i % 2 else -loss).backward()
        (other.step if i % 2 else other.forget_step)()
        other.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # the norm is fp32


@BOTH
@pytest.mark.checklist("D5")
def test_one_scaler_for_both_phases(kind):
    """The loss scale, a power of two, leaves no trace; an overflow skips the step and halves it.

    Accelerate makes a GradScaler on GPUs only; here it is given torch's for the CPU.
    """
    ours, theirs = build(), build()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, optimizer = accelerator.prepare(ours, make(kind, ours))
    (inputs, targets), other = batches(1)[0], make(kind, theirs)
    for scaled in (True, False):
        net, opt = (model, optimizer) if scaled else (theirs, other)
        backward = accelerator.backward if scaled else torch.Tensor.backward
        opt.zero_grad()
        backward(-F.cross_entropy(net(inputs), targets))
        if scaled:
            forget_step(opt, accelerator.scaler)
        else:
            opt.forget_step()
        for _ in range(2):
            opt.zero_grad()
            backward(F.cross_entropy(net(inputs), targets))
            opt.step()
    assert same(bits(ours), bits(theirs))
    assert accelerator.scaler.get_scale() == 1024.0
    optimizer.zero_grad()
    accelerator.backward(-F.cross_entropy(model(inputs), targets))
    for p in ours.parameters():
        p.grad.fill_(float("inf"))
    forget_step(optimizer, accelerator.scaler)
    assert same(bits(ours), bits(theirs))
    assert not unwrap(optimizer).mid_cycle
    assert accelerator.scaler.get_scale() == 512.0


@BOTH
@pytest.mark.checklist("D3")
def test_a_skipped_retain_step_is_made_up_for(kind):
    """As in docs/frameworks.md: no forget step before the cycle is closed."""
    model = build()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, opt = accelerator.prepare(model, make(kind, model, retain_steps=1))
    opened = []
    for i, (inputs, targets) in enumerate(batches(4)):
        opened.append(not opt.optimizer.mid_cycle)
        if opened[-1]:
            accelerator.backward(-F.cross_entropy(model(inputs), targets))
            forget_step(opt, accelerator.scaler)
            opt.zero_grad()
        accelerator.backward(F.cross_entropy(model(inputs), targets))
        if i == 1:
            next(model.parameters()).grad.fill_(float("inf"))
        opt.step()
        opt.zero_grad()
    assert opened == [True, True, False, True]
    assert accelerator.scaler.get_scale() == 512.0


@pytest.mark.checklist("G4")
def test_masks_follow_names_when_parameters_are_replaced():
    """FSDP2 puts other parameters in the groups of a prepared optimizer."""
    model = build()
    optimizer = Accelerator(cpu=True).prepare(
        make("sgd", model, slow_lr=1.0, max_norm=None, weight_decay=0.0, lr=1.0)
    )
    mask, before = random_mask(model), bits(model)
    new = {p: torch.nn.Parameter(p.detach().clone()) for p in model.parameters()}
    names = {n: new[p] for n, p in model.named_parameters()}
    optimizer._switch_parameters(new)
    for p in new.values():
        p.grad = torch.ones_like(p)
    forget_step(optimizer)
    for name, p in names.items():
        assert torch.equal(p != before[name], mask.to_bool(name)), name
    assert same(bits(model), before)


def test_other_optimizers_are_refused():
    model = build()
    with pytest.raises(ValueError, match="optimizer: expected SFRonSGD or SFRonAdamW, found SGD"):
        forget_step(Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters())))
