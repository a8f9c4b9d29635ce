"""Rows of few classes, which the CPU takes 32 at a time: none knows of its neighbours."""

import math

import pytest
import torch
from cases import NATIVE_DTYPES
from row_ops import ADAPTIVE_CROSS_ENTROPY, SOFT_TARGET_KL

from sfron_fast.ops import registry as ops

ROWS = 70  # two whole groups and a part of one
CLASSES = [1, 2, 10, 31, 64, 65]


def kl(logits, teacher, weights):
    """losses [rows], log_sums [rows, 4], gradient [rows, classes]"""
    _, losses, sums = ops.op("soft_target_kl")(logits, teacher, weights, None, None, 2.0)
    one = torch.ones(())
    gradient = ops.op("soft_target_kl_backward")(
        one, logits, teacher, weights, None, None, sums, 2.0
    )
    return losses, sums.T, gradient


def cross_entropy(logits, labels, weights):
    """losses [rows], log_sums [rows, 2], gradient [rows, classes]"""
    rows, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    _, losses, _, _, sums = ops.op("adaptive_cross_entropy")(rows, labels, 0.5, 1e-6, -100)
    backward = ops.op("adaptive_cross_entropy_backward")
    gradient = backward(torch.ones(()), rows, labels, weights, sums, -100)
    return losses, sums[:, :, 0].T, gradient[:, 0]


def inputs(name, classes, dtype):
    torch.manual_seed(classes)
    logits, teacher = (4 * torch.randn(ROWS, classes, dtype=dtype) for _ in range(2))
    weights = torch.rand(ROWS)
    if name == "kl":
        weights[::7] = 0.0
        return kl, [logits, teacher, weights]
    labels = torch.randint(classes, (ROWS,))
    labels[::7] = -100
    return cross_entropy, [logits, labels, weights]


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", ["kl", "cross-entropy"])
def test_a_row_alone_has_the_same_bits(name, classes, dtype):
    run, tensors = inputs(name, classes, dtype)
    together = run(*tensors)
    for row in (0, 1, 31, 32, 63, 64, 69):
        alone = run(*(t[row : row + 1].clone() for t in tensors))
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[row : row + 1], part)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("classes", [2, 10, 64])
@pytest.mark.parametrize("name", ["kl", "cross-entropy"])
def test_what_is_not_finite_stays_in_its_row(name, classes, poison):
    run, tensors = inputs(name, classes, torch.float32)
    clean = run(*tensors)
    tensors[0][37] = poison  # has a weight and a label
    got = run(*tensors)
    others = torch.arange(ROWS) != 37
    for before, after in zip(clean, got, strict=True):
        assert torch.equal(before[others], after[others])
    assert not got[0][37].isfinite()
    assert not got[2][37].isfinite().all()


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_within_the_bounds(classes, dtype):
    for op, shape in (
        (SOFT_TARGET_KL, (ROWS, classes)),
        (ADAPTIVE_CROSS_ENTROPY, (35, 2, classes)),
    ):
        for case in op.full(shape, dtype):
            op.assert_right(case, grad=-1.5)


@pytest.mark.parametrize("margin", [5.0, 20.0, 60.0, 90.0])
def test_the_loss_of_a_remembered_sample_keeps_its_digits(margin):
    """log(1 + e^-margin), of which 1 + e^-margin would have lost all."""
    logits = torch.zeros(40, 2)
    logits[:, 0] = margin
    losses = cross_entropy(logits, torch.zeros(40, dtype=torch.int64), torch.ones(40))[0]
    expected = math.log1p(math.exp(-margin)) if margin < 87 else 0.0
    assert losses.tolist() == pytest.approx([expected] * 40, rel=2e-7, abs=0.0)
