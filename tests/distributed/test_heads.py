"""Head and loss in one on several ranks: weights, normaliser and ceiling of the whole batch, and
losses before unlearning.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from head_cases import error
from ranks import on_ranks
from sharded import whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sfron_fast as sf
from sfron_fast.heads.fused import FusedHead

SAMPLES, TOKENS, CLASSES = 8, 5, 29


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(CLASSES, 6), nn.Linear(6, 6)
        self.head = FusedHead(6, CLASSES)

    def forward(self, ids, labels, **settings):
        hidden = (self.embedding(ids) + self.body(self.embedding(ids)).tanh()) * 3.0
        return self.head(hidden, labels, **settings)


def sharded(model):
    fully_shard(model.body)
    return fully_shard(model, reshard_after_forward=True)


WRAPPERS = {"FSDP2": sharded, "DDP": DistributedDataParallel}
IDS = torch.randint(CLASSES, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
LABELS = F.pad(IDS[:, 1:], (0, 1), value=-100).masked_fill(IDS % 5 == 0, -100)


def capped(losses, samples):
    raw = losses.clamp_min(1e-6).pow(-2.0)
    return sf.with_ceiling(raw, losses, 1.0, 4.0), raw


def forget(model, mine, **settings):
    """The loss of this rank's samples, and an optimizer that will leave its gradient behind."""
    optimizer = sf.SFRonSGD(model.named_parameters(), lr=1.0, max_norm=0.1, retain_steps=1)
    index = torch.arange(mine.stop - mine.start).repeat_interleave(TOKENS)
    result = model(
        IDS[mine],
        LABELS[mine],
        loss=sf.linear_adaptive_cross_entropy,
        sample_index=index,
        weigh=capped,
        **settings,
    )
    (-result.loss).backward()
    return optimizer, result


def moved(model):
    start = dict(LanguageModel().named_parameters())
    named = {n.removeprefix("module."): whole(p) for n, p in model.named_parameters()}
    return {n: p - start[n].detach() for n, p in named.items()}


def weighed_together(name):
    model = LanguageModel()
    optimizer, whole_batch = forget(model, slice(0, SAMPLES))
    optimizer.forget_step()
    wanted = moved(model)
    assert 1 < int((whole_batch.weights == 0).sum()) < SAMPLES - 1
    for cuts in ((0, 4, 8), (0, 3, 8)):
        model = WRAPPERS[name](LanguageModel())
        mine = slice(*cuts[dist.get_rank() :][:2])
        optimizer, result = forget(model, mine, normalise=False)
        dist.all_reduce(result.normaliser)
        optimizer.grad_scale = result.normaliser / dist.get_world_size()
        optimizer.forget_step()
        assert error(result.normaliser, whole_batch.normaliser.double()) < 1e-6
        for key, step in moved(model).items():
            assert error(step, wanted[key].double()) < 1e-5, (cuts, key)


@pytest.mark.parametrize("name", WRAPPERS)
def test_ranks_weigh_as_one_process_with_the_whole_batch(name):
    """Samples of a rank are weighed apart; their normalisers are averaged, as the gradients are."""
    on_ranks(2, weighed_together, name)


class Sequences(sf.Task):
    """Batches (ids, labels, numbers)."""

    def losses(self, model, batch):
        ids, labels, _ = batch
        logp, _ = model(ids, labels)
        return -logp.view(ids.shape).sum(1)


def losses_by_rank():
    numbers = torch.arange(100, 100 + SAMPLES)

    def measured(model, mine):
        batches = [
            tuple(t[mine][part] for t in (IDS, LABELS, numbers))
            for part in (slice(0, 2), slice(2, 4))
        ]
        return sf.reference_losses(model, batches, task=Sequences(), ids=lambda batch: batch[2])

    rank, model = dist.get_rank(), sharded(LanguageModel())
    mine = slice(4 * rank, 4 * rank + 4)
    ours, theirs = measured(model, mine), measured(LanguageModel(), mine)
    assert len(ours) == 4
    torch.testing.assert_close(ours[numbers[mine]], theirs[numbers[mine]])
    assert ours.digest == theirs.digest
    ours.check(model)
    with torch.no_grad():
        model.body.weight.mul_(2.0)
    with pytest.raises(ValueError, match=r"^model: expected the weights the reference"):
        ours.check(model)


def test_reference_losses_of_a_sharded_model():
    """Each rank keeps those of its own samples; the digest is the whole model's."""
    on_ranks(2, losses_by_rank)
