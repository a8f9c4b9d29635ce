"""DDP and plain ranks that share a batch: all results are those of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from sharded import KINDS, mask_of, net, shard, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from sfron_fast import (
    SaliencyMask,
    SFRonSGD,
    adaptive_cross_entropy,
    adaptive_cross_entropy_sum_,
    adaptive_mse,
    adaptive_weights,
    estimate_fisher,
    estimate_mask,
)

U = 2.0**-24  # the error of one rounded fp32 operation
SPLITS = {
    2: ((8, 8), (13, 3), (0, 16)),
    3: ((6, 5, 5), (16, 0, 0)),
    4: ((4, 4, 4, 4), (7, 0, 8, 1)),
}


def part(tensor, split):
    return tensor.split(list(split))[dist.get_rank()]


# --- where fp32 is exact: the same bits -----------------------------------------------------------


def dyadic(shape, generator, low=-4, high=5, unit=0.125):
    """Small multiples of a power of two: sums and products of a few of them are exact in fp32, in
    any order.
    """
    return torch.randint(low, high, shape, generator=generator).float() * unit


def exact_cycles():
    """A linear model and squared errors of halves: four steps without any rounding, so no order of
    sums matters.
    """
    world = dist.get_world_size()
    for split in SPLITS[world]:
        generator = torch.Generator().manual_seed(3)
        models = [nn.Linear(3, 2), nn.Linear(3, 2)]
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            p.data = dyadic(p.shape, generator, -2, 3, 0.5)
            q.data = p.data.clone()
        saliency = mask_of(models[0])
        settings = {"lr": 0.5, "retain_steps": 1, "saliency": saliency}
        optimizers = [SFRonSGD(m.named_parameters(), **settings) for m in models]
        parallel = DistributedDataParallel(models[1])
        for step in range(4):
            inputs, targets = (
                dyadic((16, 3), generator, -1, 2, 1.0),
                dyadic((16, 2), generator, -1, 2, 1.0),
            )
            for model, x, y in (
                (models[0], inputs, targets),
                (parallel, part(inputs, split), part(targets, split)),
            ):
                model.zero_grad()
                # the retain loss is an ordinary sum over the samples, which DDP averages over the
                # ranks
                scale = 1.0 if model is models[0] else float(world)
                (scale * (model(x) - y).square().sum() / 16).backward()
            for p, q in zip(*(m.parameters() for m in models), strict=True):
                assert torch.equal(p.grad, q.grad)
                assert p.grad.any()
            for optimizer in optimizers:
                (optimizer.step if step % 2 else optimizer.forget_step)()
            for p, q in zip(*(m.parameters() for m in models), strict=True):
                assert torch.equal(p, q)


@pytest.mark.checklist("F1")
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_bit_by_bit_where_sums_are_exact(world_size):
    on_ranks(world_size, exact_cycles)


# --- adaptive weights -----------------------------------------------------------------------------


def softmax_regression(x, y, w, loss_of):
    """The gradient of ``loss_of(logits, labels)`` of one process, and of the ranks' average, for
    logits = x w.
    """
    one = w.clone().requires_grad_()
    loss = loss_of(x @ one, y, None)
    loss.backward()
    return one.grad, loss.detach()


def bound_of(x, y, w, temperature):
    """How far two fp32 orders of the same sums may lie apart, from fp64: see the comments."""
    x, w = x.double(), w.double()
    features, samples, classes = x.shape[1], x.shape[0], w.shape[1]
    logits = x @ w
    # of a logit: a sum over features, in any order
    slack = features * U * (x.abs() @ w.abs()).amax(1)
    losses = F.cross_entropy(logits, y, reduction="none")
    # the loss: two logits, and a log-sum-exp of classes (exp and log within 4 U, sums, the
    # differences)
    loss_slack = 2 * slack + (classes + 12) * U * (1 + logits.abs().amax(1))
    raw = losses.clamp_min(1e-6).pow(-temperature)
    weights = raw / raw.sum()
    relative = temperature * loss_slack / (losses - loss_slack) + 8 * U  # pow's own error: 4 U
    # of a weight: its own, that of the sum, sums and divisions by parts and by all ranks
    relative = relative + (weights * relative).sum() + (samples + 16) * U
    delta = torch.softmax(logits, 1) - F.one_hot(y, classes)
    delta_slack = (2 * slack + (classes + 12) * U).unsqueeze(1)
    terms = weights.unsqueeze(1) * delta.abs()
    term_slack = weights.unsqueeze(1) * delta_slack + terms * relative.unsqueeze(1)
    gradient = x.abs().T @ term_slack + (samples + 8) * U * (x.abs().T @ terms)
    loss = (weights * (loss_slack + losses * relative)).sum() + (samples + 8) * U * (
        weights * losses
    ).sum()
    return 2 * gradient, 2 * loss  # each of the two


LOSSES = {
    "cross_entropy": lambda logits, y, group: adaptive_cross_entropy(logits, y, 0.5, group=group),
    "inplace": lambda logits, y, group: adaptive_cross_entropy(
        logits, y, 0.5, inplace=True, group=group
    ),
    "weights": lambda logits, y, group: _own_loss(
        F.cross_entropy(logits, y, reduction="none"), group
    ),
}


def _own_loss(losses, group):
    return (adaptive_weights(losses, 0.5, group=group) * losses).sum()


def adaptive_gradients():
    world, group = dist.get_world_size(), dist.group.WORLD
    generator = torch.Generator().manual_seed(11)
    x, w = torch.randn(16, 6, generator=generator), torch.randn(6, 5, generator=generator)
    y = torch.randint(5, (16,), generator=generator)
    gradient_bound, loss_bound = bound_of(x, y, w, 0.5)
    for split in SPLITS[world]:
        for name, loss_of in LOSSES.items():
            wanted, loss = softmax_regression(x, y, w, loss_of)
            model = nn.Linear(6, 5, bias=False)
            model.weight.data = w.T.clone()
            parallel = DistributedDataParallel(model)
            ours = loss_of(parallel(part(x, split)), part(y, split), group)
            ours.backward()
            assert ((model.weight.grad.T - wanted).abs() <= gradient_bound).all(), (name, split)
            mean = ours.detach().clone()
            dist.all_reduce(mean)
            assert (mean / world - loss).abs() <= loss_bound, (name, split)
            # the mistake that this guards against is far outside
            mine = part(x, split)
            if len(set(split)) > 1 and name == "cross_entropy":
                alone = torch.zeros_like(w)
                if len(mine):
                    alone = softmax_regression(mine, part(y, split), w, loss_of)[0]
                dist.all_reduce(alone)
                assert ((alone / world - wanted).abs() > 100 * gradient_bound).any()


def divided_by_the_optimizer():
    """adaptive_cross_entropy_sum_: the ranks' gradients are averaged, and so is grad_scale."""
    world, group = dist.get_world_size(), dist.group.WORLD
    generator = torch.Generator().manual_seed(11)
    x, w = torch.randn(16, 6, generator=generator), torch.randn(6, 5, generator=generator)
    y = torch.randint(5, (16,), generator=generator)
    gradient_bound, _ = bound_of(x, y, w, 0.5)
    wanted, _ = softmax_regression(x, y, w, LOSSES["cross_entropy"])
    for split in SPLITS[world]:
        model = nn.Linear(6, 5, bias=False)
        model.weight.data = torch.zeros_like(w.T)
        parallel = DistributedDataParallel(model)
        optimizer = SFRonSGD(model.named_parameters(), lr=1.0)
        model.weight.data = w.T.clone()
        total, optimizer.grad_scale = adaptive_cross_entropy_sum_(
            parallel(part(x, split)), part(y, split), 0.5, scale=1.0, group=group
        )
        total.backward()
        # what the step takes off it is then the gradient, with the optimizer's division
        model.weight.data.zero_()
        optimizer.forget_step()
        assert ((-model.weight.detach().T - wanted).abs() <= gradient_bound).all(), split


