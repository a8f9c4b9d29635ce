"""Every baseline against a loop written from its paper or the authors' code, not our pieces."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, bits, build, forever, loader
from torch.utils.data import DataLoader, TensorDataset

from sfron_fast import Recipe, SaliencyMask, methods, unlearn


@pytest.fixture
def forget():
    return loader(11, 4, seed=5)


@pytest.fixture
def retain():
    return loader(26, 8, seed=6)


def relabelled(forget, retain, generator=None):
    """Both sets as one loader, in order, the forget set under wrong labels."""
    (xf, yf), (xr, yr) = forget.dataset.tensors, retain.dataset.tensors
    labels = methods.wrong_labels(yf, CLASSES, generator)
    return DataLoader(TensorDataset(torch.cat([xf, xr]), torch.cat([labels, yr])), 8)


def marked(forget, retain):
    """Both sets as one loader, in order, with True for what is to be forgotten."""
    (xf, yf), (xr, yr) = forget.dataset.tensors, retain.dataset.tensors
    return DataLoader(TensorDataset(torch.cat([xf, xr]), torch.cat([yf >= 0, yr < 0])), 8)


def literal(model, epochs, losses, lr=0.05, mask=None):
    """SGD on what ``losses(epoch)`` yields, cosine per epoch; what is outside the mask is put back
    after each step.
    """
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    model.train()
    for epoch in range(epochs):
        for loss in losses(epoch):
            optimizer.zero_grad()
            loss.backward()
            for p, chosen in zip(model.parameters(), mask or [], strict=bool(mask)):
                p.grad *= chosen
            optimizer.step()
            for p, chosen, before in zip(model.parameters(), mask or [], start, strict=bool(mask)):
                p.data[~chosen] = before[~chosen]
        schedule.step()


def kl(teacher, student, temperature):
    """KL(teacher || student) [samples], from the probabilities."""
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def agree(ours, theirs, start="bn", bound=1e-6):
    """Equal weights, which are not those of the start."""
    ours, theirs, before = bits(ours), bits(theirs), bits(build(start))
    assert max((ours[n].double() - theirs[n].double()).abs().max().item() for n in ours) <= bound
    assert max((ours[n].double() - before[n].double()).abs().max().item() for n in ours) > 1e-3


def taught(teacher, x):
    """Logits of a teacher in eval mode."""
    teacher.eval()
    with torch.no_grad():
        return teacher(x)


def test_wrong_labels():
    labels = torch.arange(CLASSES).repeat(1000)
    wrong = methods.wrong_labels(labels, CLASSES, torch.Generator().manual_seed(0))
    assert not (wrong == labels).any()
    counts = torch.zeros(CLASSES, CLASSES).index_put_(
        (labels, wrong), torch.ones(len(labels)), accumulate=True
    )
    assert counts.sum(1).eq(1000).all()
    assert (
        counts + 1000 * torch.eye(CLASSES) > 1000 / (CLASSES - 1) - 100
    ).all()  # evenly over the others
    assert torch.equal(
        wrong, methods.wrong_labels(labels, CLASSES, torch.Generator().manual_seed(0))
    )


def test_random_label(forget, retain):
    ours, theirs, mixed = build("bn"), build("bn"), relabelled(forget, retain)
    methods.random_label(ours, mixed, epochs=3, lr=0.05)
    literal(theirs, 3, lambda _: (F.cross_entropy(theirs(x), y) for x, y in mixed))
    agree(ours, theirs, bound=0.0)


def test_salun(forget, retain):
    ours, theirs, mixed = build("bn"), build("bn"), relabelled(forget, retain)
    methods.salun(ours, mixed=mixed, forget=forget, fraction=0.3, epochs=3, lr=0.05)

    theirs.eval()
    sums = [torch.zeros_like(p) for p in theirs.parameters()]
    for x, y in forget:
        theirs.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        for total, p in zip(sums, theirs.parameters(), strict=True):
            total += p.grad
    every = torch.cat([s.abs().flatten() for s in sums])
    least = every.sort(descending=True).values[round(0.3 * len(every)) - 1]
    mask = [s.abs() >= least for s in sums]
    start = [p.detach().clone() for p in theirs.parameters()]
    literal(theirs, 3, lambda _: (F.cross_entropy(theirs(x), y) for x, y in mixed), mask=mask)
    agree(ours, theirs)
    for p, before, chosen in zip(ours.parameters(), start, mask, strict=True):
        assert torch.equal(p[~chosen], before[~chosen])  # weight decay does not move them


def test_bad_teacher(forget, retain):
    ours, theirs, fresh, mixed = (
        build("bn"),
        build("bn"),
        build("bn", seed=9),
        marked(forget, retain),
    )
    methods.bad_teacher(ours, mixed, fresh, epochs=3, lr=0.2)
    original = copy.deepcopy(theirs)

    def losses(_):
        for x, forgotten in mixed:
            teacher = torch.where(
                forgotten[:, None], taught(fresh, x), taught(original, x)
            ).softmax(1)
            # the default mean: over samples and classes
            yield F.kl_div(theirs(x).log_softmax(1), teacher)

    with pytest.warns(UserWarning, match="batchmean"):
        literal(theirs, 3, losses, lr=0.2)
    agree(ours, theirs)


def test_scrub(forget, retain):
    ours, theirs = build("bn"), build("bn")
    methods.scrub(ours, retain=retain, forget=forget, epochs=4, ascent_epochs=2, lr=0.02)
    original = copy.deepcopy(theirs)

    def losses(epoch):
        if epoch < 2:
            for x, _ in forget:
                yield -(16 * kl(taught(original, x), theirs(x), 4.0)).mean()
        for x, y in retain:
            logits = theirs(x)
            yield (
                0.99 * F.cross_entropy(logits, y)
                + 0.001 * 16 * kl(taught(original, x), logits, 4.0).mean()
            )

    literal(theirs, 4, losses, lr=0.02)
    agree(ours, theirs)


def test_selective_amnesia(forget, retain):
    ours, theirs = build("bn"), build("bn")
    methods.selective_amnesia(ours, retain=retain, forget=forget, penalty=7.0, epochs=2, lr=0.05)
    start = [p.detach().clone() for p in theirs.parameters()]
    fisher = [torch.zeros_like(p) for p in start]
    theirs.eval()
    for x, y in zip(*retain.dataset.tensors, strict=True):
        theirs.zero_grad()
        F.cross_entropy(theirs(x[None]), y[None]).backward()
        for f, p in zip(fisher, theirs.parameters(), strict=True):
            f += p.grad**2 / 26
    forget_batches = forever(forget)

    def losses(_):
        for x, y in retain:
            loss = F.cross_entropy(theirs(x), y)
            loss = loss + kl(torch.zeros(1, CLASSES), theirs(next(forget_batches)[0]), 1.0).mean()
            for f, p, s in zip(fisher, theirs.parameters(), start, strict=True):
                loss = loss + 7.0 / 2 * (f * (p - s) ** 2).sum()
            yield loss

    literal(theirs, 2, losses)
    agree(ours, theirs)


def test_amnesia_stays_where_the_fisher_is_large(forget, retain):
    """What the penalty is for: the retain set's loss suffers less the larger it is."""
    moved = []
    for penalty in (0.0, 100.0):
        model = build()
        before = bits(model)
        methods.selective_amnesia(
            model, retain=retain, forget=forget, penalty=penalty, epochs=4, lr=0.05, momentum=0.0
        )
        moved.append(sum((v - before[n]).square().sum().item() for n, v in bits(model).items()))
    assert moved[1] < 0.7 * moved[0]


