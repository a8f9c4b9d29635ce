"""What inputs may be, for Fisher, unlearn and evaluation; what the default losses mean."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from models import bits, data, same
from torch import nn

import sfron_fast as sf
from sfron_fast.data.batches import each_tensor, move, progress_bar
from sfron_fast.evaluation import predict

Pair = namedtuple("Pair", "x scale")


@dataclasses.dataclass(frozen=True)
class Record:
    x: Any
    scale: Any


class Nested(nn.Linear):
    """Finds x and scale wherever they are."""

    def forward(self, inputs=None, *, x=None, scale=None, more=None):
        if isinstance(inputs, torch.Tensor):
            return super().forward(inputs)
        if isinstance(inputs, (Pair, Record)):
            x, scale = inputs.x, inputs.scale
        elif inputs is not None:
            x, (scale, _) = inputs
        return super().forward(x * (scale if more is None else more["scale"]))


FORMS = {
    "dict": lambda x, s: {"x": x, "scale": s},
    "OrderedDict": lambda x, s: OrderedDict(x=x, scale=s),
    "UserDict, as BatchEncoding": lambda x, s: UserDict(x=x, scale=s),
    "read-only": lambda x, s: MappingProxyType({"x": x, "scale": s}),
    "nested": lambda x, s: {"x": x, "more": UserDict(scale=s, name="a")},
    "named tuple": Pair,
    "dataclass": Record,
    "list of tuples": lambda x, s: [x, (s, "a")],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_nest_is_taken_everywhere(form):
    (x, y), ones = data(8), torch.ones(8, 1)
    nest = FORMS[form](x, ones)
    results = []
    for batches in ([(x, y)], [(nest, y)]):
        torch.manual_seed(0)
        model = Nested(x.shape[1], 4)
        fishers = [sf.estimate_fisher(model, batches, estimator=e) for e in ("batch", "sample")]
        predictions = predict(model, batches).logits
        sf.unlearn(
            model,
            retain=batches,
            forget=batches,
            recipe=sf.Recipe.paper(cycles=2, retain_steps=1, lr=0.1),
        )
        sf.methods.finetune(model, batches, epochs=1)
        results.append(
            [*fishers[0].values(), *fishers[1].values(), predictions, *model.parameters()]
        )
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_copy_is_moved():
    """On the meta device, the only other one there always is; the caller's own containers keep
    their tensors.
    """
    x = torch.ones(3, 2)
    given = {"a": [x, None, "text"], "b": UserDict(c=Pair(x, 2.5)), "d": Record(x, (x,))}
    moved, targets = move((given, torch.zeros(3)), torch.device("meta"))
    found = []
    each_tensor(moved, lambda t: found.append(t.device.type))
    assert found == ["meta"] * 4
    assert targets.device.type == "meta"
    assert [type(v) for v in moved.values()] == [list, UserDict, Record]
    assert moved["a"][1:] == [None, "text"]
    assert moved["b"]["c"].scale == 2.5
    each_tensor(given, lambda t: found.append(t.device.type))
    assert found[4:] == ["cpu"] * 4
    packed = nn.utils.rnn.pack_sequence([x])
    assert isinstance(move((packed, torch.zeros(3)), torch.device("cpu"))[0], type(packed))


class Tokens(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.embed, self.out = nn.Embedding(words, 8), nn.Linear(8, words)

    def forward(self, ids):
        return self.out(self.embed(ids))


@pytest.mark.parametrize("words", [7, 5])  # 5 are as many as tokens
def test_tokens_want_a_loss_of_their_own(words):
    """torch would read [samples, tokens, classes] along the tokens."""
    ids = torch.randint(0, words, (4, 5))
    batches = [(ids, ids.flip(1))]
    model = Tokens(words)
    before = bits(model)
    everything = sf.SaliencyMask.from_bool(
        {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    )
    calls = [
        lambda: sf.unlearn(model, retain=batches, forget=batches, recipe=sf.Recipe.paper(cycles=1)),
        lambda: sf.unlearn(
            model, retain=batches, forget=batches, recipe=sf.Recipe.paper(cycles=1), mask=everything
        ),
        lambda: sf.estimate_fisher(model, batches),
        lambda: sf.estimate_fisher(model, batches, estimator="sample"),
        lambda: sf.methods.finetune(model, batches),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="loss_fn: expected one of your own"):
            call()
    assert same(bits(model), before)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_where_there_is_a_terminal(monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    steps = [1, 2]
    assert (progress_bar(steps, steps, "Title", None) is steps) == (not terminal)
    assert progress_bar(steps, steps, "Title", False) is steps
    assert progress_bar(steps, steps, "Title", True) is not steps
