"""Every metric against a literal loop in plain Python; worked examples; what is refused."""

from __future__ import annotations

import builtins
import math

import pytest
import torch
from torch import nn

from sfron_fast import evaluation as ev


def make(logits, labels):
    return ev.Predictions(torch.as_tensor(logits, dtype=torch.float32), torch.as_tensor(labels))


def random_predictions(n, seed, scale=3.0, classes=5):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=g)
    return ev.Predictions(logits, torch.randint(classes, (n,), generator=g))


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [p / math.fsum(powers) for p in powers]


def literal_entropy(p):
    return [-math.fsum(q * math.log(q) for q in softmax(row)) for row in p.logits.tolist()]


def literal_modified_entropy(p):
    scores = []
    for row, y in zip(p.logits.tolist(), p.labels.tolist(), strict=True):
        q = softmax(row)
        score = -(1 - q[y]) * math.log(q[y])
        for i, value in enumerate(q):
            if i != y:
                score -= value * math.log(1 - value)
        scores.append(score)
    return scores


def literal_attack(retain, test, forget):
    """Balanced logistic regression, one feature, C = 1, Newton: % of `forget` called members."""
    half = (len(retain) + len(test)) / 2
    data = [(x, 1.0, half / len(retain)) for x in retain] + [
        (x, 0.0, half / len(test)) for x in test
    ]
    w = b = 0.0
    for _ in range(100):
        gw, gb, hww, hwb, hbb = w, 0.0, 1.0, 0.0, 0.0
        for x, y, c in data:
            s = 1 / (1 + math.exp(-(w * x + b)))
            gw, gb = gw + c * (s - y) * x, gb + c * (s - y)
            k = c * s * (1 - s)
            hww, hwb, hbb = hww + k * x * x, hwb + k * x, hbb + k
        det = hww * hbb - hwb * hwb
        w, b = w - (hbb * gw - hwb * gb) / det, b - (hww * gb - hwb * gw) / det
    return 100 * sum(w * x + b > 0 for x in forget) / len(forget)


def test_accuracy():
    p = make([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 5.0]], [0, 0, 0, 1])
    assert ev.accuracy(p) == 75.0


def test_per_sample_loss():
    p = random_predictions(40, 0)
    literal = [
        -math.log(softmax(r)[y]) for r, y in zip(p.logits.tolist(), p.labels.tolist(), strict=True)
    ]
    assert ev.per_sample_loss(p).tolist() == pytest.approx(literal, rel=1e-12)


def test_per_sample_loss_of_confident_samples_is_small_and_not_zero():
    p = make([[50.0, 0.0], [0.0, 50.0]], [0, 0])
    assert float(nn.functional.cross_entropy(p.logits[:1], p.labels[:1])) == 0.0
    assert ev.per_sample_loss(p).tolist() == pytest.approx([math.exp(-50), 50.0], rel=1e-12)


def test_kl_divergence():
    p, q = random_predictions(30, 1), random_predictions(30, 2)
    q = ev.Predictions(q.logits, p.labels)
    literal = 0.0
    for a, b in zip(p.logits.tolist(), q.logits.tolist(), strict=True):
        for x, y in zip(softmax(a), softmax(b), strict=True):
            literal += x * (math.log(x) - math.log(y)) / 30
    assert ev.kl_divergence(p, q) == pytest.approx(literal, rel=1e-12)
    assert ev.kl_divergence(p, p) == 0.0
    assert ev.kl_divergence(q, p) != pytest.approx(literal, rel=1e-3)


def test_kl_divergence_worked_example_and_direction():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = ln 2 - ln(3) / 2
    half, quarter = make([[0.0, 0.0]], [0]), make([[0.0, math.log(3)]], [0])
    assert ev.kl_divergence(half, quarter) == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    expected = math.log(2) - 0.25 * math.log(4) - 0.75 * math.log(4 / 3)
    assert ev.kl_divergence(quarter, half) == pytest.approx(expected, rel=1e-6)


def test_kl_divergence_of_probabilities_below_the_float32_range_is_finite():
    # One is sure of class 0, the other of class 1: the divergence is the margin.
    p, q = make([[200.0, -200.0]], [0]), make([[-200.0, 200.0]], [0])
    assert ev.kl_divergence(p, q) == pytest.approx(400.0)


@pytest.mark.parametrize("seed", range(20))
def test_kl_divergence_is_not_negative(seed):
    p = random_predictions(8, seed)
    near = ev.Predictions(p.logits + 1e-6 * torch.randn(8, 5), p.labels)
    far = ev.Predictions(random_predictions(8, seed + 100).logits, p.labels)
    assert ev.kl_divergence(p, near) >= 0.0
    assert ev.kl_divergence(p, far) > 0.01


def test_kl_divergence_refuses_other_samples():
    p = random_predictions(6, 0)
    other = ev.Predictions(p.logits, (p.labels + 1) % 5)
    short = ev.Predictions(p.logits[:5], p.labels[:5])
    for wrong in (other, short):
        with pytest.raises(ValueError, match=r"same samples in the same order.*shuffle=False"):
            ev.kl_divergence(p, wrong)


