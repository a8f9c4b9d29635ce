"""What every torch optimizer must do: stock step, schedulers, closures, hooks, odd parameters."""

import inspect

import pytest
import torch
from models import SHAPES, gradients, masks, near, parameters, run, same
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import sfron_fast as sf
from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


SGD_FLAGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
]
ADAMW_FLAGS = [
    {},
    {"amsgrad": True},
    {"weight_decay": 0.1, "betas": (0.8, 0.99)},
    {"maximize": True, "eps": 1e-4},
]


@pytest.mark.checklist("A4")
@pytest.mark.parametrize(
    ("kind", "stock", "flags"),
    [(SFRonSGD, torch.optim.SGD, f) for f in SGD_FLAGS]
    + [(SFRonAdamW, torch.optim.AdamW, f) for f in ADAMW_FLAGS],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_is_the_stock_optimizer(kind, stock, flags, dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    a, b = kind(ours.items(), lr=0.01, **flags), stock(theirs.values(), lr=0.01, **flags)
    for step in gradients(50, dtype):
        for name in SHAPES:
            ours[name].grad, theirs[name].grad = step[name].clone(), step[name].clone()
        a.step()
        b.step()
        for name in SHAPES:
            assert torch.equal(ours[name].grad, step[name])
    near(ours, theirs, 50)
    assert not torch.equal(ours["a"], parameters(dtype)["a"])


def test_adam_with_coupled_decay_is_torchs_adam():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    a = SFRonAdamW(ours.items(), lr=0.01, weight_decay=0.1, decoupled_weight_decay=False)
    b = torch.optim.Adam(theirs.values(), lr=0.01, weight_decay=0.1)
    for step in gradients(50, torch.float32):
        for name in SHAPES:
            ours[name].grad = theirs[name].grad = step[name]
        a.step()
        b.step()
    near(ours, theirs, 50)


@pytest.mark.checklist("A2")
@BOTH
def test_signatures_are_torchs(kind):
    for name in ("step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"):
        ours, base = (
            list(inspect.signature(getattr(c, name)).parameters)
            for c in (kind, torch.optim.Optimizer)
        )
        assert ours == base, name
    stock = torch.optim.SGD if kind is SFRonSGD else torch.optim.AdamW
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (kind, stock))
    positional = [p.name for p in theirs if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD] == positional
    for name in positional[2:]:
        assert (
            inspect.signature(kind).parameters[name].default
            == inspect.signature(stock).parameters[name].default
        )


@pytest.mark.checklist("A1")
@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.1),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=12),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.ConstantLR(o),
                torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
            ],
            [4],
        ),
    ],
    ids=["step", "lambda", "cosine", "onecycle", "sequential"],
)
@pytest.mark.parametrize("tensor", [False, True])
@BOTH
def test_schedulers(kind, make, tensor):
    """One of them moves momentum, or the first beta, as well."""
    ours, theirs = parameters(), parameters()
    flags = {"momentum": 0.9} if kind is SFRonSGD else {"betas": (0.9, 0.95)}
    rates = [torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1 for _ in "ab"]
    a, b = (
        kind(ours.items(), lr=rates[0], **flags),
        kind.stock(theirs.values(), lr=rates[1], **flags),
    )
    schedules = make(a), make(b)
    for step in gradients(10):
        for name in SHAPES:
            ours[name].grad = theirs[name].grad = step[name]
        a.step()
        b.step()
        for s in schedules:
            s.step()
        assert all(a.param_groups[0][k] == b.param_groups[0][k] for k in ("lr", *flags))
    near(ours, theirs, 10)


