"""Weights of published forget losses, against the gradients of these losses written out; fp64."""

import pytest
import torch
import torch.nn.functional as F

import sfron_fast as sf

SEQUENCES, TOKENS, CLASSES = 5, 7, 11
LENGTHS = torch.tensor([7, 3, 1, 5, 6])
LABELLED = torch.arange(TOKENS) < LENGTHS[:, None]


def logits(scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SEQUENCES, TOKENS, CLASSES, generator=generator, dtype=torch.float64)
    return (scale * x).requires_grad_()


LABELS = torch.randint(CLASSES, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(9))


def logp(x):
    """[sequences, tokens]"""
    return x.log_softmax(2).gather(2, LABELS[..., None])[..., 0]


def sums(x):
    """log p of whole sequences [sequences]."""
    return (logp(x) * LABELLED).sum(1)


REFERENCE = sums(logits(seed=1)).detach()


def without_label(x):
    """CE-U's target: the softmax where the label's logit is -inf."""
    return x.detach().scatter(2, LABELS[..., None], -torch.inf).softmax(2)


def wga(x):
    return (logp(x).detach().exp() ** 0.7 * logp(x))[LABELLED].mean()


def satimp(x):
    p = logp(x).detach().exp()
    return (p**5 * (1 - p) ** 0.5 * logp(x))[LABELLED].mean()


def ceu(x):
    return -(without_label(x) * x.log_softmax(2)).sum(2)[LABELLED].mean()


def npo(x):
    return (-2 / 0.1 * F.logsigmoid(-0.1 * (sums(x) - REFERENCE))).mean()


def simnpo(x):
    return (-2 / 2.5 * F.logsigmoid(-2.5 / LENGTHS.double() * sums(x) - 0.3)).mean()


TOKEN = [
    (wga, lambda losses: sf.wga_weights(losses, 0.7)),
    (satimp, lambda losses: sf.satimp_weights(losses, 5.0, 0.5)),
    (ceu, sf.ceu_weights),
]
SEQUENCE = [
    (npo, lambda losses: sf.npo_weights(losses, -REFERENCE)),
    (simnpo, lambda losses: sf.simnpo_weights(losses, LENGTHS, 2.5, 0.3)),
]


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def agrees(found, expected):
    assert expected.abs().max() > 1e-7  # 1e-14 is small beside it
    assert float((found - expected).abs().max()) <= 1e-14


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize(("published", "weigh"), TOKEN)
def test_tokens(published, weigh, scale):
    x = logits(scale)
    losses = -logp(x)[LABELLED]
    weights = weigh(losses)
    assert weights.dtype == torch.float64
    assert not weights.requires_grad
    agrees(gradient(-(weights * losses).sum() / LABELLED.sum(), x), gradient(published(x), x))


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize(("published", "weigh"), SEQUENCE)
def test_sequences(published, weigh, scale):
    x = logits(scale)
    losses = -sums(x)
    weights = weigh(losses)
    assert weights.shape == (SEQUENCES,)
    assert not weights.requires_grad
    agrees(gradient(-(weights * losses).sum() / SEQUENCES, x), gradient(published(x), x))


