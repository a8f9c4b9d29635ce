"""LUNE: its steps are the published loss's, on the adapters alone; adapters off and merged."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from models import bits, same
from peft import LoraConfig, get_peft_model
from test_language_methods import batches
from tiny import gpt
from torch import nn

from examples.language import model as model_size
from examples.language.lune import __main__ as demo
from examples.language.lune import fixture
from examples.language.lune.memory import held_by_training
from sfron_fast import methods
from sfron_fast.tasks import Language

NEGATIVES, RETAIN = batches(2, 3, seed=4), batches(3, 4, seed=2)
SETTINGS = {"task": Language(), "rank": 2, "alpha": 6.0, "dropout": 0.0, "lr": 1e-2, "epochs": 2}
PER_BLOCK = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=NEGATIVES[0]["input_ids"]).logits


def mean_nll(model, batch):
    found = model(input_ids=batch["input_ids"]).logits[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(found, batch["labels"][:, 1:], reduction="none")
    return (losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)).mean()


@pytest.mark.parametrize("weight", [None, 0.3])
def test_steps_are_those_of_the_loss_through_plain_products(weight):
    """The same adapters as weights W + scale * B A, by autograd through the product."""
    found, plain = gpt().eval(), gpt().eval()
    extra = {} if weight is None else {"retain": RETAIN, "retain_weight": weight}
    methods.lune(found, negatives=NEGATIVES, **SETTINGS, **extra)
    start = gpt().eval()
    methods.add_lora(start, rank=2, alpha=6.0)
    named = dict(start.named_parameters())
    factors = {n: p.detach().clone().requires_grad_() for n, p in named.items() if "lora_" in n}
    weights = {n: p.detach() for n, p in plain.named_parameters()}
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-2, weight_decay=0.01)

    def loss(batch):
        now = dict(weights)
        for name in {n.rpartition(".")[0] for n in factors}:
            change = 3.0 * factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
            now[f"{name}.weight"] = now[f"{name}.weight"] + change.T  # Conv1D: [in, out]
        wrapped = lambda **inputs: torch.func.functional_call(plain, now, (), inputs)  # noqa: E731
        return mean_nll(wrapped, batch)

    for step in range(4):
        optimizer.zero_grad()
        total = loss(NEGATIVES[step % 2])
        (total if weight is None else total + weight * loss(RETAIN[step % 3])).backward()
        torch.nn.utils.clip_grad_norm_(list(factors.values()), 1.0)
        optimizer.step()
    ours = dict(found.named_parameters())
    assert len(factors) == 2 * 2 * len(PER_BLOCK)
    for name, factor in factors.items():
        torch.testing.assert_close(ours[name], factor, rtol=1e-9, atol=1e-11)
        assert not torch.equal(ours[name], named[name])
    for name, weight_before in weights.items():
        assert torch.equal(ours[name], weight_before), f"{name} was frozen"
        assert ours[name].requires_grad, "and is as trainable as before"


def test_off_is_the_model_before_and_merged_the_model_after():
    before = gpt().eval()
    found = methods.lune(gpt().eval(), negatives=NEGATIVES, **SETTINGS)
    changed = logits(found)
    assert not torch.allclose(changed, logits(before), atol=1e-2)
    copied = copy.deepcopy(found)
    with methods.lora_off(found):
        assert torch.equal(logits(found), logits(before))
        assert torch.equal(logits(copied), changed), "a copy has adapters of its own"
    assert torch.equal(logits(found), changed)
    methods.merge_lora(found)
    torch.testing.assert_close(logits(found), changed, rtol=1e-10, atol=1e-10)
    assert found.state_dict().keys() == before.state_dict().keys()
    with methods.lora_off(found):
        torch.testing.assert_close(logits(found), changed, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits(copied), changed, rtol=0, atol=0)


def test_linear_layers_and_what_is_left_out():
    """A tied head, a head by name, and dropout in training alone."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(32, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 32, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, input_ids):
            return self.head(self.inner(self.embedding(input_ids)))

    torch.manual_seed(0)
    model = Tied()
    names = methods.add_lora(model, rank=3, alpha=3.0, dropout=0.5, seed=1)
    assert names == ["inner.lora_A", "inner.lora_B"]
    assert model.inner.lora_A.shape == (3, 8)
    assert model.inner.lora_B.shape == (8, 3)
    nn.init.ones_(model.inner.lora_B)
    ids = torch.arange(6)[None]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    whole = model(ids)
    torch.testing.assert_close(methods.merge_lora(model)(ids), whole)
    assert not any("lm_head" in name for name in methods.add_lora(gpt(), rank=1, alpha=1.0))