def squared_errors():
    """fp64: no difference of rounding can hide a wrong weight."""
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(16, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    w = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    one = w.clone().requires_grad_()
    adaptive_mse(x @ one, y, 0.7).backward()
    for split in SPLITS[dist.get_world_size()]:
        model = nn.Linear(4, 4, bias=False).double()
        model.weight.data = w.T.clone()
        parallel = DistributedDataParallel(model)  # its hooks live as long as it
        adaptive_mse(parallel(part(x, split)), part(y, split), 0.7, group=group).backward()
        assert (
            model.weight.grad.T - one.grad
        ).abs().max() <= 1000 * 2.0**-53 * one.grad.abs().max()


def steep_weights():
    """No power overflows on any rank, and one rank's NaN is everyone's."""
    world, group = dist.get_world_size(), dist.group.WORLD
    logits = torch.stack([torch.linspace(-20.0, 15.0, 16), torch.zeros(16)], 1)
    labels = torch.zeros(16, dtype=torch.int64)
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    wanted = torch.softmax(-40.0 * losses.clamp_min(1e-6).log(), 0)
    for split in SPLITS[world]:
        mine, known = part(logits, split), part(labels, split)
        weights = adaptive_weights(part(losses, split).float(), 40.0, group=group)
        assert ((weights.double() / world - part(wanted, split)).abs() <= 1e-4).all(), split
        total = adaptive_cross_entropy(mine, known, 40.0, group=group)
        dist.all_reduce(total)
        assert abs(total / world / (wanted * losses).sum() - 1) <= 1e-4, split
        poisoned = part(logits.index_fill(0, torch.tensor([3]), float("nan")), split)
        if len(mine):
            assert adaptive_cross_entropy(poisoned, known, group=group).isnan(), split
        else:
            adaptive_weights(torch.zeros(0), group=group)  # the others wait for it


def nothing_anywhere():
    group = dist.group.WORLD
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = adaptive_cross_entropy(logits, torch.zeros(0, dtype=torch.int64), group=group)
    loss.backward()
    return loss.item(), adaptive_weights(torch.zeros(0), group=group).shape


@pytest.mark.checklist("F1")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "check", [adaptive_gradients, divided_by_the_optimizer, squared_errors, steep_weights]
)
def test_weights_are_normalised_over_all_ranks(world_size, check):
    """Equal, uneven and empty parts; the bound is that of two orders of fp32 sums (bound_of)."""
    on_ranks(world_size, check)