def test_pairs():
    x, y = logits(seed=2), logits(seed=3)
    other = sums(logits(seed=4)).detach()
    ratios = (sums(x) - REFERENCE) - (sums(y) - other)
    published = -F.logsigmoid(0.1 * ratios).mean()
    w = sf.dpo_weights(-sums(x), -sums(y), -REFERENCE, -other)
    own = (-(w * sums(x)).sum() + (w * sums(y)).sum()) / SEQUENCES
    for found, expected in zip(
        torch.autograd.grad(own, [x, y]), torch.autograd.grad(published, [x, y]), strict=True
    ):
        agrees(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_remembered_has_finite_weights(dtype):
    """p / (1 - p) of fp32 is infinite from a margin of 17 on, and wrong by far from 14."""
    margins = torch.tensor([0.0, 5.0, 14.0, 15.0, 16.0, 20.0, 90.0, 1000.0], dtype=dtype)
    x = torch.stack([margins, torch.zeros_like(margins)], 1).requires_grad_()
    for weigh in (sf.wga_weights, sf.satimp_weights, sf.ceu_weights):
        losses = F.cross_entropy(x, torch.zeros(len(x), dtype=torch.long), reduction="none")
        weights = weigh(losses)
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        found = gradient((weights * losses).sum(), x)
        assert found.isfinite().all()
        assert found.abs().max() < 1.2 or dtype == torch.bfloat16
    exact = torch.log1p(torch.exp(-margins.double())).to(torch.float32)
    odds = sf.ceu_weights(exact)[:5]
    torch.testing.assert_close(odds.double(), margins[:5].double().exp(), rtol=1e-5, atol=0)


def test_from_hidden_states():
    """The head's losses are of rows, or means of sequences."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(SEQUENCES, TOKENS, 4, generator=generator, dtype=torch.float64)
    hidden.requires_grad_()
    head = torch.randn(CLASSES, 4, generator=generator, dtype=torch.float64)
    labels = LABELS.masked_fill(~LABELLED, -100).flatten()
    index = torch.arange(SEQUENCES).repeat_interleave(TOKENS)

    def mean_rule(losses, part):
        lengths = LENGTHS[part]
        return sf.npo_weights(losses * lengths, -REFERENCE[part]) * lengths

    def token_rule(losses, part):
        return sf.ceu_weights(losses)

    for rule, sample_index, count, published in (
        (mean_rule, index, SEQUENCES, npo),
        (token_rule, None, LABELLED.sum(), ceu),
    ):
        loss = sf.linear_adaptive_cross_entropy(
            hidden.flatten(0, 1),
            head,
            labels,
            sample_index=sample_index,
            weigh=rule,
            normalise=False,
        ).loss
        agrees(gradient(-loss / count, hidden), gradient(published(hidden @ head.T), hidden))


def test_ceiling():
    losses = torch.tensor([0.1, 0.79, 0.8, 3.0, float("nan")])
    weights = sf.adaptive_weights(losses[:4])
    found = sf.with_ceiling(weights, losses[:4], 0.5, 1.6)
    assert torch.equal(found[:2], weights[:2])  # not divided again
    assert found[2:].tolist() == [0.0, 0.0]
    assert torch.equal(sf.with_ceiling(weights, losses[:4], 0.5, torch.full((4,), 1.6)), found)
    assert sf.with_ceiling(torch.ones(5), losses, 0.5, 1.6)[4] == 1.0


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("losses", lambda x: sf.wga_weights(x[None])),
        ("losses", lambda x: sf.satimp_weights(x.long())),
        ("alpha", lambda x: sf.wga_weights(x, -1.0)),
        ("beta1", lambda x: sf.satimp_weights(x, -1.0)),
        ("beta2", lambda x: sf.satimp_weights(x, 1.0, float("nan"))),
        ("floor", lambda x: sf.ceu_weights(x, 0.0)),
        ("reference", lambda x: sf.npo_weights(x, x[:1])),
        ("reference", lambda x: sf.npo_weights(x, 1.0)),
        ("beta", lambda x: sf.npo_weights(x, x, 0.0)),
        ("lengths", lambda x: sf.simnpo_weights(x, x[:1])),
        ("gamma", lambda x: sf.simnpo_weights(x, x, 1.0, -1.0)),
        ("other", lambda x: sf.dpo_weights(x, x[:1], x, x)),
        ("other_reference", lambda x: sf.dpo_weights(x, x, x, x[:1])),
        ("weights", lambda x: sf.with_ceiling(x[:1], x, 1.0, 1.0)),
        ("ceiling", lambda x: sf.with_ceiling(x, x, 0.0, 1.0)),
        ("reference", lambda x: sf.with_ceiling(x, x, 1.0, -1.0)),
        ("reference", lambda x: sf.with_ceiling(x, x, 1.0, x[:1])),
    ],
)
def test_bad_input(argument, call):
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        call(torch.ones(3))
