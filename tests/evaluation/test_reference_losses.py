"""Losses by the model before unlearning, by sample."""

import pytest
import torch
import torch.nn.functional as F
from models import build, data, loader

import sfron_fast as sf
from sfron_fast.evaluation.reference_losses import ReferenceLosses

X, Y = data(10)


def expected(model):
    with torch.no_grad():
        return F.cross_entropy(model.eval()(X), Y, reduction="none")


class Numbered(sf.Classification):
    """Batches ((inputs, numbers), targets)."""

    def outputs(self, model, batch):
        return model(batch[0][0])


def numbers(batch):
    return batch[0][1]


def test_by_position(tmp_path):
    model = build("dropout").train()
    reference = sf.reference_losses(model, loader(10, 4))
    assert model.training
    assert len(reference) == 10
    order = torch.tensor([7, 0, 9, 7])
    torch.testing.assert_close(reference[order], expected(model)[order])
    assert not reference[order].requires_grad
    torch.save(reference.state_dict(), tmp_path / "saved.pt")
    again = ReferenceLosses.from_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    assert torch.equal(again[order], reference[order])
    again.check(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] += 1
    with pytest.raises(ValueError, match=r"^model: expected the weights the reference"):
        again.check(model)


def test_by_number():
    """In any order of the samples."""
    model = build()
    number = torch.arange(100, 110)
    for order in (torch.arange(10), torch.arange(10).flip(0)):
        batches = [((X[o], number[o]), Y[o]) for o in order.split(3)]
        reference = sf.reference_losses(model, batches, task=Numbered(), ids=numbers)
        torch.testing.assert_close(reference[number], expected(model))
    with pytest.raises(ValueError, match=r"^ids: expected samples of the loader"):
        reference[torch.tensor([100, 99])]
    with pytest.raises(ValueError, match=r"^ids: expected samples of the loader"):
        reference[torch.tensor([110])]
    with pytest.raises(ValueError, match=r"^ids: expected int64"):
        reference[torch.tensor([100.0])]


def test_what_is_refused():
    model = build()
    with pytest.raises(ValueError, match=r"^loader: expected one that does not shuffle"):
        sf.reference_losses(model, loader(10, 4, shuffle=True))
    with pytest.raises(ValueError, match=r"^loader: expected at least one sample"):
        sf.reference_losses(model, [])
    with pytest.raises(ValueError, match=r"^loader: expected samples with finite losses"):
        sf.reference_losses(model, [(X * float("nan"), Y)])
    twice = [((X[:2], torch.tensor([5, 5])), Y[:2])]
    with pytest.raises(ValueError, match=r"^ids: expected each sample once"):
        sf.reference_losses(model, twice, task=Numbered(), ids=numbers)
    short = [((X[:2], torch.tensor([5])), Y[:2])]
    with pytest.raises(ValueError, match=r"^ids: expected int64 \[2\]"):
        sf.reference_losses(model, short, task=Numbered(), ids=numbers)