@pytest.mark.checklist("A1", "A11")
def test_a_schedule_takes_momentum_through_zero():
    """torch looks at nesterov in its constructor only, and then does plain steps.

    A run may be resumed there.
    """
    ours, theirs = parameters(), parameters()
    flags = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    a, b = SFRonSGD(ours.items(), **flags), torch.optim.SGD(theirs.values(), **flags)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, 0.1, total_steps=20, base_momentum=0.0, max_momentum=0.9, three_phase=True
        )
        for o in (a, b)
    ]
    seen = set()
    for i, step in enumerate(gradients(20)):
        for name in SHAPES:
            ours[name].grad = theirs[name].grad = step[name]
        seen.add(a.param_groups[0]["momentum"])
        a.step()
        b.step()
        a.load_state_dict(a.state_dict())
        for s in schedules if i < 19 else ():
            s.step()
    assert 0.0 in seen
    near(ours, theirs, 20)
    with pytest.raises(ValueError, match="nesterov: expected momentum > 0"):
        SFRonSGD(ours.items(), nesterov=True)


@pytest.mark.checklist("A1")
@pytest.mark.filterwarnings("error")
def test_a_schedule_may_follow_a_forget_step():
    params = parameters()
    optimizer = SFRonSGD(params.items(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    run(optimizer, params, gradients(1), 1)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.checklist("A1")
def test_plateau_scheduler_is_used_at_the_next_step():
    params = parameters()
    optimizer = SFRonSGD(params.items(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    schedule.step(1.0)
    schedule.step(2.0)
    before = params["a"].detach().clone()
    params["a"].grad = torch.ones_like(params["a"])
    optimizer.forget_step()  # forget_lr None follows lr
    assert torch.equal(params["a"], before - 0.5)


@pytest.mark.checklist("A3")
@BOTH
@pytest.mark.parametrize("method", ["forget_step", "step"])
def test_closure(kind, method):
    params, selected, calls = parameters(torch.float32), masks(), []
    optimizer = kind(
        params.items(), lr=1.0, weight_decay=0.0, saliency=SaliencyMask.from_bool(selected)
    )

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((3.0 * p).sum() for p in params.values())
        loss.backward()
        return loss

    before = {n: p.detach().clone() for n, p in params.items()}
    with torch.no_grad():
        loss = getattr(optimizer, method)(closure)
    assert calls == [True]
    assert loss.requires_grad
    for name, p in params.items():
        moved = (
            selected[name]
            if method == "forget_step"
            else torch.ones(SHAPES[name], dtype=torch.bool)
        )
        assert torch.equal(p.detach() != before[name], moved), name
        assert torch.equal(p.grad, torch.full_like(p, 3.0))  # gradients are never written


@pytest.mark.checklist("A5")
@BOTH
def test_hooks_fire_once_per_public_step(kind):
    params, seen = parameters(), []
    optimizer = kind(params.items(), slow_lr=0.5)
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    handle = register_optimizer_step_post_hook(lambda *a: seen.append("global"))
    try:
        run(optimizer, params, gradients(1), 1)
        assert seen == ["pre", "post", "global"]
        optimizer.step()
    finally:
        handle.remove()
    assert seen == ["pre", "post", "global"] * 2


@pytest.mark.checklist("A12")
@BOTH
def test_layouts_and_dtypes_in_one_list(kind):
    """Channels-last, transposed and low-precision parameters get what they get alone."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        torch.randn(5, 3, generator=generator).t(),
        torch.randn(9, generator=generator).bfloat16(),
        torch.randn(9, generator=generator).half(),
        torch.randn(4, generator=generator).double(),
    ]
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors]

    def result(parts):
        params = [
            nn.Parameter(tensors[i].clone(memory_format=torch.preserve_format)) for i in parts
        ]
        chosen = {str(i): grads[i] > 0 for i in parts}
        named = [(str(i), p) for i, p in zip(parts, params, strict=True)]
        optimizer = kind(named, lr=0.1, slow_lr=0.5, saliency=SaliencyMask.from_bool(chosen))
        for _ in range(4):
            for i, p in zip(parts, params, strict=True):
                p.grad = grads[i].clone(memory_format=torch.preserve_format)
            (optimizer.step if optimizer.mid_cycle else optimizer.forget_step)()
        return {str(i): p.detach() for i, p in zip(parts, params, strict=True)}

    together = result(range(5))
    for i in range(5):
        alone = result([i])[str(i)]
        assert torch.equal(together[str(i)], alone), i
        assert together[str(i)].stride() == tensors[i].stride()
        dense = nn.Parameter(tensors[i].contiguous().clone())
        assert dense.shape == alone.shape


@pytest.mark.checklist("A7")
def test_frozen_parameters_are_left_alone():
    params = parameters(torch.float32)
    params["b"].requires_grad_(False)
    optimizer = SFRonSGD(params.items(), lr=0.1, momentum=0.9, weight_decay=0.1, slow_lr=0.5)
    run(optimizer, params, gradients(4, torch.float32, without=[(i, "b") for i in range(4)]), 1)
    assert torch.equal(params["b"], parameters(torch.float32)["b"])
    assert params["b"] not in optimizer.state


@pytest.mark.checklist("A12")
@BOTH
def test_sparse_and_complex_are_refused_before_anything_changes(kind):
    weight, other = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(3))
    optimizer = kind([other, weight])
    before = weight.detach().clone(), other.detach().clone()
    other.grad, weight.grad = torch.ones(3), torch.ones(4, 2).to_sparse()
    for method in (optimizer.forget_step, optimizer.step):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"grads\[1\]: expected a dense tensor"
        ):
            method()
    assert not optimizer.mid_cycle
    assert torch.equal(weight, before[0])
    assert torch.equal(other, before[1])
    wave = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    wave.grad = torch.zeros_like(wave)
    with pytest.raises((ValueError, RuntimeError), match=r"params\[0\]: expected"):
        kind([wave]).step()


@pytest.mark.checklist("A12")
@BOTH
@pytest.mark.parametrize("retain", [False, True], ids=["forget", "retain"])
def test_a_refused_step_leaves_no_state_behind(kind, retain):
    """What a step makes of state comes after all it refuses, a state that is there included."""
    weight = nn.Parameter(torch.ones(3))
    settings = {"momentum": 0.9} if kind is SFRonSGD else {}
    optimizer = kind([weight], slow_lr=0.5, **settings)
    weight.grad = torch.ones(3)
    optimizer.step()
    if retain:  # its slow weights have not begun
        optimizer.param_groups[0]["retain_pending"] = 1
    state = optimizer.state[weight]
    key = list(state)[-1]
    state[key] = state[key].half()
    before = dict(state)
    with pytest.raises((ValueError, RuntimeError), match=rf"{key}\[0\]: expected dtype"):
        (optimizer.step if retain else optimizer.forget_step)()
    assert optimizer.state[weight] == before


def test_tensor_lr_and_zero_lr():
    params = parameters(torch.float32)
    optimizer = SFRonSGD(params.items(), lr=torch.tensor(0.0), momentum=0.9, slow_lr=0.5)
    run(optimizer, params, gradients(2, torch.float32), 1)
    assert same(
        {n: p.detach() for n, p in params.items()},
        {n: p.detach() for n, p in parameters(torch.float32).items()},
    )
    optimizer.param_groups[0]["lr"].fill_(0.5)
    run(optimizer, params, gradients(1, torch.float32), 1)
    assert not torch.equal(params["a"], parameters(torch.float32)["a"])


@pytest.mark.checklist("B7")
def test_runs_are_repeatable_and_order_of_parameters_does_not_matter():
    results = []
    for order in ("abcde", "abcde", "edcba"):
        params = parameters(torch.float32)
        optimizer = sf.SFRonAdamW(
            [(n, params[n]) for n in order], saliency=SaliencyMask.from_bool(masks()), slow_lr=0.5
        )
        run(optimizer, params, gradients(6, torch.float32), 1)
        results.append({n: p.detach() for n, p in params.items()})
    assert same(results[0], results[1])
    assert same(results[0], results[2])
