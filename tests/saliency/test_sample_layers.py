"""The Fisher of samples by known functions: exact for each of them, however rows are laid out."""

import pytest
import torch
import torch.nn.functional as F
from sample_models import (
    CLASSES,
    TOKENS,
    ByHand,
    Convolutions,
    OtherRanks,
    PlacesFirst,
    Tied,
    Vision,
    by_loops,
    images,
    sentences,
    tokens_loss,
)
from torch import nn

import sfron_fast as sf

U = 2.0**-24


def channels_last():
    return Convolutions().to(memory_format=torch.channels_last)


def places(length):
    return lambda: sentences(length)


def each_token(length):
    return lambda: sentences(length, TOKENS, each=True)


MODELS = {
    "convolutions": (Convolutions, lambda: images(4, 12, 12), F.cross_entropy),
    "channels last": (channels_last, lambda: images(4, 12, 12), F.cross_entropy),
    "other ranks": (OtherRanks, lambda: images(3, 9), F.cross_entropy),
    "vision": (Vision, lambda: images(3, 8, 8), F.cross_entropy),
    "places first": (PlacesFirst, places(6), F.cross_entropy),
    "as many places as samples": (PlacesFirst, places(4), F.cross_entropy),
    "by hand": (ByHand, lambda: images(6), F.cross_entropy),
    "tied": (lambda: Tied(checkpoints=False), each_token(5), tokens_loss),
    "tied, as many places as samples": (
        lambda: Tied(checkpoints=False),
        each_token(4),
        tokens_loss,
    ),
    "checkpoints": (Tied, each_token(5), tokens_loss),
    "reentrant checkpoints": (lambda: Tied(reentrant=True), each_token(5), tokens_loss),
}


def built(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape), alpha=0.5 if "var" in name else 0.1)
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.checklist("H5")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_each_sample_alone_gives_the_same(name, dtype):
    make, batches, loss = MODELS[name]
    exact = by_loops(built(make), batches(), loss)
    model = built(make).to(dtype)
    inputs = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in batches()]
    found = sf.estimate_fisher(model, inputs, loss)
    assert found.metadata["estimator"] == "sample"
    assert found.metadata["no_gradient"] == []
    relative = 2e-5 if dtype == torch.float32 else 1e-12
    for key, wanted in exact.items():
        # what cancels in a gradient leaves the rounding of its terms: a bias before a softmax
        floor = relative**2 if wanted.max() < 1e-10 else relative * wanted.max()
        torch.testing.assert_close(found[key].double(), wanted, rtol=relative, atol=float(floor))


def test_a_wrong_sum_would_show():
    """The judge of this file tells the squares of the batch's mean, and of tied parts apart."""
    batches = sentences(5, TOKENS, each=True)
    exact = by_loops(built(lambda: Tied(checkpoints=False)), batches, tokens_loss)
    model = built(lambda: Tied(checkpoints=False))
    mean = sf.estimate_fisher(model, batches, tokens_loss, estimator="batch")
    assert (mean["tokens.weight"] - exact["tokens.weight"]).abs().max() > 0.1 * exact[
        "tokens.weight"
    ].max()
    untied = built(lambda: Tied(checkpoints=False))
    untied.head = nn.Parameter(untied.tokens.weight.detach().clone())
    untied.forward = lambda ids: _untied(untied, ids)
    apart = sf.estimate_fisher(untied, batches, tokens_loss)
    wrong = apart["tokens.weight"] + apart["head"]
    right = exact["tokens.weight"]
    assert (wrong - right).abs().max() > 0.01 * right.max()


def _untied(model, ids):
    x = model.tokens(ids) + model.places(torch.arange(ids.shape[1]))
    for block in model.blocks:
        x = x + model._block(block, x)
    return F.linear(model.norm(x), model.head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_fp32(dtype):
    """Gradients of the dtype, squared and added up in fp32: nearer than squares of rounded ones."""
    batches = sentences(5, TOKENS, each=True)
    exact = by_loops(built(lambda: Tied().to(dtype)), batches, tokens_loss)
    found = sf.estimate_fisher(built(Tied).to(dtype), batches, tokens_loss)
    for key, wanted in exact.items():
        assert found[key].dtype == torch.float32
        error = (found[key] - wanted).norm() / wanted.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01), key


def test_autocast():
    model, batches = built(Vision), images(3, 8, 8)
    exact = by_loops(built(Vision), batches)
    with torch.autocast("cpu", torch.bfloat16):
        found = sf.estimate_fisher(model, batches)
    assert found.metadata["estimator"] == "sample"
    for key, wanted in exact.items():
        assert (found[key] - wanted).norm() < 0.1 * wanted.norm() + 1e-9, key


def test_a_sample_alone_has_the_bits_of_its_place():
    """Cut into other batches the same samples are added in the same order."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 6), torch.randint(CLASSES, (24,))
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    whole = sf.estimate_fisher(model, [(x, y)])
    for cut in (1, 5, 12):
        parts = sf.estimate_fisher(model, list(zip(x.split(cut), y.split(cut), strict=True)))
        for name, f in whole.items():
            # the layers' own products may round otherwise in batches of another size
            torch.testing.assert_close(parts[name], f, rtol=64 * U, atol=0)
