"""Over-forgetting: when the guard speaks, and the best evaluated state, kept and put back."""

import warnings

import pytest
import torch
from models import bits, build, same
from test_unlearning import forgetful
from torch.utils.data import DataLoader, Subset, TensorDataset

import sfron_fast as sf
from sfron_fast.data.labels import labels_of, share_no_label
from sfron_fast.runs.best import better

STOPS = {"eval_every": 1, "forget_floor": 60.0, "over_forgetting": "stop"}


def entry(accuracy):
    return {"forget_accuracy": accuracy}


def test_the_nearest_to_the_floor_is_the_best_and_none_below_it():
    order = [90.0, 40.0, 25.0, 20.0, 19.0, 5.0, 100.0]
    best = None
    for accuracy in order:
        best = entry(accuracy) if better(entry(accuracy), best, 20.0) else best
    assert best == entry(20.0)
    assert better(entry(19.0), entry(5.0), 20.0)
    assert better(entry(0.0), entry(1.0), 0.0)


def stopped(**settings):
    """A run that stops, and a copy of the weights after each cycle; cycle 0 is before it."""
    seen = {}
    with pytest.warns(RuntimeWarning, match="the run has stopped, at its state of cycle") as said:
        result = forgetful(**STOPS, on_cycle=lambda c, m: seen.setdefault(c, bits(m)), **settings)
    return result, seen, said


def test_a_run_that_stops_ends_at_its_best_state():
    result, seen, said = stopped()
    fit = [e for e in result.history if e["forget_accuracy"] >= 60.0]
    cycle = min(fit, key=lambda e: e["forget_accuracy"])["cycle"]
    assert 0 < cycle < result.history[-1]["cycle"]
    assert result.history[-1]["forget_accuracy"] < 60.0
    assert same(bits(result.model), seen[cycle])
    assert result.stopped_early
    assert result.warnings == [str(said[0].message)]
    assert f"{cycle:g} (" in result.warnings[0]


def test_the_best_state_is_on_disk(tmp_path):
    path = tmp_path / "deep" / "best.pt"
    result, _, _ = stopped(best=path)
    saved = torch.load(path, weights_only=True)
    assert saved["entry"] in result.history
    assert same(saved["model"], bits(result.model))
    with pytest.warns(RuntimeWarning, match="fell below"):
        last = forgetful(eval_every=1, forget_floor=60.0, best=tmp_path / "kept.pt")
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert same(kept["model"], saved["model"])
    assert not same(kept["model"], bits(last.model))  # only "stop" puts it back


@pytest.mark.parametrize("every", [1, 100])
def test_a_run_that_was_killed_still_has_its_best_state(tmp_path, every):
    expected, _, _ = stopped()

    def kill(cycle, _):
        if cycle == expected.history[-1]["cycle"] - 1:
            raise KeyboardInterrupt

    settings = {**STOPS, "checkpoint": tmp_path, "checkpoint_every": every}
    with pytest.raises(KeyboardInterrupt):
        forgetful(on_cycle=kill, **settings)
    with pytest.warns(RuntimeWarning, match="the run has stopped"):
        resumed = forgetful(**settings)
    assert same(bits(resumed.model), bits(expected.model))
    again = forgetful(**settings)  # it stays stopped, and where it was
    assert same(bits(again.model), bits(expected.model))


def test_a_best_file_of_another_kind_is_refused(tmp_path):
    torch.save([1], tmp_path / "best.pt")
    settings = {**STOPS, "checkpoint": tmp_path, "checkpoint_every": 1}

    def kill(cycle, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forgetful(on_cycle=kill, **settings)
    torch.save([1], tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"^best: expected a file that unlearn has written"):
        forgetful(**settings)


def quiet(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*reference kernels")
        return forgetful(eval_every=1, **settings)


def test_a_forget_accuracy_that_was_below_the_floor_has_not_fallen_below():
    torch.manual_seed(1)
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    result = quiet(forget=[(x, y)], forget_floor=99.0)  # never learnt
    assert result.history[0]["forget_accuracy"] < 99.0


def pairs(labels, seed=0):
    """A blob for each class."""
    noise = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor(labels)
    inputs = 3.0 * torch.nn.functional.one_hot(labels, 6) + 0.3 * noise
    return DataLoader(TensorDataset(inputs, labels), 4)


def test_a_whole_class_may_go():
    """Known by the data sets' labels; the validation accuracy is no floor for it."""
    forget, retain = pairs([3] * 8), pairs([0, 1, 2] * 8, seed=1)
    model = sf.methods.finetune(build(), [*forget, *retain], epochs=60, lr=0.1, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*reference kernels")
        result = sf.unlearn(
            model, forget=forget, retain=retain, holdout=[next(iter(retain))], eval_every=20
        )
    assert result.history[0]["forget_accuracy"] == 100.0
    assert result.history[-1]["forget_accuracy"] < result.history[0]["val_accuracy"]


def test_what_is_known_of_labels():
    known = pairs([3, 3, 0, 1])
    assert labels_of(known) == {0, 1, 3}
    assert labels_of(DataLoader(Subset(Subset(known.dataset, [0, 1, 2]), [0, 1]))) == {3}
    pictures = Subset(known.dataset, [2, 3])
    pictures.dataset.targets = [3, 3, 0, 1]
    assert labels_of(DataLoader(pictures)) == {0, 1}
    assert labels_of([(torch.ones(2, 3), torch.tensor([1, 2]))]) is None
    assert labels_of(DataLoader(TensorDataset(torch.ones(3, 2)))) is None
    assert labels_of(DataLoader(TensorDataset(torch.ones(3, 2), torch.ones(3)))) is None
    assert share_no_label(pairs([3]), pairs([1, 2]))
    assert not share_no_label(pairs([3]), pairs([1, 3]))
    assert not share_no_label(pairs([3]), [(torch.ones(2, 3), torch.tensor([1, 2]))])
