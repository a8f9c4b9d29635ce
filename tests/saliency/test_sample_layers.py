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
    SeveralShapes,
    Tied,
    Vision,
    Windows,
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
    "windows first": (Windows, lambda: images(3, 4, 4), F.cross_entropy),
    "several shapes": (SeveralShapes, lambda: images(6), F.cross_entropy),
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


def test_autocast_does_not_round_our_sums():
    """Of a place's row each sample gets the gradient as it is; a tied head's sums are in fp32."""
    batches = sentences(5, TOKENS, each=True)
    model = built(lambda: Tied(checkpoints=False))
    total = torch.zeros_like(model.places.weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = sf.estimate_fisher(model, batches, tokens_loss)
        losses = [
            tokens_loss(model(x[i:][:1]), y[i:][:1]) for x, y in batches for i in range(len(y))
        ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, model.places.weight)
        total += gradient**2 / len(losses)
    torch.testing.assert_close(found["places.weight"], total, rtol=1e-5, atol=1e-9)


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


class Headed(Tied):
    """The loss of every token without its logits."""

    def __init__(self, numbers) -> None:
        super().__init__(checkpoints=False)
        self.numbers = numbers
        self.bias = nn.Parameter(0.1 * torch.randn(TOKENS))

    def forward(self, ids, labels):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = x + self._block(block, x)
        hidden = self.norm(x).flatten(0, 1)
        found = sf.linear_logp(
            hidden, self.tokens.weight, labels.flatten(), bias=self.bias, **self.numbers
        )
        return [part.view(labels.shape) for part in found]


class TokenLoss(sf.Task):
    """The mean over a sample's labelled tokens, and a little of lse^2."""

    def losses(self, model, batch):
        logp, lse = model(*batch)
        counted = (batch[1] != -100).sum(1)
        return (1e-2 * lse**2 - logp).sum(1) / counted


@pytest.mark.parametrize("numbers", [{}, {"softcap": 3.0, "logit_scale": 0.5}], ids=["", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_in_tiles(numbers, dtype, monkeypatch):
    """A tied head whose logits are never all there; tiles of 6 of the 20 tokens."""
    monkeypatch.setattr(sf.ops.linear_tiles, "tile_classes", lambda rows, classes, device: 6)
    batches = sentences(5, TOKENS, each=True)
    for _, labels in batches:
        labels[0, 2:4] = -100
    model, task = built(lambda: Headed(numbers)), TokenLoss()
    exact = built(lambda: Headed(numbers)).double()
    total = {n: torch.zeros_like(p) for n, p in exact.named_parameters()}
    for ids, labels in batches:
        for i in range(len(ids)):
            exact.zero_grad()
            task.losses(exact, (ids[i : i + 1], labels[i : i + 1])).sum().backward()
            for name, p in exact.named_parameters():
                total[name] += p.grad**2 / 6
    found = sf.estimate_fisher(model.to(dtype), batches, task=task)
    assert found.metadata["estimator"] == "sample"
    relative = 2e-5 if dtype == torch.float32 else 1e-12
    for name, wanted in total.items():
        atol = float(relative * wanted.max())
        torch.testing.assert_close(found[name].double(), wanted, rtol=relative, atol=atol)


class SampleBySample(sf.Task):
    """Batches (inputs, labels, teacher's states) [samples, rows, ...]; a call of a head for each
    sample, as these heads return sums.
    """

    teacher = torch.randn(CLASSES, 4, generator=torch.Generator().manual_seed(3))

    def __init__(self, name):
        self.name = name

    def losses(self, model, batch):
        return torch.stack([self.loss(model, *one) for one in zip(*batch, strict=True)])

    def loss(self, model, x, labels, states):
        head, hidden = model[1], model[0](x)
        if self.name == "KL":
            return sf.linear_soft_target_kl(
                hidden, head.weight, states, self.teacher, labels=labels, label_shift=1.0
            )
        one = torch.zeros(len(labels), dtype=torch.int64)
        return sf.linear_adaptive_cross_entropy(hidden, head.weight, labels, sample_index=one).loss


@pytest.mark.parametrize("name", ["KL", "adaptive"])
def test_heads_of_sums_go_through_vmap(name):
    """Named, with gradients of samples: the adaptive one's are those of a mean cross-entropy, made
    by linear_logp.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, CLASSES, bias=False))
    whole = torch.randn(4, 7, 3), torch.randint(CLASSES, (4, 7)), torch.randn(4, 7, 4)
    task = SampleBySample(name)
    batches = [tuple(t[part] for t in whole) for part in (slice(0, 3), slice(3, 4))]
    named = "linear_soft_target_kl" if name == "KL" else "uses that do not add up"
    with pytest.warns(RuntimeWarning, match=rf"1\.weight \({named}\)"):
        found = sf.estimate_fisher(model, batches, task=task, estimator="sample")
    for key, p in model.named_parameters():
        squares = torch.zeros_like(p, dtype=torch.float64)
        for one in zip(*whole, strict=True):
            squares += torch.autograd.grad(task.loss(model, *one), p)[0].double() ** 2 / 4
        assert (found[key] - squares).norm() < 1e-5 * squares.norm(), key
