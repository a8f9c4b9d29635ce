"""evaluation/language by hand: a model whose logits are given, and numbers worked out on paper."""

import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfron_fast.evaluation import language
from sfron_fast.evaluation.language.forget_quality import limit, paths_that_reach
from sfron_fast.evaluation.language.tokens import IGNORED, TokenStats

WORDS = 4  # tokens of the vocabulary


class Given(nn.Module):
    """After token t the next one has the logits ``table[t]``; of the batch alone."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table))

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.places = position_ids
        return SimpleNamespace(logits=self.table[input_ids])


def batch(rows, labels=None, mask=None):
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids) if mask is None else torch.tensor(mask),
        "labels": ids.clone() if labels is None else torch.tensor(labels),
        "id": torch.arange(len(rows)),
    }


def of_probabilities(rows, correct=None):
    """Statistics of tokens with these probabilities, of which some are put first."""
    flat = torch.tensor([p for row in rows for p in row], dtype=torch.float64)
    right = [[True] * len(row) for row in rows] if correct is None else correct
    return TokenStats(
        flat.log(),
        torch.tensor([c for row in right for c in row]),
        torch.zeros_like(flat),
        torch.ones_like(flat),
        torch.tensor([len(row) for row in rows]),
    )


def test_every_labelled_token_once_and_shifted():
    """After token 0 tokens 0 to 3 have 1/2, 1/4, 1/8, 1/8; after token 1 token 3 follows."""
    table = torch.log(torch.tensor([[4, 2, 1, 1], [0, 0, 0, 8], [2, 2, 2, 2], [1, 1, 1, 5]]) / 8.0)
    rows = [[0, 1, 3, 2], [2, 0, 0, 0]]  # padding is token 0 too
    labels = [[IGNORED, 1, 3, IGNORED], [IGNORED, 0, IGNORED, IGNORED]]
    stats = language.token_stats(Given(table), [batch(rows, labels)])
    assert stats.lengths.tolist() == [2, 1]
    torch.testing.assert_close(
        stats.logp, torch.tensor([0.25, 1.0, 0.25]).double().log(), atol=1e-7, rtol=0
    )
    assert stats.correct.tolist() == [False, True, True]
    entropy = 1.75 * math.log(2)  # 1/2 ln 2 + 1/4 ln 4 + 2/8 ln 8; of a sure token 0; of 4 ln 4
    wanted = torch.tensor([entropy, 0.0, math.log(4)]).double()
    torch.testing.assert_close(stats.entropy, wanted, atol=1e-6, rtol=0)
    # log2 p = -1, -2, -3, -3 with weights 4, 2, 1, 1 of 8: E x^2 - (E x)^2 = 30/8 - 49/16 = 11/16
    wanted = torch.tensor([11 / 16 * math.log(2) ** 2, 0.0, 0.0]).double()
    torch.testing.assert_close(stats.variance, wanted, atol=1e-6, rtol=0)
    p = language.answer_probability(stats)
    torch.testing.assert_close(p, torch.tensor([0.5, 0.25]).double(), atol=1e-7, rtol=0)


def test_padding_and_batch_size_change_nothing():
    model = Given(torch.randn(WORDS, WORDS))
    model.train()
    short = batch([[1, 2, 3]], [[IGNORED, 2, 3]])
    left = batch([[0, 0, 1, 2, 3]], [[IGNORED] * 3 + [2, 3]], [[0, 0, 1, 1, 1]])
    right = batch([[1, 2, 3, 0]], [[IGNORED, 2, 3, IGNORED]], [[1, 1, 1, 0]])
    wanted = language.token_stats(model, [short])
    for other in (left, right):
        assert torch.equal(language.token_stats(model, [other]).logp, wanted.logp)
    assert model.training
    language.token_stats(model, [left])
    assert model.places.tolist() == [[0, 0, 0, 1, 2]]
    both = language.token_stats(model, [short, right])
    assert both.lengths.tolist() == [2, 2]


def test_packed_rows_are_cut_into_samples():
    model = Given(torch.randn(WORDS, WORDS))
    apart = language.token_stats(model, [batch([[1, 2, 3], [3, 0, 1]])])
    row = batch([[1, 2, 3, 3, 0, 1]])
    del row["attention_mask"], row["id"]
    packed = language.token_stats(
        model, [row | {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}]
    )
    assert packed.lengths.tolist() == [2, 2]
    assert torch.equal(packed.logp, apart.logp)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            (torch.zeros(2, 3), torch.zeros(2)),
            "forget: expected mappings with input_ids and labels, found tuple",
        ),
        ({"input_ids": torch.zeros(1, 3).long()}, "forget: expected batches with labels"),
        (
            batch([[0, 1]]) | {"labels": torch.zeros(1, 2)},
            "forget: expected labels that are an int64",
        ),
        (batch([[0, 1]], [[0, WORDS]]), f"labels 0 to {WORDS - 1}, or -100, found {WORDS}"),
        (batch([[0, 1]], [[1, IGNORED]]), "1 samples with none"),
    ],
)
def test_other_batches_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        language.token_stats(Given(torch.zeros(WORDS, WORDS)), [wrong], name="forget")


def test_a_diverged_model_and_an_empty_loader_are_refused():
    with pytest.raises(ValueError, match="finite logits"):
        language.token_stats(Given(torch.full((WORDS, WORDS), torch.nan)), [batch([[0, 1]])])
    with pytest.raises(ValueError, match="at least one sample"):
        language.token_stats(Given(torch.zeros(WORDS, WORDS)), [])


def test_truth_ratio_and_options():
    right = of_probabilities([[0.5, 0.5], [0.1, 0.4]])  # .5 and .2
    wrong = of_probabilities([[0.125], [0.5], [0.4], [0.1]])  # geometric means .25 and .2
    ratios = language.truth_ratio(right, wrong)
    torch.testing.assert_close(ratios, torch.tensor([0.5, 1.0]).double())
    options = language.option_probability(right, wrong)  # .5 / 1.125 and .2 / .7
    torch.testing.assert_close(options, torch.tensor([4 / 9, 2 / 7]).double())
    four = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    assert language.closer_to_one(four) == pytest.approx((0.5 + 1.0 + 0.5 + 0.25) / 4)
    assert language.true_is_better(four) == pytest.approx(0.5 / 4)
    with pytest.raises(ValueError, match="each of 2 questions, found 3"):
        language.truth_ratio(right, of_probabilities([[0.1], [0.1], [0.1]]))


def test_model_utility():
    assert language.model_utility([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert language.model_utility([1.0, 0.0]) == 0.0
    with pytest.raises(ValueError, match="values"):
        language.model_utility([math.nan])


def test_memorization_drops_the_last_token():
    t, f = True, False
    correct = [[t, f, t, t, f], [t, t, f, f], [t, t, f]]
    stats = of_probabilities([[0.5] * len(row) for row in correct], correct)
    found = language.exact_memorization(stats)
    torch.testing.assert_close(found, torch.tensor([3 / 4, 2 / 3, 1.0]).double())
    # prefixes 2 of 4; none of 3, which counts as 2; 0 of 2
    found = language.extraction_strength(stats)
    torch.testing.assert_close(found, torch.tensor([2 / 4, 1 / 3, 1.0]).double())
    with pytest.raises(ValueError, match="two labelled tokens"):
        language.exact_memorization(of_probabilities([[0.5, 0.5], [0.5]]))


def test_min_k():
    """Five tokens, the last of which does not count: of four the share .5 is the two least."""
    stats = of_probabilities([[0.5, 0.1, 0.9, 0.4, 1e-9], [0.25, 1e-9]])
    found = language.min_k(stats, k=0.5)
    wanted = torch.tensor([(math.log(0.1) + math.log(0.4)) / 2, math.log(0.25)]).double()
    torch.testing.assert_close(found, wanted)
    assert language.min_k(stats)[0] == pytest.approx(math.log(0.1))  # floor(.4 * 4) = 1
    with pytest.raises(ValueError, match="k: expected a number in"):
        language.min_k(stats, k=0.0)


def test_min_k_plus_plus():
    logp = torch.tensor([-1.0, -3.0, -2.0, -9.0]).double()
    entropy = torch.tensor([2.0, 1.0, 2.0, 0.0]).double()
    variance = torch.tensor([4.0, 0.25, 0.0, 1.0]).double()  # of a sure token none: 1e-6
    stats = TokenStats(logp, logp > 0, entropy, variance, torch.tensor([4]))
    # .5, -4, 0 of those that count
    assert language.min_k_plus_plus(stats, k=0.4).tolist() == [-4.0]
    assert language.min_k_plus_plus(stats, k=1.0)[0] == pytest.approx(-3.5 / 3)


def test_auc_and_privleak():
    members, others = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0, 0.0])
    # 3 is above all three; 1 is above one and ties with one: (3 + 1.5) / 6
    assert language.auc(members, others) == pytest.approx(0.75)
    assert language.auc(others, members) == pytest.approx(0.25)
    assert language.privleak(1.0, 0.5) == -100.0
    assert language.privleak(0.5, 0.5) == 0.0
    assert language.privleak(0.065, 0.519) == pytest.approx(94.4, abs=0.1)
    with pytest.raises(ValueError, match="retrained"):
        language.privleak(0.5, 1.0)
    with pytest.raises(ValueError, match="1 NaN"):
        language.auc(members, torch.tensor([math.nan]))


def test_forget_quality_by_hand():
    low, high = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    # 2 of the 6 orders of two and two separate them
    assert language.forget_quality(low, high) == (1.0, pytest.approx(1 / 3))
    # x y y x reaches .5, as all orders do
    assert language.forget_quality(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0])) == (0.5, 1.0)
    # one against three, the one at an end: 2 of 4 orders
    assert language.forget_quality(torch.tensor([0.0]), torch.tensor([1.0, 2.0, 3.0])) == (1.0, 0.5)
    assert language.forget_quality(low, low) == (0.0, 1.0)  # ties are no gap


def test_forget_quality_counts_all_orders():
    """Every order of 4 and 3 values, one by one."""
    gaps = []
    for own in combinations(range(7), 4):
        others = [place for place in range(7) if place not in own]
        found = language.forget_quality(torch.tensor(own) * 1.0, torch.tensor(others) * 1.0)
        gaps.append((found.distance, found.p_value))
    for distance, p_value in gaps:
        assert p_value == sum(other >= distance for other, _ in gaps) / 35


def test_forget_quality_of_many():
    """Values of scipy 1.17's ks_2samp and kstwobign."""
    assert paths_that_reach(80, 80, 20 * 80) == pytest.approx(0.013191885548795407, rel=1e-9)
    assert paths_that_reach(13, 40, 200) == pytest.approx(0.08322628397381164, rel=1e-9)
    assert paths_that_reach(80, 80, 6400) == 2 / math.comb(160, 80)  # 2e-47
    assert limit(400, 400, 16_000) == pytest.approx(0.03663105270711935, rel=1e-9)
    assert limit(10, 10, 0) == limit(10, 10, 1) == 1.0


