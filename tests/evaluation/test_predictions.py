"""Running models over loaders: flags, refusals, the whole evaluation, and the stopwatch."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest
import torch
from paths import ROOT
from torch import nn

from sfron_fast import evaluation as ev
from sfron_fast.runs.stopwatch import Stopwatch


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def batches(n=30, seed=0, size=7):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)
    return list(zip(x.split(size), y.split(size), strict=True))


def test_predict_is_the_eval_mode_forward():
    model, data = network(), batches()
    p = ev.predict(model.train(), data)
    expected = model.eval()(torch.cat([x for x, _ in data]))
    torch.testing.assert_close(p.logits, expected.detach(), rtol=1e-5, atol=1e-6)
    assert p.labels.tolist() == [int(y) for _, batch in data for y in batch]
    assert p.logits.dtype == torch.float32
    assert not p.logits.requires_grad


def test_predict_restores_training_flags_and_leaves_buffers():
    model = network().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ev.predict(model, batches())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="loader"):
        ev.predict(model, [])
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    model.eval()
    model[2].train()
    ev.predict(model, batches())
    assert [m.training for m in model.modules()] == [False, False, False, True, False]


def test_predict_undoes_what_eval_of_an_overriding_module_did():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(4, 3)).train()
    ev.predict(model, batches())
    assert not model[0].merged


def test_predict_widens_half_precision():
    model = nn.Linear(4, 3).bfloat16()
    p = ev.predict(model, [(x.bfloat16(), y.int()) for x, y in batches()])
    assert (p.logits.dtype, p.labels.dtype) == (torch.float32, torch.int64)


class Constant(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


NAN = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
REFUSED = {
    "integer logits": (
        torch.zeros(2, 3, dtype=torch.long),
        torch.tensor([0, 1]),
        "floating-point logits",
    ),
    "one logit": (torch.zeros(2, 1), torch.tensor([0, 0]), r"classes >= 2.*\(2, 1\)"),
    "not a tensor": ({"logits": torch.zeros(2, 3)}, torch.tensor([0, 1]), "logits.*dict"),
    "NaN": (NAN, torch.tensor([0, 1]), "finite logits.*1 of 2 rows.*diverged"),
    "all off": (torch.full((2, 3), -math.inf), torch.tensor([0, 1]), "finite logits.*2 of 2"),
    "inf": (torch.full((2, 3), math.inf), torch.tensor([0, 1]), "finite logits.*2 of 2"),
    "label too large": (
        torch.zeros(2, 3),
        torch.tensor([0, 3]),
        r"labels in \[0, 3\), found \[3\]",
    ),
    "label negative": (
        torch.zeros(2, 3),
        torch.tensor([-1, 2]),
        r"labels in \[0, 3\), found \[-1\]",
    ),
    "one-hot labels": (torch.zeros(2, 3), torch.eye(2), "integer labels.*argmax"),
    "label count": (torch.zeros(2, 3), torch.tensor([0, 1, 2]), "2 labels, found 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_predict_refuses(case):
    output, labels, message = REFUSED[case]
    with pytest.raises(ValueError, match="loader: expected .*" + message):
        ev.predict(Constant(output), [(torch.zeros(2, 4), labels)])


def test_predict_refuses_batches_that_are_not_pairs():
    x, y = batches()[0]
    for batch in (x, (x, y, y), {"x": x}):
        with pytest.raises(ValueError, match=r"loader: expected batches \(inputs, targets\)"):
            ev.predict(network(), [batch])


def test_a_class_may_be_switched_off():
    """-inf logits, as of a class that is gone, are no divergence; every metric stays a number."""

    class Off(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = network()

        def forward(self, x):
            return self.plain(x).index_fill(1, torch.tensor([1]), -math.inf)

    model, sets = Off(), loaders()
    p = ev.predict(model, sets["holdout"])
    kept = p.logits[:, [0, 2]].double().log_softmax(1)
    torch.testing.assert_close(ev.entropy(p), -(kept.exp() * kept).sum(1))
    assert ev.modified_entropy(p)[p.labels == 1].min() > 1000  # log p of the label counts as -1000
    assert ev.per_sample_loss(p)[p.labels == 1].min() == math.inf
    whole = ev.predict(model.plain, sets["holdout"])
    assert ev.kl_divergence(p, p) == 0
    assert 0 < ev.kl_divergence(p, whole) < math.inf
    assert ev.kl_divergence(whole, p) == math.inf
    assert all(math.isfinite(value) for value in ev.evaluate(model, **sets).values())


def test_predictions_refuse_other_types():
    with pytest.raises(ValueError, match=r"Predictions.*float64.*\.float\(\)"):
        ev.Predictions(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels in \[0, 3\)"):
        ev.Predictions(torch.zeros(2, 3), torch.tensor([0, 7]))


def loaders():
    return {
        "forget": batches(20, 1),
        "retain": batches(60, 2),
        "holdout": batches(40, 3),
    }


@pytest.mark.parametrize("name", ["forget", "retain", "holdout"])
def test_evaluate_names_the_empty_loader(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least one batch"):
        ev.evaluate(network(), **{**loaders(), name: []})


def test_evaluate_without_reference():
    metrics = ev.evaluate(network(), **loaders())
    assert list(metrics) == ["FA", "RA", "TA", "MIA", "MIA_m"]
    assert ev.evaluate(network(), **loaders(), rte=2)["RTE"] == 2.0


@pytest.mark.checklist("H7")
def test_evaluate_with_reference():
    model, reference = network(), network()
    nn.init.normal_(reference[3].weight)
    metrics = ev.evaluate(model, **loaders(), reference=reference, rte=1.5)
    assert set(metrics) == set(ev.METRICS)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    mine, target = ev.collect(model, **loaders()), ev.collect(reference, **loaders())
    assert metrics["FA"] == ev.accuracy(mine.forget)
    assert metrics["RA"] == ev.accuracy(mine.retain)
    three = {"forget": mine.forget, "retain": mine.retain, "holdout": mine.holdout}
    assert metrics["TA"] == ev.accuracy(mine.holdout)
    assert metrics["MIA"] == ev.mia_entropy(**three)
    assert metrics["MIA_m"] == ev.mia_modified_entropy(**three)
    for name in ("forget", "retain", "holdout"):
        assert (
            metrics["D_KL_test" if name == "holdout" else f"D_KL_{name}"]
            == ev.kl_divergence(getattr(target, name), getattr(mine, name))
            > 0
        )
    other = ev.evaluate(reference, **loaders())
    gaps = [abs(metrics[name] - other[name]) for name in ("FA", "RA", "TA", "MIA")]
    assert metrics["Avg.D"] == pytest.approx(sum(gaps) / 4)
    assert metrics["Avg.D"] > 0


def test_evaluate_of_the_reference_itself():
    metrics = ev.evaluate(network(), **loaders(), reference=network())
    assert [metrics[f"D_KL_{name}"] for name in ("forget", "retain", "test")] == [0.0, 0.0, 0.0]
    assert metrics["Avg.D"] == 0.0


def test_score_equals_evaluate_and_a_collected_reference_is_not_run_again():
    model, reference = network(), network()
    nn.init.normal_(reference[3].weight)
    cached = ev.collect(reference, **loaders())
    expected = ev.evaluate(model, **loaders(), reference=reference, rte=3.0)
    reference.register_forward_pre_hook(lambda *_: pytest.fail("the reference ran again"))
    assert ev.evaluate(model, **loaders(), reference=cached, rte=3.0) == expected
    assert ev.score(ev.collect(model, **loaders()), cached, 3.0) == expected


def test_evaluate_refuses_another_kind_of_reference():
    with pytest.raises(
        ValueError, match="reference: expected a model, an Evaluated or None, found dict"
    ):
        ev.evaluate(network(), **loaders(), reference={"FA": 1.0})


def test_importing_evaluation_needs_no_scikit_learn():
    code = "import sys; sys.modules['sklearn'] = None; import sfron_fast.evaluation"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_stopwatch_leaves_out_pauses(clock):
    with Stopwatch() as watch:
        clock[0] += 2
        with watch.pause():
            clock[0] += 10
            with watch.pause():
                clock[0] += 20
            clock[0] += 40
            assert watch.seconds == 2
        clock[0] += 3
        assert watch.seconds == 5
    clock[0] += 100
    with watch.pause():
        clock[0] += 100
    assert watch.seconds == 5
    with watch:
        clock[0] += 1
    assert watch.seconds == 6


def test_stopwatch_runs_on_after_an_error_in_a_pause(clock):
    def validate():
        clock[0] += 10
        raise KeyError

    with Stopwatch() as watch:
        with pytest.raises(KeyError), watch.pause():
            validate()
        clock[0] += 1
    assert watch.seconds == 1


def test_stopwatch_waits_for_the_device(monkeypatch, clock):
    seen = []

    def synchronize(device):
        seen.append(device)
        clock[0] += 5  # queued work that finishes while we wait

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with Stopwatch("cuda:1") as watch:
        clock[0] += 1
    assert seen == ["cuda:1", "cuda:1"]
    assert watch.seconds == 6
