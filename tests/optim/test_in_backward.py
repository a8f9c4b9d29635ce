"""step_in_backward: the bits of the ordinary step, without the gradients' memory."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from memory import peak
from models import EVERYTHING, bits, build, data, random_mask, same, states
from torch import nn
from torch.utils.checkpoint import checkpoint

from sfron_fast import SFRonAdamW, SFRonSGD, step_in_backward

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
X, Y = data(12)


class Odd(nn.Module):
    """A weight used twice, one frozen, and one with a gradient in every second step only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.tied, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.frozen, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.last(self.tied(self.tied(self.first(x)).tanh()).tanh())
        return self.frozen(self.sometimes(x) if self.calls % 2 else x)


def optimizer_of(kind, model, **settings):
    own = {**EVERYTHING[kind], **settings}
    if "moments" not in settings:
        own |= {"moments": "shared"}
    named = dict(model.named_parameters())
    groups = [
        {
            "params": [(n, p) for n, p in named.items() if n.endswith("bias") == bias],
            "weight_decay": 0.1 * bias,
        }
        for bias in (True, False)
    ]
    return kind(groups, lr=0.1, saliency=random_mask(model), max_norm=1.0, **own)


def run(optimizer, model, how, cycles=3, before=lambda: None):
    pairs = []
    loss = nn.CrossEntropyLoss()
    for i in range(cycles * (1 + optimizer.param_groups[0]["retain_steps"])):
        optimizer.zero_grad()
        x, y = X[i % 3 :: 3], Y[i % 3 :: 3]
        if not optimizer.mid_cycle:
            (-loss(model(x), y)).backward()
            optimizer.forget_step()
            continue
        value = loss(model(x), y)
        before()
        if how == "inside":
            with step_in_backward(optimizer):
                value.backward()
            assert all(p.grad is None for p in model.parameters())
        else:
            value.backward()
        optimizer.step()
        pairs.append(bits(model))
    return pairs


@BOTH
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"moments": "separate"},
        {"moments": "none"},
        {"slow_lr": 1.0},
        {"retain_steps": 1},
        {"lr_tensor": True},
        {"mask_semantics": "update", "maximize": True},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_the_ordinary_step(kind, settings, dtype):
    settings = dict(settings)
    tensor = settings.pop("lr_tensor", False)
    ended = []
    for how in ("inside", "after"):
        model = Odd().to(dtype)
        optimizer = optimizer_of(kind, model, **settings)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1) if tensor else 0.1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            ended.append((run(optimizer, model, how), states(optimizer)))
    (inside, inside_states), (after, after_states) = ended
    assert all(map(same, inside, after))
    assert not same(inside[0], inside[-1])
    assert same(inside_states, after_states)


def backward_of(loss, optimizer, how):
    """``how``: the update "inside" backward or "after" it."""
    with step_in_backward(optimizer) if how == "inside" else nullcontext():
        loss.backward()


def test_without_a_forget_step_it_is_the_stock_step():
    """No cycle, no state before the first step: SGD's momentum starts at the first gradient."""
    ended = []
    for how in ("inside", "after"):
        model = build()
        optimizer = SFRonSGD(model.named_parameters(), lr=0.1, momentum=0.9, dampening=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            backward_of(loss, optimizer, how)
            optimizer.step()
        ended.append((bits(model), states(optimizer)))
    assert same(ended[0][0], ended[1][0])
    assert same(ended[0][1], ended[1][1])


@BOTH
def test_a_step_that_is_skipped_changes_nothing_and_counts_once(kind):
    model = build()
    optimizer = optimizer_of(kind, model)
    optimizer.init_state()
    before = bits(model)
    optimizer.found_inf = torch.ones(())
    with step_in_backward(optimizer):
        nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert same(bits(model), before)
    assert optimizer.skipped_steps == 1


def test_hooks_and_schedules_see_one_step():
    model = build()
    optimizer = optimizer_of(SFRonSGD, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    run(optimizer, model, "inside", cycles=1)
    schedule.step()
    assert seen == [0.1] * 3  # forget, retain, retain
    assert optimizer.param_groups[0]["lr"] == 0.05


@BOTH
def test_gradients_are_never_all_held(kind):
    """16 layers of one size, activations of next to nothing: the gradients of two layers, instead
    of sixteen.
    """
    held = {}
    for how in ("inside", "after"):
        model = nn.Sequential(*[nn.Linear(200, 200, bias=False) for _ in range(16)])
        optimizer = kind(model.named_parameters(), lr=0.1)
        optimizer.init_state()
        x = torch.randn(1, 200)

        def step(model=model, optimizer=optimizer, x=x, how=how):
            loss = model(x).square().sum()
            backward_of(loss, optimizer, how)
            optimizer.step()
            optimizer.zero_grad()

        step()
        held[how] = peak(step) / (200 * 200 * 4)
    assert 16 <= held["after"] < 17.5
    assert 1 <= held["inside"] < 2.5, held


def refused(match, optimizer, error=RuntimeError):
    model_before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    with pytest.raises(error, match=match), step_in_backward(optimizer):
        pass
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model_before, (p for g in optimizer.param_groups for p in g["params"]), strict=True
        )
    )


