"""``linear_logp_stats`` against all logits in fp64."""

import math

import pytest
import torch
from head_cases import error, head_case, remembered_case, small_tiles

import sfron_fast as sf
from sfron_fast.ops import linear_rows
from sfron_fast.ops.linear_logp_stats import formula

SETTINGS = {
    "plain": {},
    "flat": {"size": 0.02, "bias": False},
    "both": {"softcap": 3.0, "logit_scale": 0.25},
    "large": {"size": 2500.0},
    "one class": {"classes": 1},
    "one token": {"rows": 1, "ignored": 0},
    "no token": {"rows": 3, "ignored": 1},
}


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    small_tiles(monkeypatch)


def run(case, function=sf.linear_logp_stats):
    return function(case.hidden, case.weight, case.labels, bias=case.bias, **case.numbers)


def truth(case):
    given = case.to(torch.float64)
    return formula(
        given.hidden, given.weight, given.labels, given.bias, *given.numbers.values(), -100
    )


def assert_right(case, tolerance):
    wanted, found = truth(case), run(case)
    assert torch.equal(found.correct, wanted.correct)
    for name in ("logp", "entropy", "variance"):
        got, true = getattr(found, name), getattr(wanted, name)
        assert got.isfinite().all(), name
        assert ((got - true).abs() <= tolerance * (1e-2 + true.abs())).all(), name


@pytest.mark.parametrize("name", SETTINGS)
def test_fp64(name):
    assert_right(
        head_case(dtype=torch.float64, **SETTINGS[name]), 1e-9 if name == "large" else 1e-12
    )


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "large"])
def test_fp32(name):
    assert_right(head_case(**SETTINGS[name]), 2e-5)


@pytest.mark.parametrize("loss", [1e-2, 1e-5, 1e-7])
def test_remembered_tokens(loss):
    """Entropy and variance of the little that is left, to fp32's digits."""
    case = remembered_case(loss, 0.0)
    wanted, found = truth(case), run(case)
    assert found.correct.all()
    for name in ("logp", "entropy", "variance"):
        assert error(getattr(found, name), getattr(wanted, name)) < 1e-5, name


def test_hand_example():
    """p = 1/4, 3/4 and the likelier is the label: its log p has mean -H and variance p q ln^2 3."""
    weight = torch.tensor([[0.0], [math.log(3)]])
    found = sf.linear_logp_stats(torch.ones(2, 1), weight, torch.tensor([1, 0]))
    assert found.correct.tolist() == [True, False]
    assert found.logp.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)])
    assert found.entropy.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2)
    assert found.variance.tolist() == pytest.approx([3 / 16 * math.log(3) ** 2] * 2)


def test_the_first_of_equals_is_the_argmax():
    labels = torch.tensor([2, 150, 70])
    weight = torch.zeros(203, 1)
    weight[[70, 150]] = 1.0
    assert sf.linear_logp_stats(torch.ones(3, 1), weight, labels).correct.tolist() == [
        False,
        False,
        True,
    ]


def test_forbidden_classes():
    """A bias of -inf: no part in entropy and variance, not NaN."""
    case = head_case(classes=200)
    case.bias[::3] = -torch.inf
    case.bias[case.labels.clamp_min(0)] = 0.0
    assert_right(case, 2e-5)


def test_the_judge_catches_sums_that_are_not_moved(monkeypatch):
    relative = linear_rows.relative

    def unmoved(*arguments):
        rescaled, moved = relative(*arguments)
        return rescaled, 0.0 * moved

    monkeypatch.setattr(linear_rows, "relative", unmoved)
    with pytest.raises(AssertionError):
        assert_right(head_case(), 2e-5)


def test_opcheck_and_compile():
    case = head_case(7, 5, 70, ignored=3)
    arguments = (case.hidden, case.weight, case.labels, case.bias, 3.0, 0.5, -100)
    torch.library.opcheck(torch.ops.sfron_fast.linear_logp_stats.default, arguments)
    compiled = torch.compile(sf.linear_logp_stats, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(case), run(case, compiled), strict=True):
        assert torch.equal(one, other)


def test_no_gradient():
    case = head_case()
    case.weight.requires_grad_()
    assert not any(t.requires_grad for t in run(case))
