"""torch's generic optimizer tests over its inputs: steps, schedules, groups, hooks, errors."""

import copy
import warnings

import pytest
import torch
from optimizer_infos import EACH, EACH_INPUT, common, inputs, line
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

pytestmark = pytest.mark.checklist("A13")


def weights(contiguous=True, dtype=torch.float32):
    if contiguous:
        return Parameter(torch.randn(10, 5, dtype=dtype)), Parameter(torch.randn(10, dtype=dtype))
    return Parameter(torch.randn(10, 5, 2, dtype=dtype)[..., 0]), Parameter(
        torch.randn(10, 2, dtype=dtype)[..., 0]
    )


def descend(optimizer, weight, bias, schedulers=(), steps=20):
    """First and last loss."""
    x, losses = torch.randn(5, dtype=weight.dtype), []

    def closure():
        optimizer.zero_grad()
        loss = line(weight, bias, x)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(steps):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return losses[0], closure().item()


def right(kwargs, losses):
    return losses[1] > losses[0] if kwargs.get("maximize") else losses[1] < losses[0]


@EACH
def test_entry_leaves_implementation_flags_to_the_tests(info):
    plain = info.optim_inputs_func("cuda")
    assert all(not {"foreach", "fused", "differentiable"} & i.kwargs.keys() for i in plain)
    assert len(inputs(info)) >= 3 * 8


