"""Groups with names, and without decay where it does harm."""

import pytest
import torch
from models import build, random_mask
from torch import nn

import sfron_fast as sf


def names(groups):
    return [[name for name, _ in group["params"]] for group in groups]


def test_biases_and_norms_do_not_decay():
    model = build("bn")
    decayed, plain = sf.no_decay_groups(model, weight_decay=0.3)
    assert names([decayed, plain]) == [
        ["0.weight", "3.weight"],
        ["0.bias", "1.weight", "1.bias", "3.bias"],
    ]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    model[0].weight.requires_grad_(False)
    assert names(sf.no_decay_groups(model)) == [
        ["3.weight"],
        ["0.bias", "1.weight", "1.bias", "3.bias"],
    ]
    assert names(sf.no_decay_groups(nn.LayerNorm(3))) == [["weight", "bias"]]


def test_what_a_model_of_timm_names_does_not_decay():
    class Vit(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
            self.head = nn.Linear(4, 2)

        def no_weight_decay(self):
            return {"pos_embed"}

    assert names(sf.no_decay_groups(Vit())) == [["head.weight"], ["pos_embed", "head.bias"]]


@pytest.mark.parametrize("kind", [sf.SFRonSGD, sf.SFRonAdamW])
def test_a_mask_finds_its_parameters(kind):
    """What unnamed groups are refused for; and the decay reaches matrices alone."""
    model = build()
    optimizer = kind(sf.no_decay_groups(model, 0.5), lr=0.1, saliency=random_mask(model))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.endswith("bias"), name


def test_refusals():
    with pytest.raises(ValueError, match=r"^weight_decay: expected a number"):
        sf.no_decay_groups(build(), -1.0)
    with pytest.raises(ValueError, match=r"^model: expected at least one parameter"):
        sf.no_decay_groups(build().requires_grad_(False))
