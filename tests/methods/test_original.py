"""The model as it was: weights, and what passes in train mode change beside them."""

import pytest
import torch
from models import bits, build, data, same

from sfron_fast.methods.descent import teach
from sfron_fast.methods.original import Original
from sfron_fast.tasks import Classification

X, Y = data(16, seed=1)


@pytest.mark.parametrize("kind", ["plain", "bn"])
def test_a_teacher_says_what_it_said_before(kind):
    model = build(kind)
    task = Classification()
    before, original = teach(model, (X, Y), task), Original(model)
    model.train()(3.0 * X + 1.0).sum().backward()  # of BatchNorm also the running statistics
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.1)
    assert not torch.equal(teach(model, (X, Y), task), before)
    moved = bits(model)
    with original.weights(model):
        assert torch.equal(teach(model, (X, Y), task), before)
    assert same(bits(model), moved)


def test_the_model_is_as_it_is_after_an_error():
    model = build("bn")
    original = Original(model)
    model.train()(X)
    moved = bits(model)
    with pytest.raises(KeyboardInterrupt), original.weights(model):
        _stopped(model, moved)
    assert same(bits(model), moved)


def _stopped(model, moved):
    assert not same(bits(model), moved)
    raise KeyboardInterrupt