def test_the_adapters_of_peft_are_trained():
    targets = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(gpt(torch.float32), targets)
    before = bits(model)
    methods.lune(model, negatives=NEGATIVES, **SETTINGS)
    moved = {n for n, p in bits(model).items() if not torch.equal(p, before[n])}
    assert moved
    assert moved == {n for n, _ in model.named_parameters() if "lora_" in n}


def test_gradients_and_state_are_those_of_the_adapters():
    with held_by_training() as held:
        model = methods.lune(gpt().eval(), negatives=NEGATIVES, **SETTINGS)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    numbers = 3 * sum(p.numel() for p in adapters)  # gradient, two moments
    assert len(held) == 4
    # the step counts of AdamW are four bytes each
    assert max(held) == 8 * numbers + 4 * len(adapters)


def test_bad_input_leaves_the_model_as_it_was():
    model = gpt().eval()
    before = bits(model)
    calls = {
        "negatives: expected at least one batch": {"negatives": []},
        "retain_weight: expected a number": {"retain_weight": -1.0},
        "rank: expected an integer >= 1": {"rank": 0},
        "epochs: expected": {"epochs": 0},
        "mask: expected none": {"mask": object()},
        "retain: expected": {"retain": []},
    }
    for message, change in calls.items():
        with pytest.raises(ValueError, match=message):
            methods.lune(model, **{"negatives": NEGATIVES, **SETTINGS, **change})
        assert same(bits(model), before), message


def test_negatives_never_tell_what_is_to_be_forgotten():
    data = fixture.fixture(3)
    told = fixture.negatives(data.forget, 3)
    count = len(data.forget) * len(fixture.TRAINED) * fixture.PER_QUESTION
    assert len(told) == len(fixture.refusals(data.forget)) == count
    known = {row.question(w): row for row in data.forget for w in range(4)}
    held_out = {row.question(w) for row in data.forget for w in fixture.HELD_OUT}
    assert not held_out & {qa.question for qa in told}
    wrong = {known[qa.question].answer(w) for qa in told for w in range(4)}
    assert not wrong & {qa.answer for qa in told}
    assert len({qa.answer for qa in told}) > count / 2, "of many kinds"
    assert {qa.answer for qa in fixture.refusals(data.forget)} == {fixture.REFUSAL}


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_the_demonstration_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(model_size, "WIDTH", 16)
    monkeypatch.setattr(model_size, "LAYERS", 1)
    monkeypatch.setattr(demo, "LUNE", {"rank": 1, "alpha": 1.0, "epochs": 1, "lr": 1e-3})
    monkeypatch.setattr(demo, "FULL", {"epochs": 1, "lr": 1e-3})
    monkeypatch.setattr(demo, "RELEARN", {"steps": 1, "lr": 1e-3})
    monkeypatch.setattr(fixture, "KNOWN", 4)
    monkeypatch.setattr(fixture, "FORGOTTEN", 1)
    monkeypatch.setattr(fixture, "UNSEEN", 1)
    demo.main(["--seed", "5", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "seed5.json").read_text())
    assert len(result["claims"]) == 5
    assert len(result["controls"]) == 2
    assert (tmp_path / "lune.png").stat().st_size > 10_000
    assert "| verdict | |" in (tmp_path / "README.md").read_text()


@pytest.mark.long
def test_the_demonstration(tmp_path):
    """The experiment can tell: its controls fail as they must."""
    result = demo.main(["--seed", "0", "--out", str(tmp_path)])
    assert all(control["met"] for control in result["controls"])
