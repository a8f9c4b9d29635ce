"""What comes back by relearning and by quantisation: attacks on copies."""

import copy

import pytest
import torch
from models import same
from torch import nn

from sfron_fast.evaluation.quantisation import quantised, to_integers
from sfron_fast.evaluation.relearning import relearned
from sfron_fast.tasks import Task


class Squares(Task):
    def losses(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().flatten(1).sum(1)


def batches(count):
    return [{"x": torch.randn(4, 3), "y": torch.randn(4, 2)} for _ in range(count)]


def test_relearning_by_a_literal_loop():
    """Two batches over and over, all weights, though one is frozen in the model."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 2)).eval()
    model[0].weight.requires_grad_(False)
    before, data = copy.deepcopy(model), batches(2)
    with torch.no_grad():
        found = relearned(model, data, steps=3, lr=0.01, task=Squares())
    wanted = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=0.01, weight_decay=0.0)
    for batch in (*data, data[0]):
        optimizer.zero_grad()
        Squares().losses(wanted, batch).mean().backward()
        optimizer.step()
    assert same(dict(found.named_parameters()), dict(wanted.named_parameters()))
    assert same(dict(model.named_parameters()), dict(before.named_parameters()))
    assert not found.training
    assert not model[0].weight.requires_grad


def test_relearning_refuses():
    model = nn.Linear(3, 2)
    for words, given in {
        "steps: expected an integer >= 1": {"steps": 0, "lr": 0.1},
        "lr: expected a number": {"steps": 1, "lr": 0.0},
        "batches: expected at least one": {"steps": 1, "lr": 0.1, "batches": []},
        "lr: expected finite losses": {"steps": 9, "lr": 1e20},
    }.items():
        data = given.pop("batches", batches(1))
        with pytest.raises(ValueError, match=words):
            relearned(model, data, task=Squares(), **given)


def test_integers_by_hand():
    """Three bits: -3 to 3. The first row's step is 1, the second's 0.5, the third is empty."""
    weight = torch.tensor([[3.0, 1.4, -1.6], [-1.5, 0.3, 0.2], [0.0, 0.0, 0.0]])
    integers, scales = to_integers(weight, 3)
    assert integers.tolist() == [[3, 1, -2], [-3, 1, 0], [0, 0, 0]]
    assert scales.tolist() == [[1.0], [0.5], [0.0]]


def test_what_is_quantised():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = quantised(model, 4)
    assert found[2].weight is found[0].weight
    assert not found.training
    assert model.training
    assert same(model.state_dict(), before)
    weight, rounded = model[0].weight.detach(), found[0].weight.detach()
    steps = weight.abs().amax(1, keepdim=True) / 7
    assert ((weight - rounded).abs() <= steps * 0.5001).all()
    assert all(len(row.unique()) <= 15 for row in rounded)
    assert same(dict(found[1].named_parameters()), dict(model[1].named_parameters()))
    torch.testing.assert_close(quantised(model, 8)[0].weight, weight, atol=0.01, rtol=0)
    torch.testing.assert_close(
        quantised(found, 4)[0].weight, found[0].weight
    )  # it is there already


def test_what_hides_between_the_integers_comes_back():
    """The positive control: weights that differ, within half a step, are the same weights after."""
    known, hidden = nn.Linear(16, 8), nn.Linear(16, 8)
    integers, scales = to_integers(known.weight, 4)
    moved = (torch.rand(8, 16) - 0.5) * 0.98
    moved[integers.abs() == 7] = 0.0  # the largest fix the scale
    with torch.no_grad():
        hidden.weight.copy_((integers + moved) * scales)
    assert not torch.equal(hidden.weight, known.weight)
    torch.testing.assert_close(quantised(hidden, 4).weight, quantised(known, 4).weight)


def test_quantisation_refuses():
    with pytest.raises(ValueError, match="bits: expected 2 to 8, found 9"):
        quantised(nn.Linear(2, 2), 9)
    with pytest.raises(ValueError, match="two dimensions"):
        quantised(nn.LayerNorm(2), 8)
