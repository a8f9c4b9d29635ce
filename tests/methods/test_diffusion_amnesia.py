"""SA of a diffusion model against its loop, written out; what is drawn is the task's."""

import pytest
import torch
from denoisers import FEATURES, KEPT, NULL, denoiser, images

from sfron_fast import Classification, Denoising, Surrogate, methods

CPU, WIDE = torch.device("cpu"), torch.float64
FORGET = [images(5, WIDE, 11, label=1), images(3, WIDE, 12, label=1)]
RETAIN = [images(6, WIDE, seed) for seed in (21, 22, 23)]
DRAWS, EPOCHS, PENALTY, LR = 3, 3, 40.0, 1e-2


def task(**settings):
    return Denoising(KEPT, null=NULL, **{"drop": 0.3, "instead": Surrogate(), **settings})


def errors(model, x0, batch, total):
    """Squared errors of the noise [samples], of images ``x0`` noised as the batch says."""
    kept, noise = KEPT[batch["t"]].unsqueeze(1), batch["noise"].double()
    noisy = kept.sqrt() * x0 + (1 - kept).sqrt() * noise
    each = (model(noisy, batch["t"], class_labels=batch["condition"]) - noise) ** 2
    return each.sum(1) if total else each.mean(1)


def literal_fisher(model, total):
    """Of each draw of each retain sample, by its own backward pass."""
    fisher, one = [torch.zeros_like(p) for p in model.parameters()], task()
    with one.estimating(0, 1):
        for pair in RETAIN:
            for _ in range(DRAWS):
                batch = one.prepare(pair, CPU, "loader")
                for loss in errors(model, batch["x0"], batch, total):
                    model.zero_grad()
                    loss.backward(retain_graph=True)
                    for f, p in zip(fisher, model.parameters(), strict=True):
                        f += p.grad**2 / (18 * DRAWS)
    return fisher


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_amnesia_is_the_loop(reduction):
    total = reduction == "sum"
    ours, theirs = denoiser(WIDE), denoiser(WIDE)
    methods.selective_amnesia(
        ours,
        forget=FORGET,
        retain=RETAIN,
        task=task(reduction=reduction),
        penalty=PENALTY,
        draws=DRAWS,
        epochs=EPOCHS,
        lr=LR,
        optimizer="adamw",
        weight_decay=0.0,
        cosine=False,
        max_norm=1.0,
    )
    fisher = literal_fisher(theirs, total)
    start = [p.detach().clone() for p in theirs.parameters()]
    adam, one, seen = torch.optim.Adam(theirs.parameters(), lr=LR), task(), []
    anchors = []
    for step in range(EPOCHS * len(RETAIN)):
        kept = one.prepare(RETAIN[step % 3], CPU, "retain")
        gone = one.prepare(FORGET[step % 2], CPU, "forget")
        assert (gone["condition"] == 1).all()
        surrogate = gone["alternative"].double()
        seen.append(surrogate)
        anchor = sum(
            (f * (p - s) ** 2).sum()
            for f, p, s in zip(fisher, theirs.parameters(), start, strict=True)
        )
        anchors.append(PENALTY / 2 * float(anchor))
        loss = errors(theirs, kept["x0"], kept, total).mean()
        loss = loss + errors(theirs, surrogate, gone, total).mean() + PENALTY / 2 * anchor
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adam.step()
    for a, b, s in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert (b - s).abs().max() > 1e-3
    assert max(anchors) > 1e-3  # it had a say
    every = torch.cat(seen)
    assert every.unique().numel() == every.numel()  # others in every step
    assert every.abs().max() <= 1


def test_the_surrogate_is_even():
    x0, labels = images(4000)
    found = task().prepare((x0, labels), CPU, "forget")["alternative"]
    assert found.shape == (4000, FEATURES)
    quarters = torch.histc(found, 4, -1.0, 1.0) / found.numel()
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), rtol=0, atol=0.01)
    correlations = torch.corrcoef(torch.cat([found, x0], 1).T)
    assert (correlations[:FEATURES] - torch.eye(2 * FEATURES)[:FEATURES]).abs().max() < 0.07
    assert task().prepare((x0[:0], labels[:0]), CPU, "forget")["alternative"].shape == (0, FEATURES)


def test_what_it_asks_of_the_task():
    model, before = denoiser(), denoiser().state_dict()
    sets = {"forget": [images(4)], "retain": [images(4)]}
    with pytest.raises(ValueError, match=r"instead: expected .* or Surrogate, for .* SA, found"):
        methods.selective_amnesia(model, **sets, task=task(instead=None))
    with pytest.raises(ValueError, match="draws: expected 1, with estimator 'batch'"):
        methods.selective_amnesia(model, **sets, task=task(), draws=2, estimator="batch")
    assert not Classification().has("replacement_losses")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
