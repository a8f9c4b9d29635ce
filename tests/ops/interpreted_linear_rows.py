"""The Triton kernels of a tile of logits, run by Triton's interpreter against plain torch.

Not collected by itself: test_linear_rows.py runs it in a process of its own, as the variable has to
be set before Triton is imported.
"""

import math

import pytest
import torch

from sfron_fast.ops import linear_rows
from sfron_fast.ops.triton import linear_rows as kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 32)


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
        add(values, labels, start, *state, False)
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
    kernels.linear_log_sums_(values, labels, 0, *state, True)
    assert torch.equal(values, before)


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient(dtype, softcap):
    made, labels = tiles("plain")
    start = 0
    for values in made:
        values = values if softcap is None else values.clamp(-softcap, softcap)
        rows = values.amax(1), torch.randn(6), torch.randn(6)
        arguments = (labels, start, *rows, softcap, dtype)
        wanted = linear_rows.gradient(values.clone(), *arguments)
        found = kernels.linear_gradient(values, *arguments)
        assert found.dtype == dtype
        # the interpreter cuts bits off where a GPU rounds to bf16
        close = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
        # where the cap is reached, 1 - tanh is a rounding of tanh
        atol = 1e-12 if softcap is None else 1e-6
        torch.testing.assert_close(found, wanted, rtol=close, atol=atol)
        assert (found is values) == (dtype == torch.float32)
        start += values.shape[1]


def test_no_rows():
    empty = torch.empty(0)
    kernels.linear_log_sums_(torch.empty(0, 5), empty.long(), 0, empty, empty, empty, False)
    found = kernels.linear_gradient(
        torch.empty(0, 5), empty.long(), 0, empty, empty, empty, None, torch.float32
    )
    assert found.shape == (0, 5)
