"""EndlessLoader: undisturbed passes, places found again for every sampler, empty batches."""

import random

import numpy as np
import pytest
import torch
from models import build, data, random_mask
from torch.utils.data import DataLoader, Sampler, TensorDataset

import sfron_fast as sf
from sfron_fast import evaluation
from sfron_fast.data.endless import EndlessLoader, random_state, set_random_state

SAMPLES = 8


class Keeping(Sampler):
    """An order that comes from ``order()``, and what it keeps."""

    def __init__(self):
        self.rng = self.kept()

    def __iter__(self):
        return iter(self.order())

    def __len__(self):
        return SAMPLES


class Torchs(Keeping):
    def kept(self):
        return torch.Generator().manual_seed(7)

    def order(self):
        return torch.randperm(SAMPLES, generator=self.rng).tolist()


class Numpys(Keeping):
    def kept(self):
        return np.random.default_rng(7)

    def order(self):
        return self.rng.permutation(SAMPLES).tolist()


class Legacy(Numpys):
    def kept(self):
        return np.random.RandomState(7)


class Pythons(Keeping):
    def kept(self):
        return random.Random(7)

    def order(self):
        return self.rng.sample(range(SAMPLES), SAMPLES)


class Epochs(Keeping):
    def kept(self):
        return 0

    def order(self):
        self.rng += 1
        return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.rng)).tolist()


class InPlace(Keeping):
    """The same list is shuffled again for every pass, also for an evaluation while another pass is
    open.
    """

    def kept(self):
        return list(range(SAMPLES))

    def order(self):
        random.shuffle(self.rng)
        return self.rng


def endless(sampler):
    return EndlessLoader(
        DataLoader(TensorDataset(torch.arange(SAMPLES)), 2, sampler=sampler), "retain"
    )


def drawn(loader, count):
    return [loader.next()[0].tolist() for _ in range(count)]


@pytest.mark.checklist("C5")
@pytest.mark.parametrize("kind", [Torchs, Numpys, Legacy, Pythons, Epochs, InPlace])
def test_a_place_is_found_by_what_the_sampler_keeps(kind, tmp_path):
    """Also where a pass of somebody else came between, and before the first pass has begun."""
    run = endless(kind())
    list(run.aside())
    states = [(run.state_dict(), random_state())]
    whole = drawn(run, 5)
    own, generators = run.own_state(), random_state()
    list(run.aside())  # an evaluation
    run.set_own_state(own)
    set_random_state(generators)
    states.append((run.state_dict(), random_state()))
    whole += drawn(run, 6)
    torch.save(states, tmp_path / "states.pt")
    for at, (place, generators) in zip(
        (0, 5), torch.load(tmp_path / "states.pt", weights_only=True), strict=True
    ):
        resumed = endless(kind())
        resumed.load_state_dict(place)
        set_random_state(generators)
        assert drawn(resumed, 11 - at) == whole[at:]


def test_an_order_that_nothing_saves_is_refused():
    hidden = torch.Generator().manual_seed(7)

    class Hidden(Torchs):
        def kept(self):
            return None

        def order(self):
            return torch.randperm(SAMPLES, generator=hidden).tolist()

    run = endless(Hidden())
    drawn(run, 3)
    with pytest.raises(
        ValueError,
        match="retain: expected the batches of the checkpointed run, found others",
    ):
        endless(Hidden()).load_state_dict(run.state_dict())


def test_another_kind_of_sampler_is_refused():
    run = endless(Torchs())
    drawn(run, 1)
    with pytest.raises(ValueError, match="retain: expected the generators the run began with"):
        endless(None).load_state_dict(run.state_dict())


class Seen(torch.nn.Linear):
    """Keeps the first input of the samples it is trained on."""

    def forward(self, x):
        if self.training:
            self.seen += x[:, 0].int().tolist()
        return super().forward(x)


def test_evaluations_and_callbacks_do_not_end_a_pass_of_persistent_workers():
    """Such a loader has one iterator, which begins anew for whoever asks."""
    model, x, y = (
        Seen(2, 2),
        torch.stack([torch.arange(6.0), torch.ones(6)], 1),
        torch.arange(6) % 2,
    )
    model.seen = []
    everything = sf.SaliencyMask.from_bool(
        {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    )
    forget = DataLoader(TensorDataset(x, y), 2, num_workers=1, persistent_workers=True)
    recipe = sf.Recipe.paper(cycles=3, retain_steps=1, lr=0.01)
    sf.unlearn(
        model,
        retain=[(x + 100, y)],
        forget=forget,
        recipe=recipe,
        mask=everything,
        eval_every=1,
        forget_floor=0,
        on_cycle=lambda *_: next(iter(forget)),
    )
    assert [i for i in model.seen if i < 100] == list(range(6))


def test_persistent_workers_are_refused_with_checkpoints(tmp_path):
    x, y = data(8)
    persistent = DataLoader(TensorDataset(x, y), 4, num_workers=1, persistent_workers=True)
    for name, loaders in (
        ("retain", (persistent, [(x, y)])),
        ("forget", ([(x, y)], persistent)),
    ):
        sets = {"forget": loaders[1], "retain": loaders[0], "recipe": sf.Recipe.paper()}
        with pytest.raises(
            ValueError, match=f"{name}: expected persistent_workers=False in a run with checkpoints"
        ):
            sf.unlearn(build(), **sets, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="persistent_workers=False"):
        EndlessLoader(persistent, "retain").state_dict()


class OneIterator:
    """iter() begins its only iterator again."""

    def __init__(self, batches):
        self.batches, self.iterator = batches, OneIterator.Pass()

    class Pass:
        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop()

    def __iter__(self):
        self.iterator.left = list(self.batches)
        return self.iterator


def test_a_shared_iterator_is_refused_before_anything_moves():
    x, y = data(8)
    model = build()
    before = model[0].weight.clone()
    settings = {"recipe": sf.Recipe.paper(cycles=2), "mask": random_mask(model), "forget_floor": 0}
    with pytest.raises(ValueError, match=r"forget: expected a new iterator at every iter\(\)"):
        sf.unlearn(
            model, retain=[(x, y)], forget=OneIterator([(x, y)] * 2), eval_every=1, **settings
        )
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", ["retain", "forget", "holdout"])
def test_generators_are_refused_by_name(name):
    x, y = data(8)
    loaders = {n: [(x, y)] for n in ("retain", "forget", "holdout")} | {name: (b for b in [(x, y)])}
    with pytest.raises(
        ValueError, match=f"{name}: expected batches that can be read again.*, found a generator"
    ):
        sf.unlearn(build(), **loaders, eval_every=1, recipe=sf.Recipe.paper(cycles=1))


def test_empty_batches_are_skipped_everywhere():
    x, y = data(8)
    empty, whole = (x[:0], y[:0]), (x, y)
    ends = []
    for batches in ([whole], [empty, whole, empty]):
        model = build()
        sf.unlearn(
            model,
            retain=batches,
            forget=batches,
            recipe=sf.Recipe.paper(cycles=3, retain_steps=2, lr=0.1),
        )
        ends.append(
            torch.cat(
                [p.flatten() for p in sf.methods.finetune(model, batches, epochs=2).parameters()]
            )
        )
        assert len(evaluation.predict(model, batches).labels) == 8
    assert torch.equal(*ends)
    for loaders in (([whole], [empty]), ([empty], [whole])):
        with pytest.raises(ValueError, match=r"(retain|forget): expected at least one sample"):
            sf.unlearn(
                build(),
                forget=loaders[1],
                retain=loaders[0],
                recipe=sf.Recipe.paper(cycles=1),
                mask=random_mask(build()),
            )
