"""Checklist E, as far as a CPU proves it: a compiled step, no waiting, no autotuning."""

import ast

import pytest
import torch
from models import build, gradients, masks, parameters, random_mask, same, values
from paths import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


def pair(kind, lr, **settings):
    """An optimizer to compile, one to run eagerly, and a schedule for each."""
    own = {"momentum": 0.9} if kind is SFRonSGD else {}
    found = []
    for _ in range(2):
        params = parameters(torch.float32)
        rate = lr.clone() if isinstance(lr, torch.Tensor) else lr
        optimizer = kind(params.items(), lr=rate, weight_decay=0.1, **own, **settings)
        found.append((optimizer, params, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)))
    return found


def compiled(kind, lr, steps, cycle=0, **settings):
    """Runs a compiled and an eager optimizer side by side; the compilations after each step."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    (ours, params, schedule), (eager, others, other_schedule) = pair(kind, lr, **settings)
    step, forget_step = (torch.compile(f, backend=counter) for f in (ours.step, ours.forget_step))
    for i, grads in enumerate(gradients(steps, torch.float32)):
        for name in params:
            params[name].grad, others[name].grad = grads[name].clone(), grads[name].clone()
        forget = cycle and i % (cycle + 1) == 0
        (forget_step if forget else step)()
        (eager.forget_step if forget else eager.step)()
        schedule.step()
        other_schedule.step()
        assert same(values(params), values(others)), i
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts


@pytest.mark.checklist("E1")
@BOTH
def test_a_compiled_step_follows_a_tensor_lr_without_compiling_again(kind):
    counts = compiled(kind, torch.tensor(0.1), 100)
    assert counts[-1] <= 2, counts


@pytest.mark.checklist("E1")
@BOTH
def test_compiled_cycles_have_the_eager_bits_and_settle(kind):
    """Forget step, retain step and closing step are compiled; nothing new comes after the second
    cycle.
    """
    settings = {
        "retain_steps": 2,
        "slow_lr": 0.5,
        "max_norm": 1.0,
        "saliency": SaliencyMask.from_bool(masks()),
    }
    counts = compiled(kind, torch.tensor(0.1), 18, cycle=2, **settings)
    assert counts[5] == counts[-1] <= 10, counts


@pytest.mark.checklist("E1")
@pytest.mark.filterwarnings("ignore")
def test_a_float_lr_compiles_for_each_value_until_torch_gives_up():
    """As docs/optimizers.md says: torch guards a float's value. The results are right."""
    counts = compiled(SFRonSGD, 0.1, 20)
    assert counts[3] > counts[2] > counts[1]
    assert counts[-1] == counts[-5], counts  # torch's limit is 8 of a kind
    assert "`lr` as a number" in (ROOT / "docs/optimizers.md").read_text()


class NoHostRead(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        ), function
        return function(*args, **(kwargs or {}))


@pytest.mark.checklist("E4")
@BOTH
@pytest.mark.parametrize("tensors", [False, True])
def test_no_step_reads_a_value(kind, tensors):
    """On the CPU nothing shows but the reads themselves (there a tensor lr is read); tests/gpu asks
    the device.
    """
    params = parameters(torch.float32)
    settings = {n: torch.tensor(0.1) if tensors else 0.1 for n in ("forget_lr", "weight_decay")}
    settings |= {"momentum": 0.9} if kind is SFRonSGD else {}
    optimizer = kind(
        params.items(),
        slow_lr=0.5,
        max_norm=1.0,
        clip_retain=True,
        moments="separate",
        saliency=SaliencyMask.from_bool(masks()),
        **settings,
    )
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for i, grads in enumerate(gradients(6, torch.float32)):
        for name, param in params.items():
            param.grad = grads[name]
        with NoHostRead():
            (optimizer.step if i % 2 else optimizer.forget_step)()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostRead():
        bool(optimizer.grad_norm > 0)


@pytest.mark.checklist("E5")
def test_nothing_is_autotuned():
    """An autotuner runs a kernel many times: one that writes its inputs would update many times."""
    files = sorted((ROOT / "sfron_fast").rglob("*.py"))
    assert any(path.parent.name == "triton" for path in files)
    for path in files:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {node.id for node in nodes if isinstance(node, ast.Name)}
        assert not names & {"autotune", "Autotuner", "do_bench"}, path


@pytest.mark.checklist("E6")
@BOTH
def test_a_compiled_model_finds_its_masks(kind):
    """Trained through torch.compile, with the names it gives."""
    results = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        model = build()
        mask, module = random_mask(model), wrap(model)
        optimizer = kind(module.named_parameters(), lr=0.1, saliency=mask)
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
        module(inputs).square().mean().backward()
        optimizer.forget_step()
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    torch._dynamo.reset()
    assert same(*results)


@pytest.mark.checklist("E6")
def test_a_compiled_step_sees_another_mask():
    """Not an edit of the one it has: that is in the mask's documentation."""
    weights = [("a", torch.nn.Parameter(torch.zeros(8))), ("b", torch.nn.Parameter(torch.zeros(8)))]
    even, odd = (
        SaliencyMask.from_bool({n: torch.arange(8) % 2 == i for n, _ in weights}) for i in (0, 1)
    )
    optimizer = SFRonSGD(weights, lr=torch.tensor(1.0), saliency=even)
    forget_step = torch.compile(optimizer.forget_step, backend="eager")
    for mask in (even, odd):
        optimizer.saliency = mask
        optimizer.param_groups[0]["retain_pending"] = 0
        before = [p.detach().clone() for _, p in weights]
        for _, p in weights:
            p.grad = torch.ones(8)
        forget_step()
        assert all(
            torch.equal(p != old, mask.to_bool(n))
            for (n, p), old in zip(weights, before, strict=True)
        )
    torch._dynamo.reset()