def backward(model, optimizer):
    with step_in_backward(optimizer):
        nn.functional.cross_entropy(model(X), Y).backward()


def test_refusals(monkeypatch):
    model = build()
    refused(
        "clip_retain: expected False",
        SFRonSGD(model.named_parameters(), clip_retain=True, max_norm=1.0),
        ValueError,
    )
    optimizer = SFRonSGD(model.named_parameters())
    nn.functional.cross_entropy(model(X), Y).backward()
    refused("expected no gradients before it", optimizer)
    optimizer.zero_grad()
    backward(model, optimizer)
    refused(r"expected step\(\) after the last one", optimizer)
    with pytest.raises(RuntimeError, match="forget_step: expected step"):
        optimizer.forget_step()
    nn.functional.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match="step: expected no gradients after step_in_backward"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    refused("in a job of 2 ranks", optimizer)


def test_a_second_gradient_is_an_error():
    """Accumulation, and checkpoints that run a backward of their own for each use of a weight."""
    model = build()
    optimizer = SFRonSGD(model.named_parameters())
    with step_in_backward(optimizer):
        nn.functional.cross_entropy(model(X[:6]), Y[:6]).backward()
        loss = nn.functional.cross_entropy(model(X[6:]), Y[6:])
        with pytest.raises(RuntimeError, match="found a second"):
            loss.backward()

    inner = nn.Linear(6, 6)
    optimizer = SFRonSGD(inner.named_parameters())
    x = X.clone().requires_grad_()
    twice = checkpoint(inner, checkpoint(inner, x, use_reentrant=True), use_reentrant=True)
    with step_in_backward(optimizer), pytest.raises(RuntimeError, match="found a second"):
        twice.sum().backward()


def test_with_checkpointing_and_compile():
    ended = []
    for how in ("inside", "after"):
        model = build()
        forward = torch.compile(
            lambda x, m=model: checkpoint(m, x, use_reentrant=False), backend="aot_eager"
        )
        optimizer = SFRonAdamW(model.named_parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(forward(X), Y)
            backward_of(loss, optimizer, how)
            optimizer.step()
        ended.append(bits(model))
    assert same(*ended)


def test_after_an_error_inside_backward_a_checkpoint_goes_on():
    """Some weights have moved: no state of that is saved, and loading an earlier one forgets it."""
    ended = []
    for fails in (False, True):
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        for p, seed in zip(model.parameters(), range(4), strict=True):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer = optimizer_of(SFRonSGD, model)
        run(optimizer, model, "inside", cycles=1)
        nn.functional.cross_entropy(model(X), Y).neg().backward()
        optimizer.forget_step()
        optimizer.zero_grad()
        saved = (
            {n: p.clone() for n, p in model.state_dict().items()},
            copy.deepcopy(optimizer.state_dict()),
        )
        if fails:
            model[0].weight.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                backward(model, optimizer)
            assert not torch.equal(model[2].weight, saved[0]["2.weight"])
            with pytest.raises(
                RuntimeError, match=r"state_dict: expected step\(\) after step_in_backward"
            ):
                optimizer.state_dict()
            model[0].weight._backward_hooks.clear()
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            optimizer.zero_grad()
        backward(model, optimizer)
        optimizer.step()
        ended.append((bits(model), states(optimizer)))
    assert same(ended[0][0], ended[1][0])
    assert same(ended[0][1], ended[1][1])


def test_an_error_takes_the_hooks_away():
    model = build()
    optimizer = SFRonSGD(model.named_parameters(), lr=0.1)
    with pytest.raises(KeyError), step_in_backward(optimizer):
        raise KeyError
    before = bits(model)
    nn.functional.cross_entropy(model(X), Y).backward()
    assert same(bits(model), before)
    assert all(p.grad is not None for p in model.parameters())
