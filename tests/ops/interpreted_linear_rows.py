"""The Triton kernels of a tile of logits, run by Triton's interpreter against plain torch.

Not collected by itself: test_linear_rows.py runs it in a process of its own, as the variable has to
be set before Triton is imported.
"""

import math

import pytest
import torch

from sfron_fast.ops import linear_rows
from sfron_fast.ops.triton import linear_kl_rows as kl_kernels
from sfron_fast.ops.triton import linear_moments as moment_kernels
from sfron_fast.ops.triton import linear_rows as kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 32)  # of all launches


def tiles(kind):
    """Tiles of 70 and 33 columns and the labels of 6 rows, of which some lie in none."""
    torch.manual_seed(0)
    made = [torch.randn(6, 70) * 5, torch.randn(6, 33) * 5]
    if kind == "special":
        made[0][0, 3], made[0][1] = math.inf, -math.inf
        made[1][2, 0], made[1][3, 5] = math.nan, -math.inf
        made[1][1, :] = -math.inf
    return made, torch.tensor([3, 101, 70, 5, 69, 400])


def sums(kind, add):
    made, labels = tiles(kind)
    state = [torch.full((6,), -math.inf), torch.zeros(6), torch.zeros(6)]
    start = 0
    for values in made:
        add(values, labels, start, *state)
        start += values.shape[1]
    return state


@pytest.mark.parametrize("kind", ["plain", "special"])
def test_log_sums(kind):
    wanted = sums(kind, linear_rows.add_log_sums)
    found = sums(kind, kernels.linear_log_sums_)
    # a NaN shows in the sums or at the label, whatever the maximum
    broken, seen = (torch.stack(state).isnan().any(0) for state in (wanted, found))
    assert torch.equal(seen, broken)
    assert broken.any() == (kind == "special")
    for got, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(got[~broken], true[~broken], rtol=1e-6, atol=1e-12)


def test_the_values_stay():
    (values, _), labels = tiles("plain")
    before, state = values.clone(), [torch.full((6,), -math.inf), torch.zeros(6), torch.zeros(6)]
    kernels.linear_log_sums_(values, labels, 0, *state)
    assert torch.equal(values, before)


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient(dtype, softcap):
    made, labels = tiles("plain")
    start = 0
    for values in made:
        values = values if softcap is None else values.clamp(-softcap, softcap)
        rows = values.amax(1), torch.randn(6), torch.randn(6)
        wanted, found = (torch.empty_like(values, dtype=dtype) for _ in range(2))
        if dtype == torch.float32:
            found = values  # in place
        arguments = (labels, start, *rows, softcap)
        linear_rows.gradient(values, *arguments, wanted)
        kernels.linear_gradient_(values, *arguments, found)
        # the interpreter cuts bits off where a GPU rounds to bf16
        close = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
        # where the cap is reached, 1 - tanh is a rounding of tanh
        atol = 1e-12 if softcap is None else 1e-6
        torch.testing.assert_close(found, wanted, rtol=close, atol=atol)
        start += values.shape[1]


def test_no_rows():
    empty = torch.empty(0)
    tile, rows = torch.empty(0, 5), (empty, empty, empty)
    kernels.linear_log_sums_(tile, empty.long(), 0, *rows)
    kernels.linear_gradient_(tile, empty.long(), 0, *rows, None, tile)


def moments(kind, add):
    made, labels = tiles(kind)
    state = [torch.full((6,), -math.inf), *(torch.zeros(6) for _ in range(4)), labels * 0]
    start = 0
    for values in made:
        add(values, labels, start, *state)
        start += values.shape[1]
    return state


@pytest.mark.parametrize("kind", ["plain", "special", "equal"])
def test_moments(kind, monkeypatch):
    if kind == "equal":  # the first of the largest
        monkeypatch.setitem(globals(), "tiles", equal_tiles)
    wanted = moments(kind, linear_rows.add_moments)
    found = moments(kind, moment_kernels.linear_moments_)
    broken = torch.stack(wanted[:-1]).isnan().any(0)
    assert broken.any() == (kind == "special")
    assert torch.equal(torch.stack(found[:-1]).isnan().any(0), broken)
    for got, true in zip(found[:-1], wanted[:-1], strict=True):
        torch.testing.assert_close(got[~broken], true[~broken], rtol=1e-5, atol=1e-10)
    assert torch.equal(found[-1][~broken], wanted[-1][~broken])


def equal_tiles(kind):
    made = [torch.zeros(6, 70), torch.zeros(6, 33)]
    made[0][1, [40, 41]], made[1][2, 5], made[1][3, [7, 9]] = 1.0, 2.0, 3.0
    return made, torch.tensor([3, 101, 70, 5, 69, 400])


def kl_sums(kind, add):
    torch.manual_seed(1)
    made, teachers = tiles(kind)[0], [torch.randn(6, 70) * 4, torch.randn(6, 33) * 4]
    teachers[0][4], teachers[0][5, :9], teachers[1][5, 2] = -math.inf, -math.inf, -math.inf
    made[0][5, 4] = -math.inf  # forbidden by both
    state = [torch.full((6,), -math.inf), torch.zeros(6)] * 2 + [torch.zeros(6)]
    state = [t.clone() for t in state]
    for values, teacher in zip(made, teachers, strict=True):
        add(values, teacher, *state)
    return state


@pytest.mark.parametrize("kind", ["plain", "special"])
def test_kl_sums(kind):
    wanted = kl_sums(kind, linear_rows.add_kl_sums)
    found = kl_sums(kind, kl_kernels.linear_kl_sums_)
    broken = torch.stack(wanted).isnan().any(0)
    assert broken.any() == (kind == "special")
    assert torch.equal(torch.stack(found).isnan().any(0), broken)
    for got, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(got[~broken], true[~broken], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kl_gradient(dtype, softcap):
    (values, _), _ = tiles("plain")
    values = values if softcap is None else values.clamp(-softcap, softcap)
    teacher = torch.randn(6, 70) * 4
    rows = [f(t, 1) for t in (values, teacher) for f in (torch.amax, torch.logsumexp)]
    rows[1], rows[3] = rows[1] - rows[0], rows[3] - rows[2]
    wanted = linear_rows.kl_gradient(values.clone(), teacher.clone(), *rows, softcap, dtype)
    found = kl_kernels.linear_kl_gradient(values, teacher, *rows, softcap, dtype)
    assert found.dtype == dtype
    assert (found is values) == (dtype == torch.float32)
    close = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found, wanted, rtol=close, atol=1e-6)