def test_no_samples_on_any_rank():
    assert on_ranks(2, nothing_anywhere) == [(0.0, (0,))] * 2


# --- whole runs -----------------------------------------------------------------------------------


def runs():
    """fp64 but for the clip's norm: three cycles of forget and retain steps, forget batches with an
    empty part.
    """
    world, group = dist.get_world_size(), dist.group.WORLD
    for kind in KINDS:
        models = [net(torch.float64), net(torch.float64)]
        settings = {
            "lr": 0.05,
            "max_norm": 1.0,
            "retain_steps": 2,
            "slow_lr": 0.5,
            "saliency": mask_of(models[0]),
        }
        settings |= {"momentum": 0.9} if kind is SFRonSGD else {"eps": 1e-3}
        optimizers = [kind(m.named_parameters(), **settings) for m in models]
        parallel = DistributedDataParallel(models[1])
        generator = torch.Generator().manual_seed(7)
        for step in range(9):
            inputs = torch.randn(12, 5, dtype=torch.float64, generator=generator)
            forget = step % 3 == 0
            split = (
                [12 // world] * world
                if not forget
                else [12 - world + 1, 0, *[1] * (world - 1)][:world]
            )
            split[0] += 12 - sum(split)
            for model, optimizer, x, ranks in (
                (models[0], optimizers[0], inputs, None),
                (parallel, optimizers[1], part(inputs, split), group),
            ):
                optimizer.zero_grad()
                error = model(x) - x.sum(1, keepdim=True)
                if forget:
                    (-adaptive_mse(error, torch.zeros_like(error), group=ranks)).backward()
                else:
                    error.square().mean().backward()
                (optimizer.forget_step if forget else optimizer.step)()
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            # the norm is fp32, and may round the other way: U of an update below 0.1, in three
            # forget steps
            assert (p - q).abs().max() <= 4 * U * 0.1, name
            mine = [torch.empty_like(q) for _ in range(world)]
            dist.all_gather(mine, q.detach())
            assert all(torch.equal(mine[0], other) for other in mine)


@pytest.mark.checklist("F1")
@pytest.mark.parametrize("world_size", [2, 3])
def test_whole_runs_equal_one_process(world_size):
    on_ranks(world_size, runs)


# --- Fisher and mask ------------------------------------------------------------------------------


def mean_square(output, targets):
    return (output - targets).square().mean()


def exact_batches(sizes=(16, 8, 4), seed=1):
    """Batches of powers of two: means are exact as well."""
    generator = torch.Generator().manual_seed(seed)
    return [(dyadic((n, 5), generator), dyadic((n, 1), generator)) for n in sizes]


def exact_model():
    model = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 1), nn.Linear(1, 1))
    generator = torch.Generator().manual_seed(9)
    for p in model.parameters():
        p.data = dyadic(p.shape, generator, -2, 3)
    model[2].requires_grad_(True)
    return model


