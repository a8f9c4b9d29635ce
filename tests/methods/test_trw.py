"""TRW against a literal loop: its tilt, its target and its steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, bits, build, data, loader, same
from torch.utils.data import DataLoader, TensorDataset

from sfron_fast import methods
from sfron_fast.methods.trw import class_tilt

GONE = 2
ROWS = torch.randn(CLASSES, 5, generator=torch.Generator().manual_seed(3))
TILT = {"beta": 3.0, "components": 2, "sharpness": 0.4}


def of_one_class(samples, batch, label=GONE):
    inputs, _ = data(samples, seed=5)
    return DataLoader(TensorDataset(inputs, torch.full((samples,), label)), batch)


def literal_tilt(rows, gone, beta, components, sharpness):
    """From the covariance's eigenvectors, class by class."""
    centred = rows.double() - rows.double().mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -components:]
    places = centred @ axes
    others = [k for k in range(len(rows)) if k != gone]
    angles = {k: F.cosine_similarity(places[k], places[gone], dim=0).item() for k in others}
    powers = {k: math.exp(c / sharpness) for k, c in angles.items()}
    tilt = [beta * powers[k] / sum(powers.values()) if k in powers else -math.inf
            for k in range(len(rows))]  # fmt: skip
    return torch.tensor(tilt, dtype=torch.float64)


@pytest.mark.parametrize("components", [1, 2, 3])
def test_the_tilt_is_the_formula(components):
    settings = TILT | {"components": components}
    found, expected = class_tilt(ROWS, GONE, **settings), literal_tilt(ROWS, GONE, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert abs(found[found.isfinite()].sum().item() - TILT["beta"]) < 1e-9


def test_all_components_are_the_rows_themselves():
    found = class_tilt(ROWS, GONE, beta=1.0, sharpness=0.5)
    cosines = F.cosine_similarity(ROWS - ROWS.mean(0), (ROWS - ROWS.mean(0))[GONE], dim=1)
    cosines[GONE] = -torch.inf
    kept = torch.arange(CLASSES) != GONE
    torch.testing.assert_close(found[kept].float(), (cosines / 0.5).softmax(0)[kept])


def target(logits, tilt):
    """p~ from the probabilities of the model before."""
    weighted = logits.double().softmax(1) * torch.where(tilt == -torch.inf, 0.0, tilt.exp())
    return weighted / weighted.sum(1, keepdim=True)


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_it_is_the_literal_loop(beta):
    found, expected = build("bn"), build("bn")
    teacher = copy.deepcopy(expected).eval()
    forget, retain = of_one_class(11, 4), loader(26, 8, seed=6)
    settings = TILT | {"beta": beta}
    methods.trw(
        found, forget=forget, retain=retain, forgotten=GONE, rows=ROWS, retain_weight=0.5,
        epochs=2, lr=0.05, **settings
    )  # fmt: skip

    tilt = literal_tilt(ROWS, GONE, **settings)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    expected.train()
    kept = [*retain, *retain]  # in turn, from where the epoch before ended
    for _ in range(2):
        for x, _ in forget:
            optimizer.zero_grad()
            with torch.no_grad():
                p = target(teacher(x), tilt)
            entropy = torch.where(p > 0, p * p.log(), 0.0).sum(1)
            cross = -torch.where(p > 0, p * expected(x).double().log_softmax(1), 0.0).sum(1)
            (entropy + cross).mean().backward()
            xr, yr = kept.pop(0)
            (0.5 * F.cross_entropy(expected(xr), yr)).backward()
            optimizer.step()
        schedule.step()
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_class_goes_and_the_others_share_it_as_the_target_says():
    model = build()
    forget, retain = of_one_class(8, 8), loader(26, 8, seed=6)
    x = forget.dataset.tensors[0]
    wanted = target(model(x).detach(), literal_tilt(ROWS, GONE, **TILT))
    far = (model(x).softmax(1) - wanted).abs().sum(1).mean()
    sets = {"forget": forget, "retain": retain, "forgotten": GONE, "rows": ROWS}
    methods.trw(model, **sets, **TILT, retain_weight=0.0, epochs=200, lr=0.1)
    near = (model(x).softmax(1) - wanted).abs().sum(1).mean()
    assert near < 0.1 * far
    assert (model(x).argmax(1) != GONE).all()


def test_class_means():
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 0, 2, 2, 1])
    means = [features[labels == k].double().mean(0) for k in range(3)]
    torch.testing.assert_close(methods.class_means(features, labels), torch.stack(means))


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("forget", {"forget": []}),
        ("forget", {"forget": of_one_class(4, 4, label=1)}),
        ("retain", {"retain": []}),
        ("forgotten", {"forgotten": CLASSES}),
        ("rows", {"rows": ROWS[:3]}),
        ("rows", {"rows": ROWS[0]}),
        ("rows", {"rows": ROWS[:2]}),
        ("rows", {"rows": ROWS.log()}),
        ("beta", {"beta": -1.0}),
        ("components", {"components": CLASSES}),
        ("sharpness", {"sharpness": 0.0}),
        ("retain_weight", {"retain_weight": -1.0}),
        ("epochs", {"epochs": 0}),
        ("lr", {"lr": float("nan")}),
    ],
)
def test_bad_input_is_named_and_nothing_moves(argument, changes):
    model = build("bn")
    before = bits(model)
    given = {"forget": of_one_class(4, 4), "retain": loader(8, 4), "forgotten": GONE, "rows": ROWS}
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        methods.trw(model, **given | changes)
    assert same(bits(model), before)


@pytest.mark.parametrize(
    ("argument", "features", "labels"),
    [
        ("features", torch.ones(3), torch.zeros(3, dtype=torch.int64)),
        ("features", torch.ones(3, 2), torch.zeros(2, dtype=torch.int64)),
        ("labels", torch.ones(2, 2), torch.tensor([0, 2])),
    ],
)
def test_class_means_refuses(argument, features, labels):
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        methods.class_means(features, labels)
