"""PairedLoader: ranks share one process's batches; every place is found again."""

import itertools

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from sfron_fast import PairedLoader

STEPS, BATCH = 3, 6


class Counting(TensorDataset):
    """Numbers from ``first`` on, and how many were loaded."""

    def __init__(self, samples, first):
        super().__init__(torch.arange(first, first + samples))
        self.loaded = 0

    def __getitem__(self, i):
        self.loaded += 1
        return super().__getitem__(i)[0]


def made(rank=0, ranks=1, forget=20, retain=50, batch=BATCH, steps=STEPS, **settings):
    return PairedLoader(
        forget=Counting(forget, 0),
        retain=Counting(retain, 1000),
        batch_size=batch,
        retain_steps=steps,
        rank=rank,
        world_size=ranks,
        **settings,
    )


def drawn(loader, epochs=1):
    return [(phase, batch.tolist()) for _ in range(epochs) for phase, batch in loader]


def together(ranks, epochs=1, **settings):
    """Every step's phase and the samples of all ranks, as in the batch of one process."""
    steps = zip(
        *(drawn(made(rank, ranks, **settings), epochs) for rank in range(ranks)), strict=True
    )
    whole = []
    for shares in steps:
        assert len({phase for phase, _ in shares}) == 1
        dealt = itertools.zip_longest(*(share for _, share in shares))
        whole.append((shares[0][0], [i for row in dealt for i in row if i is not None]))
    return whole


def test_a_cycle_is_a_forget_batch_and_the_retain_batches():
    loader = made()
    steps = drawn(loader)
    assert len(steps) == len(loader) == 20 // BATCH * (1 + STEPS)
    assert [phase for phase, _ in steps] == (["forget"] + ["retain"] * STEPS) * (20 // BATCH)
    assert all(len(set(batch)) == BATCH for _, batch in steps)
    assert all((i < 1000) == (phase == "forget") for phase, batch in steps for i in batch)


@pytest.mark.checklist("F2")
@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("forget", [20, 6, 7])
def test_ranks_draw_different_samples_and_together_those_of_one_process(ranks, forget):
    one = drawn(made(forget=forget), 4)
    assert together(ranks, 4, forget=forget) == one
    assert all(len(set(batch)) == len(batch) == BATCH for _, batch in one)


@pytest.mark.checklist("F2")
def test_a_forget_set_smaller_than_the_batch_is_one_batch():
    assert [sorted(batch) for phase, batch in drawn(made(forget=5), 3) if phase == "forget"] == [
        list(range(5))
    ] * 3
    assert together(2, forget=5) == drawn(made(forget=5))
    sizes = [len(drawn(made(rank, 2, forget=5))[0][1]) for rank in range(2)]
    assert sizes == [3, 2]
    with pytest.raises(
        ValueError, match=r"forget: expected a sample for each of 6 ranks, found 5 samples"
    ):
        made(0, 6, forget=5)


def test_passes_cover_each_set_and_are_shuffled_anew():
    """Forget passes are epochs; the retain set's passes go on across them."""
    steps = drawn(made(forget=18, retain=48, steps=3), 8)
    forget = [i for phase, batch in steps if phase == "forget" for i in batch]
    retain = [i for phase, batch in steps if phase == "retain" for i in batch]
    for samples, size in ((forget, 18), (retain, 48)):
        passes = [tuple(samples[k : k + size]) for k in range(0, len(samples), size)]
        assert len(passes) == len(samples) // size > 3
        assert all(len(set(p)) == size for p in passes)
        assert len(set(passes)) == len(passes)
    first, second = (
        [set(b) for phase, b in drawn(made(seed=s), 2) if phase == "forget"] for s in (0, 1)
    )
    assert not any(b in first for b in second)  # no seed goes on with its neighbour's next epoch


@pytest.mark.checklist("F2")
@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_at_every_place_by_any_number_of_ranks(workers):
    on = {"num_workers": workers}
    whole = drawn(made(), 3)
    for stop in (0, 1, 2, 5, 11, 12, 13, 30) if workers == 0 else (6,):
        loader = made(**on)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        assert [(phase, b.tolist()) for phase, b in itertools.islice(batches, stop)] == whole[:stop]
        state = loader.state_dict()
        for ranks in (1, 2):
            again = [made(rank, ranks, **on) for rank in range(ranks)]
            for other in again:
                other.load_state_dict(state)
                assert other.epoch == stop // len(other)
            rests = [drawn(other, 3 - other.epoch) for other in again]
            assert [phase for phase, _ in rests[0]] == [phase for phase, _ in whole[stop:]]
            assert [set().union(*(r[k][1] for r in rests)) for k in range(len(rests[0]))] == [
                set(batch) for _, batch in whole[stop:]
            ]


def test_a_place_is_found_without_loading_what_came_before():
    loader = made()
    loader.load_state_dict({**loader.state_dict(), "position": 1_000_001})
    phase, _ = next(iter(loader))
    sets = [part.dataset for part in loader._loaders]
    assert phase == "retain"
    assert sum(data.loaded for data in sets) == BATCH


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(9))

    def __len__(self):
        return 9