def test_rouge_by_hand():
    # police ... the gunman of the reference come back in order, 3 of 4; of the text's 5 words 3
    found = language.rouge_l("Police ended, at the GUNMAN", "police killed the gunman")
    assert found == (0.75, 0.6, pytest.approx(2 / 3))
    assert language.rouge_l("gunman the", "the gunman").recall == 0.5  # out of order
    assert language.rouge_l("", "the gunman") == (0.0, 0.0, 0.0)
    assert language.rouge_l("élan d'été", "Élan, d été") == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="reference"):
        language.rouge_l("text", "...")


class Counting(nn.Module):
    """Generates last token + 1, + 2 and + 3 after each prompt, and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, **rest):
        self.given = input_ids.tolist(), attention_mask.tolist(), pad_token_id, rest
        more = input_ids[:, -1:] + torch.arange(1, 1 + min(3, max_new_tokens))
        return torch.cat([input_ids, more], dim=1)


class Letters:
    """Token 1 is "a", 2 "b" ...; 0 pads."""

    pad_token_id, eos_token_id = None, 0

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(chr(96 + int(t)) for t in row if t > 0) for row in rows]


def test_questions_are_padded_on_the_left():
    model = Counting()
    rows = [[5, 6, 7, 8, 9], [1, 2, 9, 0, 0]]
    labels = [[IGNORED, IGNORED, IGNORED, 8, 9], [IGNORED, IGNORED, 9, IGNORED, IGNORED]]
    mask = [[1] * 5, [1, 1, 1, 0, 0]]
    loader = [batch(rows, labels, mask)]
    told, wanted = language.answers(model, Letters(), loader)
    assert model.given[:3] == ([[5, 6, 7], [0, 1, 2]], [[1, 1, 1], [0, 1, 1]], 0)
    assert model.given[3] == {"do_sample": False, "num_beams": 1}
    assert (told, wanted) == (["h i j", "c d e"], ["h i", "i"])
    scores = language.rouge_scores(model, Letters(), loader, max_new_tokens=1)
    assert [score.recall for score in scores] == [0.5, 0.0]
    with pytest.raises(ValueError, match="a question before each answer"):
        language.answers(model, Letters(), [batch([[1, 2]])])
    with pytest.raises(ValueError, match="generate"):
        language.answers(Given(torch.zeros(2, 2)), Letters(), loader)