def test_gradient_saliency_selects_the_share_asked_for(forget):
    model = build("bn")
    mask = methods.gradient_saliency(model, forget, 0.25)
    total = sum(p.numel() for p in model.parameters())
    assert sum(mask.counts().values()) == round(0.25 * total)


def test_modes_and_epochs(forget, retain):
    """Training flags are put back, and every epoch is reported, also by the baseline that trains in
    eval mode.
    """
    for name, loaders in {
        "finetune": {"retain": retain},
        "gradient_ascent": {"forget": forget},
        "scrub": {"forget": forget, "retain": retain},
    }.items():
        model, seen = build("bn"), []
        model[1].eval()
        getattr(methods, name)(
            model, **loaders, epochs=2, on_epoch=lambda epoch, _, seen=seen: seen.append(epoch)
        )
        assert seen == [1, 2]
        assert [m.training for m in model] == [True, False, True, True]


def test_a_foreign_mask_is_refused(retain):
    model = build()
    with pytest.raises(ValueError, match="saliency"):
        methods.finetune(model, retain, mask=SaliencyMask.from_bool({"other": torch.ones(3)}))


# --- SFR-on without one of its parts --------------------------------------------------------------


def test_without_saliency(forget, retain):
    recipe = Recipe.paper(cycles=3, retain_steps=2, lr=0.05, forget_lr=0.3)
    ours, theirs = build("bn"), build("bn")
    result = unlearn(ours, retain=retain, forget=forget, recipe=recipe.without("saliency"))
    everything = SaliencyMask.from_bool(
        {n: torch.ones(p.shape) for n, p in theirs.named_parameters()}
    )
    assert result.mask == everything
    unlearn(theirs, retain=retain, forget=forget, recipe=recipe, mask=everything)
    agree(ours, theirs, bound=0.0)
    unlearn(masked := build("bn"), retain=retain, forget=forget, recipe=recipe)
    assert any(
        not torch.equal(a, b) for a, b in zip(masked.parameters(), ours.parameters(), strict=True)
    )


def test_without_adaptive_coefficients():
    recipe = Recipe.official(cycles=4).without("adaptive")
    assert recipe.temperature == 0.0
    assert [recipe.forget_weight_at(t) for t in range(4)] == [25.0] * 4


@pytest.mark.parametrize("clip", [None, 0.05])
def test_without_fast_slow_moves_as_far_for_a_constant_gradient(clip):
    """Where gradients are constant the order of steps cannot matter: both forms must arrive at the
    same weights.
    """
    settings = {
        "cycles": 3,
        "retain_steps": 4,
        "lr": 0.2,
        "forget_lr": 0.3,
        "slow_lr": 0.5,
        "forget_weight": 2.0,
    }
    recipe = Recipe.paper(**settings, max_norm=clip)
    joint = recipe.without("fast_slow")
    assert (joint.cycles, joint.retain_steps, joint.slow_lr) == (12, 1, 1.0)
    ends = []
    for r in (recipe.replace(forget_decay="constant"), joint.replace(forget_decay="constant")):
        model = torch.nn.Linear(3, 2).double()
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        optimizer = r.make_optimizer(model, None)
        for cycle in range(r.cycles):
            for p in model.parameters():
                p.grad = torch.full_like(p, -10.0 * r.forget_weight_at(cycle))
            optimizer.forget_step()
            for _ in range(r.retain_steps):
                for p in model.parameters():
                    p.grad = torch.full_like(p, 0.01)
                optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert ends[0].abs().max() > 1e-3
    assert torch.allclose(ends[0], ends[1], rtol=1e-6)  # the clip adds 1e-6 to a norm of 14


def test_without_something_unknown():
    with pytest.raises(ValueError, match="part: expected"):
        Recipe.paper().without("masks")