def test_kl_divergence_notices_shuffled_inputs_behind_equal_labels():
    inputs, labels = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    model = nn.Linear(3, 2)
    ordered = ev.predict(model, [(inputs, labels)])
    shuffled = ev.predict(model, [(inputs.flip(0), labels)])
    with pytest.raises(ValueError, match="same samples"):
        ev.kl_divergence(ordered, shuffled)
    parts = ev.predict(model, [(inputs[:3], labels[:3]), (inputs[3:], labels[3:])])
    assert ev.kl_divergence(ordered, parts) == pytest.approx(0.0, abs=1e-9)


def test_entropy():
    p = random_predictions(40, 3)
    assert ev.entropy(p).tolist() == pytest.approx(literal_entropy(p), rel=1e-10)
    assert ev.entropy(make([[0.0] * 4], [0])).item() == pytest.approx(math.log(4))


@pytest.mark.checklist("H6")
def test_modified_entropy():
    p = random_predictions(60, 4)
    assert ev.modified_entropy(p).tolist() == pytest.approx(literal_modified_entropy(p), rel=1e-9)


def test_modified_entropy_worked_example():
    # p = (3/4, 1/4). Right label 0: -(1/4) ln(3/4) - (1/4) ln(3/4). Wrong label 1: -(3/4) ln(1/4)
    # twice.
    p = make([[math.log(3), 0.0]] * 2, [0, 1])
    right, wrong = -0.5 * math.log(0.75), -1.5 * math.log(0.25)
    assert ev.modified_entropy(p).tolist() == pytest.approx([right, wrong], rel=1e-6)


def test_modified_entropy_of_certain_predictions_is_finite_and_exact():
    # Right: both terms are about exp(-2 margin). Wrong: -log p_y - log(1 - p_top) = 2 margin.
    right, wrong = ev.modified_entropy(make([[100.0, 0.0]] * 2, [0, 1])).tolist()
    assert 0.0 <= right < 1e-40
    assert wrong == pytest.approx(200.0)


@pytest.mark.checklist("H6")
def test_modified_entropy_does_not_depend_on_the_batch():
    p = random_predictions(50, 5)
    alone = [ev.Predictions(p.logits[i : i + 1], p.labels[i : i + 1]) for i in range(50)]
    together = ev.modified_entropy(p)
    assert torch.cat([ev.modified_entropy(one) for one in alone]).tolist() == together.tolist()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = ev.modified_entropy(ev.Predictions(p.logits[order], p.labels[order]))
    assert shuffled.tolist() == together[order].tolist()


@pytest.fixture(scope="module")
def sets():
    retain = random_predictions(120, 7, scale=4.0)
    right = ev.Predictions(retain.logits, retain.logits.argmax(1))
    holdout, forget = random_predictions(60, 8, scale=1.5), random_predictions(50, 9, scale=2.5)
    return {"retain": right, "holdout": holdout, "forget": forget}


@pytest.mark.checklist("H6")
def test_mia_entropy(sets):
    expected = literal_attack(*(literal_entropy(p) for p in sets.values()))
    assert 10 < expected < 90
    assert ev.mia_entropy(**sets) == pytest.approx(expected)


@pytest.mark.checklist("H6")
def test_mia_modified_entropy(sets):
    expected = literal_attack(*(literal_modified_entropy(p) for p in sets.values()))
    assert ev.mia_modified_entropy(**sets) == pytest.approx(expected)


@pytest.mark.checklist("H6")
def test_mia_of_forget_samples_that_are_plainly_members_or_not():
    sure, unsure = make([[9.0, 0.0]] * 20, [0] * 20), make([[0.1, 0.0]] * 10, [0] * 10)
    mixed = make([[8.0, 0.0]] * 3 + [[0.2, 0.0]], [0] * 4)
    for attack in (ev.mia_entropy, ev.mia_modified_entropy):
        assert attack(forget=sure, retain=sure, holdout=unsure) == 100.0
        assert attack(forget=unsure, retain=sure, holdout=unsure) == 0.0
        assert attack(forget=mixed, retain=sure, holdout=unsure) == 75.0


@pytest.mark.parametrize("margin", [10.0, 14.0, 18.0])
def test_mia_separates_tiny_entropies(margin):
    # With the default tolerance the solver stops at once and calls nobody a member.
    members = make([[margin + 4, 0.0]] * 30, [0] * 30)
    others = make([[margin, 0.0]] * 30, [0] * 30)
    assert ev.mia_entropy(forget=members, retain=members, holdout=others) == 100.0
    assert ev.mia_entropy(forget=others, retain=members, holdout=others) == 0.0


def test_missing_scikit_learn_names_the_extra(monkeypatch, sets):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install sfron-fast\[eval\]"):
        ev.mia_entropy(**sets)
