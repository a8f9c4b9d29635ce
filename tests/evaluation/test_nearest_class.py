"""MIA-NN on outputs made up for it: whose samples are taken for the nearest class's."""

import pytest
import torch

from sfron_fast.evaluation import NearestClassAttack, Predictions

pytest.importorskip("sklearn")
CLASSES, EACH, GONE, NEAR = 5, 40, 1, 3
LABELS = torch.arange(CLASSES).repeat_interleave(EACH)


def predictions(seed, near, others=None, sharp=8.0):
    """A model that knows all classes but one, and says NEAR of ``near`` of that one's 40 samples,
    something else of the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(LABELS), CLASSES, generator=generator)
    said = LABELS.clone()
    said[LABELS == GONE] = torch.tensor([NEAR] * near + [0] * (EACH - near))
    logits[torch.arange(len(LABELS)), said] += sharp
    logits[:, GONE] -= 20.0
    return Predictions(logits, LABELS)


NEARS = (30, 28, 32, 30)
REFERENCES = [predictions(seed, near) for seed, near in enumerate(NEARS)]


@pytest.fixture(scope="module")
def attack():
    return NearestClassAttack(REFERENCES, forgotten=GONE)


def test_shares_are_counts_of_what_looks_like_the_nearest_class(attack):
    assert attack.nearest == NEAR
    expected = torch.tensor(NEARS, dtype=torch.float64) / EACH
    torch.testing.assert_close(attack.shares, expected, rtol=0, atol=1e-12)
    assert attack.share(predictions(9, 10)) == pytest.approx(10 / EACH)
    assert attack.share(predictions(9, 0)) == 0.0


def test_distance_is_in_spreads_of_the_references(attack):
    shares = torch.tensor(NEARS, dtype=torch.float64) / EACH
    spread = max(shares.std().item(), 1 / EACH)
    expected = abs(10 / EACH - shares.mean().item()) / spread
    assert attack.distance(predictions(9, 10)) == pytest.approx(expected)
    assert attack.distance(predictions(9, 31)) < 1.0


def test_references_that_agree_are_not_believed_below_one_sample():
    alike = NearestClassAttack([predictions(s, 30) for s in range(3)], forgotten=GONE)
    assert alike.spread == 1 / EACH
    assert alike.distance(predictions(9, 27)) == pytest.approx(3.0)


def test_a_flat_output_looks_like_no_class(attack):
    flat = Predictions(torch.zeros(len(LABELS), CLASSES), LABELS)
    assert attack.share(flat) == 0.0
    assert attack.distance(flat) > 10.0


def test_the_forgotten_classes_own_logit_is_not_looked_at(attack):
    p = predictions(9, 20)
    loud = p.logits.clone()
    loud[:, GONE] = 50.0
    off = p.logits.clone()
    off[:, GONE] = -torch.inf
    for logits in (loud, off):
        assert attack.share(Predictions(logits, LABELS)) == attack.share(p)


def test_a_reference_left_out_is_judged_by_the_others():
    """One that calls NEAR's samples 0 and its own NEAR's turns its own regression around."""
    odd = predictions(5, 30)
    swapped = odd.logits.clone()
    swapped[LABELS == NEAR], swapped[LABELS == 0] = odd.logits[LABELS == 0], odd.logits[
        LABELS == NEAR
    ]  # fmt: skip
    found = NearestClassAttack([*REFERENCES, Predictions(swapped, LABELS)], forgotten=GONE)
    assert found.shares[-1] == pytest.approx(30 / EACH)


@pytest.mark.parametrize(
    ("argument", "references", "forgotten"),
    [
        ("references", REFERENCES[:2], GONE),
        ("forgotten", REFERENCES, CLASSES),
        ("references", [Predictions(torch.randn(4, 2), torch.arange(4) % 2)] * 3, 0),
        ("references", [Predictions(torch.randn(4, 3), torch.arange(4) % 2)] * 3, 2),
        ("references", [*REFERENCES, Predictions(torch.randn(3, CLASSES), LABELS[:3])], GONE),
    ],
)
def test_bad_input_is_named(argument, references, forgotten):
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        NearestClassAttack(references, forgotten=forgotten)


def test_predictions_on_other_samples_are_refused(attack):
    with pytest.raises(ValueError, match=r"^p: expected predictions on the same samples"):
        attack.share(Predictions(torch.randn(3, CLASSES), LABELS[:3]))