@EACH
def test_errors(info):
    seen = 0
    for error in info.optim_error_inputs_func("cpu", torch.float32):
        given = error.optimizer_error_input
        assert error.error_on == common.OptimizerErrorEnum.CONSTRUCTION_ERROR
        # torch warns of a parameter given twice; to us it is an error
        if issubclass(error.error_type, Warning):
            assert "duplicate parameters" in error.error_regex
            with pytest.raises(ValueError, match="params: expected each parameter once"):
                info.optim_cls(given.params, **given.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.optim_cls(given.params, **given.kwargs)
        seen += 1
    assert seen >= 9


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduled", [True, False])
@EACH_INPUT
def test_goes_in_the_right_direction(info, i, contiguous, scheduled):
    for make in info.scheduler_inputs if scheduled else [[]]:
        kwargs = inputs(info)[i]
        weight, bias = weights(contiguous)
        optimizer = info.optim_cls([weight, bias], **kwargs)
        assert right(kwargs, descend(optimizer, weight, bias, [s(optimizer) for s in make]))


@EACH
def test_group_with_scheduler_goes_in_the_right_direction(info):
    for make in info.scheduler_inputs:
        weight, bias = weights()
        optimizer = info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
        assert right({}, descend(optimizer, weight, bias, [s(optimizer) for s in make]))


@pytest.mark.parametrize("dims", [0, 1])
@EACH_INPUT
def test_tensor_lr(info, i, dims):
    number, tensor = (
        {**inputs(info)[i], "lr": lr} for lr in (2.0**-10, torch.full((1,) * dims, 2.0**-10))
    )
    results = []
    for kwargs in (number, tensor):
        torch.manual_seed(0)
        weight, bias = weights()
        descend(info.optim_cls([weight, bias], **kwargs), weight, bias, steps=5)
        results.append((weight.detach(), bias.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@EACH_INPUT
def test_matches_torchs_loop(info, i, dtype):
    """A layer freezes and thaws, a step has no gradients, and one parameter is 0-dim."""
    kwargs = inputs(info)[i]
    if dtype.itemsize == 2:
        kwargs |= {"eps": 0.1} if info.name == "SFRonAdamW" else {}
    x = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=dtype)
    models, optimizers = [], []
    loop = {k: v for k, v in kwargs.items() if k != "capturable"} | {
        "foreach": False,
        "fused": False,
    }
    for kind, flags in ((info.optim_cls, kwargs), (info.optim_cls.stock, loop)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(
            dtype
        )
        extra = Parameter(torch.ones((), dtype=dtype))
        extra.grad = torch.full_like(extra, 0.5)
        model.register_parameter("extra", extra)
        models.append(model)
        optimizers.append(kind(model.parameters(), **copy.deepcopy(flags)))
    for step in range(7):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            if step in (3, 5):
                model[2].requires_grad_(step == 5)
            if step != 2:
                model(x).sum().backward()
            optimizer.step()
        # torch rounds low-precision results after every operation, we once: a few steps of the
        # format apart
        near = (
            {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
            if dtype.itemsize == 2
            else {}
        )
        for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(ours, theirs, **near)
            mine, other = optimizers[0].state[ours], optimizers[1].state[theirs]
            assert mine.keys() == other.keys()
            for key in mine:
                torch.testing.assert_close(mine[key], other[key], check_dtype=key != "step", **near)
                assert key != "step" or mine[key].dtype == torch.float32


@EACH
def test_default_dtype_does_not_matter(info):
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        weight, bias = weights()
        torch.set_default_dtype(dtype)
        try:
            optimizer = info.optim_cls([weight, bias])
            for _ in range(3):
                weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(v.dtype == torch.float32 for s in optimizer.state.values() for v in s.values())
        results.append(weight.detach())
    assert torch.equal(*results)


@EACH_INPUT
def test_mixed_dtypes_in_one_group(info, i):
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

    def stepped(chosen):
        params = [Parameter(torch.full((3, 2), 0.5, dtype=d)) for d in chosen]
        optimizer = info.optim_cls(params, **inputs(info)[i])
        for _ in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.25)
            optimizer.step()
        return [p.detach() for p in params]

    for together, dtype in zip(stepped(dtypes), dtypes, strict=True):
        assert torch.equal(together, stepped([dtype])[0])


@pytest.mark.parametrize("scaled", [False, True])
@EACH_INPUT
def test_no_step_if_found_inf(info, i, scaled):
    params = [torch.ones(1) for _ in range(5)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = info.optim_cls(params, **inputs(info)[i])
    optimizer.grad_scale = torch.ones(1) if scaled else None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(s["step"] == 0 for s in optimizer.state.values() if "step" in s)
    assert all(torch.equal(p, torch.ones(1)) for p in params)
    del optimizer.grad_scale, optimizer.found_inf  # as GradScaler does
    optimizer.step()
    assert not any(torch.equal(p, torch.ones(1)) for p in params)


@EACH_INPUT
def test_groups_with_their_own_decay(info, i):
    kwargs = inputs(info)[i]
    weight, bias = weights()
    groups = [
        {"params": [weight], **kwargs},
        {"params": [bias], **copy.deepcopy(kwargs), "weight_decay": 0.0},
    ]
    assert right(kwargs, descend(info.optim_cls(groups), weight, bias))


@EACH_INPUT
def test_groups_with_their_own_lr(info, i):
    kwargs = {"lr": 1e-3, **inputs(info)[i]}
    weight, bias = weights()
    still = Parameter(torch.randn(2))
    before = still.detach().clone()
    optimizer = info.optim_cls(
        [{"params": [weight, bias], **kwargs}, {"params": [still]}], lr=1e-28
    )
    optimizer.register_step_pre_hook(lambda *a: setattr(still, "grad", torch.rand_like(still)))
    assert right(kwargs, descend(optimizer, weight, bias))
    assert torch.equal(still, before)


@EACH_INPUT
def test_nothing_happens_without_gradients_or_with_zero_ones(info, i):
    kwargs = inputs(info)[i]
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    optimizer = info.optim_cls(params, **kwargs)
    assert optimizer.step(lambda: 1) == 1
    assert all(map(torch.equal, params, before))
    if kwargs.get("weight_decay", 0 if info.name == "SFRonSGD" else 1e-2) == 0:
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert all(map(torch.equal, params, before))


@EACH_INPUT
def test_state_and_print(info, i):
    kwargs = inputs(info)[i]
    weight, bias = weights()
    optimizer = info.optim_cls([weight, bias], **kwargs)
    descend(optimizer, weight, bias, steps=2)
    if info.name == "SFRonAdamW" or kwargs.get("momentum"):
        assert all(optimizer.state[p] for p in (weight, bias))
    for name, value in kwargs.items():
        assert f"    {name}: {value}\n" in repr(optimizer)


@EACH_INPUT
def test_step_hooks(info, i):
    params = [torch.tensor([1.0, 1.0])]
    first, second = info.optim_cls(params, **inputs(info)[i]), torch.optim.SGD(params)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *a: seen.append(0)),
        register_optimizer_step_post_hook(lambda *a: seen.append(5)),
    ]
    for optimizer in (first, second):
        handles.append(optimizer.register_step_pre_hook(lambda *a: seen.append(1)))
        handles.append(optimizer.register_step_post_hook(lambda *a: seen.append(2)))
    for optimizer in (first, second, first):
        optimizer.step()
    for handle in handles:
        handle.remove()
    first.step()
    assert seen == [0, 1, 2, 5] * 3


@EACH
def test_functional_call_makes_the_gradients(info):
    """Weights in a model as arguments: what torch.func computes, the optimizer applies."""
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 3)
    loss = lambda weights: torch.func.functional_call(model, weights, (x,)).square().sum()  # noqa: E731
    for each, gradients in (
        (model, torch.func.grad(loss)(dict(model.named_parameters()))),
        (twin, None),
    ):
        if gradients is None:
            twin(x).square().sum().backward()
        else:
            for name, p in each.named_parameters():
                p.grad = gradients[name].detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            info.optim_cls(each.named_parameters()).step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