def parts(batches, split_of):
    """This rank's parts; the last batches may be missing on some ranks."""
    mine = [(part(x, split_of(len(x))), part(y, split_of(len(y)))) for x, y in batches]
    while mine and not len(mine[-1][0]):
        mine.pop()
    return mine


def even(n):
    world = dist.get_world_size()
    return [n // world + (r < n % world) for r in range(world)]


def lopsided(n):
    return [
        n if n < 10 else n - dist.get_world_size() + 1,
        *[0 if n < 10 else 1] * (dist.get_world_size() - 1),
    ]


def exact_fishers():
    """Gradients of eighths are exact, whoever adds them up; only their squares are rounded, and
    alike.
    """
    group, world = dist.group.WORLD, dist.get_world_size()
    sets = exact_batches(seed=1), exact_batches((16, 16, 2), seed=2)
    for estimator, split, wrap in (
        ("batch", even, lambda model: model),
        ("batch", lopsided, DistributedDataParallel),
        ("batch", lopsided, shard),
        ("batch_equal", even, shard),
    ):
        single = [
            estimate_fisher(exact_model(), batches, mean_square, estimator=estimator)
            for batches in sets
        ]
        mask, top = (
            SaliencyMask.from_fisher(forget=single[0], retain=single[1]),
            SaliencyMask.top_k(forget=single[0], retain=single[1], fraction=0.5),
        )
        assert 0 < sum(mask.counts().values()) < sum(map(mask.size, mask))
        model = wrap(exact_model())
        grad = next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        mine = [parts(batches, split) for batches in sets]
        ours = [
            estimate_fisher(model, batches, mean_square, estimator=estimator, group=group)
            for batches in mine
        ]
        for one, several in zip(single, ours, strict=True):
            for name in one:
                assert torch.equal(whole(several[name]), one[name]), (estimator, wrap, name)
            assert {**several.metadata, "world_size": 1} == one.metadata
            assert several.metadata["world_size"] == world
        assert SaliencyMask.from_fisher(forget=ours[0], retain=ours[1]) == mask
        assert SaliencyMask.top_k(forget=ours[0], retain=ours[1], fraction=0.5) == top
        assert (
            estimate_mask(
                model,
                forget=mine[0],
                retain=mine[1],
                loss_fn=mean_square,
                estimator=estimator,
                group=group,
            )
            == mask
        )
        assert next(model.parameters()).grad is grad


@pytest.mark.checklist("F3")
@pytest.mark.parametrize("world_size", [2, 3])
def test_fisher_and_mask_do_not_depend_on_the_number_of_ranks(world_size):
    on_ranks(world_size, exact_fishers)


def parts_apart():
    """ "sample" and "rank": sums of squares over samples, and over the ranks' parts."""
    group, world = dist.group.WORLD, dist.get_world_size()
    batches = exact_batches((16, 8))
    mine = parts(batches, even)
    ours = estimate_fisher(exact_model(), mine, mean_square, estimator="sample", group=group)
    alone = estimate_fisher(exact_model(), batches, mean_square, estimator="sample")
    pieces = [
        (x.split(even(len(x)))[r], y.split(even(len(y)))[r])
        for x, y in batches
        for r in range(world)
    ]
    by_rank = estimate_fisher(exact_model(), mine, mean_square, estimator="rank", group=group)
    by_piece = estimate_fisher(exact_model(), pieces, mean_square, estimator="batch")
    for name in alone:  # squares are rounded, and 24 of them summed in another order
        for found, wanted in ((ours, alone), (by_rank, by_piece)):
            assert ((found[name] - wanted[name]).abs() <= 2 * 24 * U * wanted[name]).all(), name
    assert (by_rank.metadata["estimator"], by_rank.metadata["world_size"]) == ("rank", world)
    assert by_rank.metadata["samples"] == 24
    on = estimate_fisher(
        exact_model(), mine, mean_square, estimator="rank", group=group, start=by_rank
    )
    for name in on:
        assert ((on[name] - by_rank[name]).abs() <= 100 * U * on[name]).all()
    assert on.metadata["samples"] == 48
    expected = "estimator: expected 'sample', 'batch' or 'batch_equal' for a sharded model"
    with pytest.raises(ValueError, match=expected):
        estimate_fisher(shard(exact_model()), mine, mean_square, estimator="rank", group=group)


def samples_of_shards():
    """FSDP2: squares before the reduction, sums after; a rank without samples runs along."""
    group = dist.group.WORLD
    batches = exact_batches((16, 8, 7))
    alone = estimate_fisher(exact_model(), batches, mean_square)
    assert alone.metadata["estimator"] == "sample"
    mask = estimate_mask(exact_model(), forget=batches, retain=batches[::2], loss_fn=mean_square)
    for split in (even, lopsided):
        for wrap in (shard, DistributedDataParallel):
            model, mine = wrap(exact_model()), parts(batches, split)
            grad = next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
            ours = estimate_fisher(model, mine, mean_square, group=group)
            for name in alone:  # 31 squares, summed in another order
                wanted = alone[name]
                assert ((whole(ours[name]) - wanted).abs() <= 2 * 31 * U * wanted).all(), name
            assert {**ours.metadata, "world_size": 1} == alone.metadata
            assert next(model.parameters()).grad is grad
            both = {"forget": mine, "retain": parts(batches[::2], split)}
            for low_memory in (False, True):
                found = estimate_mask(
                    model, **both, loss_fn=mean_square, group=group, low_memory=low_memory
                )
                differ = sum(int((found.to_bool(n) != mask.to_bool(n)).sum()) for n in mask)
                assert differ <= 2  # ties, which rounding decides
    strange = exact_model()
    strange.append(nn.PReLU())
    expected = "estimator: expected 'batch', for a sharded model with functions"
    with pytest.raises(ValueError, match=expected):
        estimate_fisher(shard(strange), mine, mean_square, estimator="sample", group=group)


@pytest.mark.checklist("F3")
def test_samples_of_a_sharded_model():
    on_ranks(2, samples_of_shards)


@pytest.mark.checklist("F3")
def test_estimators_that_square_before_they_reduce_are_named():
    on_ranks(2, parts_apart)


def unreached_and_refused():
    """A parameter that only one rank's samples reach counts as reached; None as group is refused
    for DDP and FSDP2.
    """
    group = dist.group.WORLD

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 1), nn.Linear(5, 1), nn.Linear(5, 1)

        def forward(self, x):
            return self.a(x) + self.b(x) if dist.get_rank() == 1 else self.a(x)

    for estimator in ("batch", "rank", "sample"):
        fisher = estimate_fisher(
            Gate(), exact_batches(), mean_square, estimator=estimator, group=group
        )
        assert fisher.metadata["no_gradient"] == ["c.bias", "c.weight"]
        assert fisher["b.weight"].any()
    for model in (DistributedDataParallel(exact_model()), shard(exact_model())):
        with pytest.raises(ValueError, match="group: expected the process group"):
            estimate_fisher(model, exact_batches(), mean_square)
    bad = exact_batches()
    if dist.get_rank() == 1:
        bad[1][0].fill_(float("nan"))
    with pytest.raises(ValueError, match="loader: expected a finite loss"):
        estimate_fisher(exact_model(), bad, mean_square, group=group)


@pytest.mark.checklist("F3")
def test_what_any_rank_reaches_and_what_none_may_do():
    on_ranks(2, unreached_and_refused)


def other_meshes():
    group, batches = dist.group.WORLD, exact_batches()
    single = estimate_fisher(exact_model(), batches, mean_square, estimator="batch")
    samples = estimate_fisher(exact_model(), batches, mean_square)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for options in ({"mesh": mesh}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        mine = parts(batches, even)
        ours = estimate_fisher(
            shard(exact_model(), **options), mine, mean_square, estimator="batch", group=group
        )
        assert all(torch.equal(whole(ours[name]), single[name]) for name in single)
        ours = estimate_fisher(shard(exact_model(), **options), mine, mean_square, group=group)
        for name, wanted in samples.items():
            assert ((whole(ours[name]) - wanted).abs() <= 100 * U * wanted).all(), name
    with pytest.raises(
        ValueError, match="group: expected the 2 ranks that the model is sharded over, found 4"
    ):
        estimate_fisher(shard(exact_model(), mesh=mesh["shard"]), batches, mean_square, group=group)


@pytest.mark.checklist("F3", "F6", "F8")
def test_fisher_on_other_meshes_and_of_offloaded_shards():
    on_ranks(4, other_meshes)
