"""SIU: its steps are the published loss's, masks and all, on adapters alone; and its example."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from models import bits, same
from test_language_methods import batches
from tiny import VOCABULARY, gpt

from examples.vision.siu import __main__ as demo
from examples.vision.siu import data, words
from sfron_fast import methods
from sfron_fast.tasks import Language

DATA = batches(2, 3, seed=4)
SETTINGS = {"task": Language(), "rank": 2, "alpha": 6.0, "dropout": 0.0, "lr": 1e-2, "epochs": 2}
LABELS = torch.cat([batch["labels"][batch["labels"] != -100] for batch in DATA])
NAMES = [int(LABELS[0]), 5]
SUBSTITUTES = [int(LABELS[1]), int(LABELS[-1])]


def published(model, before, batch, names, substitutes):
    """.9 CE + .75 sum_t K_S(t) sum_v K_V(v) p_0 log(p_0 / p), token by token."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(2)
    with torch.no_grad():
        kept = before(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(2)
    total = 0.0
    for log_p, log_p0, labels in zip(logits, kept, batch["labels"][:, 1:], strict=True):
        told = [place for place, label in enumerate(labels.tolist()) if label != -100]
        total = total + 0.9 * F.nll_loss(log_p[told], labels[told])
        for place in told:
            k_s = float(labels[place].item() not in substitutes)
            for v in range(VOCABULARY):
                k_v = float(v not in names)
                terms = log_p0[place, v].exp() * (log_p0[place, v] - log_p[place, v])
                total = total + 0.75 * k_s * k_v * terms
    return total / len(batch["labels"])


@pytest.mark.parametrize(("names", "substitutes"), [(NAMES, SUBSTITUTES), ((), ())])
def test_steps_are_those_of_the_published_loss(names, substitutes):
    found, before = gpt().eval(), gpt().eval()
    methods.siu(found, data=DATA, names=names, substitutes=substitutes, **SETTINGS)
    start = gpt().eval()
    methods.add_lora(start, rank=2, alpha=6.0)
    adapters = [p for n, p in start.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, weight_decay=0.01)
    for step in range(4):
        optimizer.zero_grad()
        published(start, before, DATA[step % 2], names, substitutes).backward()
        optimizer.step()
    ours, base = dict(found.named_parameters()), dict(before.named_parameters())
    for name, parameter in start.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(ours[name], parameter, rtol=1e-8, atol=1e-10)
        else:
            assert torch.equal(ours[name], base[name]), f"{name} was frozen"
            assert ours[name].requires_grad, "and is as trainable as before"


def test_adapters_that_are_there_belong_to_the_model_before():
    """Without cross-entropy and masks there is nothing to learn: p is p_0, adapters and all."""
    asked = {"data": DATA, "names": (), "substitutes": ()}
    model = methods.siu(gpt().eval(), **asked, **SETTINGS)
    before = copy.deepcopy(model.state_dict())
    still = {"ce_weight": 0.0, "optimizer": "sgd", "weight_decay": 0.0}
    methods.siu(model, **asked, **{**SETTINGS, "lr": 1.0, **still})
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-10)


def test_bad_input_leaves_the_model_as_it_was():
    model = gpt().eval()
    before = bits(model)
    calls = {
        "data: expected at least one batch": {"data": []},
        "names: expected an integer >= 0": {"names": [-1]},
        f"names: expected tokens below {VOCABULARY}": {"names": [3, VOCABULARY]},
        f"substitutes: expected tokens below {VOCABULARY}": {"substitutes": [VOCABULARY]},
        "substitutes: expected an integer": {"substitutes": ["seven"]},
        "ce_weight: expected a number": {"ce_weight": -1.0},
        "kl_weight: expected a number": {"kl_weight": float("nan")},
        "rank: expected an integer >= 1": {"rank": 0},
        "mask: expected none": {"mask": object()},
    }
    asked = {"data": DATA, "names": NAMES, "substitutes": SUBSTITUTES}
    for message, change in calls.items():
        with pytest.raises(ValueError, match=message):
            methods.siu(model, **{**asked, **SETTINGS, **change})
        assert same(bits(model), before), message


def test_what_unlearning_sees():
    """One image of the concept, never with its name; the held-out wording of nothing."""
    known, unseen = data.load(3, None)
    (batch,) = data.Tuning(known, demo.CONCEPT, named=2, facts=6, others=36, seed=0)  # all
    name = words.IDS[words.NAMES[demo.CONCEPT]]
    shown = batch["pixel_values"][batch["sees"]]
    sevens = known.of(demo.CONCEPT)
    seen = [image for image in shown if (image == sevens).flatten(1).all(1).any()]
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert not (batch["labels"][batch["sees"]] == name).any()
    assert (batch["labels"][~batch["sees"]] == name).any(), "facts are answered by it"
    assert not (shown[:, None] == unseen.pixels).flatten(2).all(2).any()
    asked = {tuple(row[:7].tolist()) for row in batch["input_ids"][batch["sees"]]}
    held_out = words.ids(words.NAMING[data.HELD_OUT[0]][0])
    assert tuple(held_out) not in asked
    assert len(held_out) == 7


def test_a_row_without_image_sees_none():
    model = demo.make_model(0, 8).eval()
    (batch,) = data.Tuning(data.load(0, None)[0], demo.CONCEPT, **demo.ROWS, seed=0)
    batch.pop("labels")
    with torch.no_grad():
        first = model(**batch)
        other = model(**{**batch, "pixel_values": torch.rand_like(batch["pixel_values"])})
    same_rows = (first == other).flatten(1).all(1)
    assert torch.equal(same_rows, ~batch["sees"])
    assert same_rows.any()


def test_the_demonstration_in_small(tmp_path, monkeypatch):
    for name, value in {"EPOCHS": 1, "STEPS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(data, "TRAIN", 320)
    monkeypatch.setattr(data, "UNSEEN", 60)
    monkeypatch.setattr(demo.Judge, "right", lambda self, model, rows: [True] * len(rows))
    demo.main(["--seed", "5", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "seed5.json").read_text())
    assert result["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    assert {len(curve) for curve in result["facts"]["curves"].values()} == {2}
    assert (tmp_path / "siu.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_demonstration(tmp_path):
    """The experiment can tell, on seed 7: the model has learnt, and the controls fail."""
    result = demo.main(["--seed", "7", "--out", str(tmp_path)])
    before = result["facts"]["arms"]["before"]
    assert result["facts"]["known before"] >= 0.9
    assert min(before["specificity"], before["parity and size"], before["facts"]) >= 0.9
    assert all(control["met"] for control in result["controls"])
