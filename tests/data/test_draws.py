"""Keyed random numbers: of the right distribution, and a function of their key alone."""

import math

import pytest
import torch

from sfron_fast.data.draws import normal, sample_keys, uniform

KNOWN = [1495931545459536284, -1974045394443541336]
NUMBERS = [0.6855375, 2.2449832, -0.5438737]


def keys(count, *name):
    return sample_keys(torch.arange(count), *name)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4, 5)])
def test_a_sample_has_its_numbers_in_any_batch(shape):
    whole = normal(keys(9, "a"), shape)
    for rows in ([4], [8, 0], [1, 3, 5, 7]):
        alone = sample_keys(torch.tensor(rows), "a")
        assert torch.equal(normal(alone, shape), whole[rows])
        assert torch.equal(uniform(alone, 5), uniform(keys(9, "a"), 5)[rows])


def test_names_and_samples_do_not_meet():
    found = torch.cat([keys(1000, name, i) for name in ("a", "b") for i in range(3)])
    assert found.unique().numel() == found.numel()


def test_moments_of_normal_numbers():
    """Within five standard errors of those of N(0, 1), over samples and along each of them."""
    x = normal(keys(400, "moments"), (1000,)).double()
    n = x.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - expected) < 5 * math.sqrt(variance / n)
    assert x.isfinite().all()
    for other in (x.roll(1, 0), x.roll(1, 1), x.roll(500, 1)):
        assert abs((x * other).mean()) < 5 / math.sqrt(n)


def test_uniform_numbers_fill_the_interval():
    u = uniform(keys(200, "u"), 1000)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    chi = ((counts - 4000).square() / 4000).sum()
    assert chi < 49 + 5 * math.sqrt(2 * 49)


def test_known_numbers():
    """The bits must stay: runs are resumed across versions."""
    assert keys(2, "x", 1).tolist() == KNOWN
    assert normal(keys(1, "x", 1), (3,))[0].tolist() == pytest.approx(NUMBERS, abs=1e-6)
