"""AMUN: adversarial examples against one sample at a time by autograd, and its fine-tuning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, bits, build, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sfron_fast import methods
from sfron_fast.methods import Adversarial, adversarial_examples, amun


def pairs(samples, seed, low=-1.0, high=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, FEATURES, generator=generator, dtype=dtype) * (high - low) + low
    return TensorDataset(x, torch.randint(CLASSES, (samples,), generator=generator))


def answers(model, data):
    """The data set under the model's own labels, so that all of it must be attacked."""
    with torch.no_grad():
        return TensorDataset(
            data.tensors[0], copy.deepcopy(model).eval()(data.tensors[0]).argmax(1)
        )


def literal(model, x0, y, radius, steps, low, high):
    """One sample, as the authors' code moves it: ascent on its cross-entropy."""
    model, x = copy.deepcopy(model).eval(), x0.clone()
    while True:
        for _ in range(steps):
            at = x.clone().requires_grad_()
            logits = model(at[None])
            if int(logits.argmax()) != y:
                return x, int(logits.argmax())
            (g,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([y])), at)
            delta = x + radius / 10 * g / g.norm() - x0
            delta = delta * min(1.0, radius / float(delta.norm()))
            x = (x0 + delta).clamp(low, high)
        radius *= 2


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), None])
def test_examples_are_those_of_one_sample_at_a_time(bounds):
    model = build("bn", torch.float64)
    data = answers(model, pairs(9, seed=1))
    wrong = data.tensors[1].clone()
    wrong[4] = (wrong[4] + 1) % CLASSES  # one that the model gets wrong as it is
    loader = DataLoader(TensorDataset(data.tensors[0], wrong), 4)
    found = adversarial_examples(model, loader, radius=0.02, steps=20, bounds=bounds)
    low, high = bounds or (-torch.inf, torch.inf)
    for i, (x0, y) in enumerate(zip(data.tensors[0], wrong.tolist(), strict=True)):
        x, said = literal(model, x0, y, 0.02, 20, low, high)
        # renorm has 1e-7 beside the norm
        torch.testing.assert_close(found.inputs[i], x, rtol=0.0, atol=1e-6)
        assert int(found.labels[i]) == said != y
        assert float(found.distances[i]) == pytest.approx(float((x - x0).norm()), abs=1e-6)
    assert float(found.distances[4]) == 0.0
    assert torch.equal(found.inputs[4], data.tensors[0][4])
    assert len(set(found.distances.tolist())) == 9  # they leave at different steps


def test_they_are_near():
    """Two classes, a linear model: a plane, whose distance is known. A step more at most."""
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, 2).double()
    data = answers(model, pairs(20, seed=2))
    found = adversarial_examples(model, DataLoader(data, 20), bounds=None)
    w, b = (t.detach()[0] - t.detach()[1] for t in (model.weight, model.bias))
    nearest = (data.tensors[0] @ w + b).abs() / w.norm()
    ball = 0.04 * 2.0 ** torch.ceil(torch.log2(nearest / 0.04)).clamp_min(0.0)
    assert (found.distances >= nearest).all()
    assert (found.distances <= nearest + ball / 10 + 1e-6).all()
    assert found.distances.max() > 4 * found.distances.min()


def test_a_certain_model_is_attacked_too():
    """Its cross-entropy has no gradient left in fp32."""
    model = build()
    data = answers(model, pairs(6, seed=3, dtype=torch.float32))
    with torch.no_grad():
        model[-1].weight.mul_(1e4)
        model[-1].bias.mul_(1e4)
    x = data.tensors[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), data.tensors[1]), x)
    assert (g.flatten(1).norm(dim=1) == 0.0).any()
    found = adversarial_examples(model, DataLoader(data, 6), bounds=None)
    assert (found.labels != data.tensors[1]).all()


def test_the_model_is_left_as_it_was():
    model = build("dropout")
    before = bits(model)
    model[1].eval()
    modes = [m.training for m in model.modules()]
    model[0].bias.requires_grad_(False)
    adversarial_examples(model, DataLoader(pairs(5, 1, dtype=torch.float32), 5), bounds=None)
    assert same(bits(model), before)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_amun_is_descent_on_all_three():
    model = build("bn")
    forget, retain = pairs(7, 4, dtype=torch.float32), pairs(22, 5, dtype=torch.float32)
    forget = answers(model, forget)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    sets = {"forget": DataLoader(forget, 4), "retain": DataLoader(retain, 8)}
    torch.manual_seed(0)
    assert amun(ours, **sets, bounds=None, epochs=3, lr=0.05) is ours

    torch.manual_seed(0)  # from which a loader draws when a pass begins
    made = adversarial_examples(theirs, list(sets["forget"]), bounds=None)
    x = torch.cat([forget.tensors[0], made.inputs])
    y = torch.cat([forget.tensors[1], made.labels])
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    for _ in range(3):
        order, seen = torch.randperm(14), []
        for batch, share in zip(sets["retain"], order.tensor_split(3), strict=True):
            seen += share.tolist()
            both = [torch.cat([a, b[share]]) for a, b in zip(batch, (x, y), strict=True)]
            optimizer.zero_grad()
            F.cross_entropy(theirs(both[0]), both[1]).backward()
            optimizer.step()
        assert sorted(seen) == list(range(14))  # each once an epoch
        schedule.step()
    assert same(bits(ours), bits(theirs))
    assert not same(bits(ours), bits(model))


def test_amun_without_a_retain_set():
    model, forget = build(), DataLoader(pairs(6, 4, dtype=torch.float32), 4)
    made = Adversarial(torch.zeros(3, FEATURES), torch.tensor([1, 2, 3]), torch.zeros(3))
    sizes = []
    model.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    amun(model, forget=forget, adversarial=made, epochs=2)
    assert sizes == [4, 4, 1] * 2
    with pytest.raises(TypeError, match=r"amun: expected amun\(model, forget=\.\.\.\)"):
        methods.amun(model, forget)


@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("radius", {"radius": 0.0}),
        ("steps", {"steps": 0}),
        ("bounds", {"bounds": (1.0, 0.0)}),
        ("bounds", {"bounds": (0.0, 0.5)}),
        ("forget", {"forget": []}),
        ("forget", {"forget": [(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2).long())]}),
        ("targets", {"forget": [(torch.zeros(2, FEATURES), torch.tensor([0, CLASSES]))]}),
    ],
)
def test_bad_input_is_named(argument, settings):
    forget = DataLoader(pairs(4, 1, 0.0, 1.0, torch.float32), 4)
    with pytest.raises(ValueError, match=rf"^{argument}.*: expected .*found "):
        adversarial_examples(build(), **{"forget": forget, **settings})


def test_a_model_with_one_answer_is_refused():
    model = build()
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.arange(4.0))
    forget = [(torch.zeros(2, FEATURES), torch.full((2,), CLASSES - 1))]
    with pytest.raises(ValueError, match=r"^model: expected a wrong answer .* for 2 of 2"):
        adversarial_examples(model, forget, steps=2)
