"""Ferrari: sensitivity and step against the formula written out, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfron_fast import methods
from sfron_fast.methods.ferrari import perturbations, sensitivity

FEATURE = torch.zeros(1, 4, 4, dtype=torch.bool)
FEATURE[:, :2, 1:3] = True
SIGMAS = (0.1, 0.5)
DRAWS, SAMPLES = 3, 5


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4)
    return nn.Sequential(*layers).double()


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (count,), generator=generator)


def draw(x, seed=1, draws=DRAWS):
    return perturbations(x, FEATURE, draws, SIGMAS, torch.Generator().manual_seed(seed))


def literal(model, x, noise, detached):
    """s of each sample, one pass of the model at a time."""
    found = []
    for sample in range(len(x)):
        clean, ratios = model(x[sample : sample + 1]), []
        for d in noise[:, sample]:
            moved = model((x[sample] + d).unsqueeze(0))
            moved = moved.detach() if detached else moved
            ratios.append((clean - moved).square().sum().sqrt() / d.square().sum().sqrt())
        found.append(sum(ratios) / len(ratios))
    return torch.stack(found)


@pytest.mark.parametrize("detached", [False, True])
def test_sensitivity_is_the_formula_and_so_is_its_gradient(detached):
    model, (x, _) = network().eval(), images(SAMPLES, 2)
    noise = draw(x)
    grads, values = [], []
    for s in (
        sensitivity(model, x, noise, through_perturbed=not detached),
        literal(model, x, noise, detached),
    ):
        values.append(s.detach())
        grads.append(torch.autograd.grad(s.mean(), list(model.parameters())))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)


def test_noise_is_on_the_feature_and_of_a_sigma_in_the_range():
    x, _ = images(400, 3)
    noise = draw(x, draws=20)
    assert (noise[..., ~FEATURE] == 0).all()
    inside = noise[..., FEATURE]
    assert inside.shape == (20, 400, 4)
    assert (inside != 0).all()
    # E sigma^2 of a uniform sigma
    expected = (SIGMAS[0] ** 2 + SIGMAS[0] * SIGMAS[1] + SIGMAS[1] ** 2) / 3
    assert inside.square().mean().item() == pytest.approx(expected, rel=0.05)
    # one sigma for each draw and sample: what they share, squares of coordinates correlate
    squares = inside.flatten(0, 1).square()
    assert torch.corrcoef(squares.T)[0, 1] > 0.1
    assert torch.equal(noise, draw(x, draws=20))


@pytest.mark.parametrize("retain", [True, False])
def test_a_step_is_descent_on_sensitivity_and_cross_entropy(retain):
    found, expected = network().train(), network().eval()
    batches = [images(SAMPLES, 4), images(SAMPLES, 5)]
    kept = [images(6, 6), images(6, 7)]
    methods.ferrari(
        found,
        forget=batches,
        feature=FEATURE,
        retain=kept if retain else None,
        retain_weight=2.0,
        draws=DRAWS,
        sigmas=SIGMAS,
        seed=9,
        lr=0.05,
        momentum=0.0,
    )
    assert found.training  # as it was, though the steps ran in eval mode
    generator = torch.Generator().manual_seed(9)
    for (x, _), (kept_x, kept_y) in zip(batches, kept, strict=True):
        noise = perturbations(x, FEATURE, DRAWS, SIGMAS, generator)
        loss = literal(expected, x, noise, False).mean()
        if retain:
            loss = loss + 2.0 * F.cross_entropy(expected(kept_x), kept_y)
        grads = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for p, g in zip(expected.parameters(), grads, strict=True):
                p -= 0.05 * g
    torch.testing.assert_close(dict(found.named_parameters()), dict(expected.named_parameters()))


def test_an_output_that_does_not_move_has_a_gradient():
    """Where f(x) = f(x + d) the norm's is 0, not NaN."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    nn.init.zeros_(model[1].weight)
    x = images(2, 8)[0].float()
    methods.ferrari(model, forget=[(x, torch.zeros(2))], feature=FEATURE, lr=0.1)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("feature", {"feature": FEATURE.float()}),
        ("feature", {"feature": torch.zeros_like(FEATURE)}),
        ("feature", {"feature": FEATURE[0]}),
        ("draws", {"draws": 0}),
        (r"sigmas\[0\]", {"sigmas": (0.0, 1.0)}),
        (r"sigmas\[1\]", {"sigmas": (0.5, 0.1)}),
        ("retain_weight", {"retain_weight": -1.0}),
        ("forget", {"forget": []}),
        ("retain", {"retain": []}),
        ("lr", {"lr": float("nan")}),
        ("epochs", {"epochs": 0}),
    ],
)
def test_bad_input_is_named_and_nothing_moves(argument, changes):
    model = network()
    before = copy.deepcopy(model.state_dict())
    settings = {"forget": [images(4, 1)], "feature": FEATURE, "retain": [images(4, 2)], **changes}
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        methods.ferrari(model, **settings)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