class Flaky(Counting):
    """The first time that sample 7 is asked for there is no answer."""

    failed = False

    def __getitem__(self, i):
        if i == 7 and not self.failed:
            self.failed = True
            raise OSError
        return super().__getitem__(i)


def test_after_an_error_while_loading_the_same_batch_comes_next():
    loader = PairedLoader(
        forget=Counting(20, 0), retain=Flaky(50, 1000), batch_size=BATCH, retain_steps=STEPS
    )
    whole, found, errors = drawn(made(), 3), [], 0
    while len(found) < len(whole):
        try:
            for phase, batch in loader:
                found.append((phase, batch.tolist()))
        except OSError:
            errors += 1
    assert errors == 1
    assert found == whole


def test_set_epoch():
    whole, loader = drawn(made(), 3), made()
    one = len(loader)
    loader.set_epoch(2)
    assert drawn(loader) == whole[2 * one :]
    loader.set_epoch(0)
    assert drawn(loader) == whole[:one]
    assert loader.epoch == 1
    running = loader._batches
    loader.set_epoch(1)  # where it is: workers go on
    assert loader._batches is running
    assert drawn(loader) == whole[one : 2 * one]


def test_the_global_generator_is_left_alone():
    """Dropout in the step must not depend on where a run was resumed."""
    before = torch.get_rng_state()
    drawn(made(), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("batch_size", {"batch": 7, "ranks": 2}),
        ("batch_size", {"batch": 0}),
        ("retain_steps", {"steps": 0}),
        ("rank", {"rank": 2, "ranks": 2}),
        ("world_size", {"ranks": 0}),
        ("seed", {"seed": -1}),
        ("retain", {"retain": 5}),
        ("loading", {"shuffle": True}),
    ],
)
def test_rejects(name, settings):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        made(**settings)


def test_rejects_streams_and_places_in_other_data():
    with pytest.raises(ValueError, match="forget: expected a data set with a length"):
        PairedLoader(forget=iter([1]), retain=Counting(9, 0), batch_size=2, retain_steps=1)
    with pytest.raises(
        ValueError, match=r"retain: expected a data set with a length, .* found Stream"
    ):
        PairedLoader(forget=Counting(9, 0), retain=Stream(), batch_size=2, retain_steps=1)
    for other in ({"seed": 4}, {"batch": 3}, {"steps": 2}, {"forget": 19}, {"retain": 51}):
        with pytest.raises(ValueError, match=r"^state: expected"):
            made().load_state_dict(made(**other).state_dict())
    with pytest.raises(ValueError, match=r"^epoch: expected"):
        made().set_epoch(-1)
