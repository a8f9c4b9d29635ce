"""The training that demonstrations share."""

import pytest
import torch
from torch import nn

from examples.systems.training import fit


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])  # 0.1 of ten is one step
def test_few_steps_are_enough(steps):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    inputs = torch.randn(8, 3)
    first = model(inputs).square().mean().item()
    last = fit(model, [inputs], steps, 1e-2, loss=lambda x: model(x).square().mean())
    assert model(inputs).square().mean().item() < first
    assert last <= first
    assert not model.training
