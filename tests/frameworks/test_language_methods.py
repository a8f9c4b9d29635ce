"""The methods for language models against the sums they were published as, written literally."""

import copy
import weakref
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from tiny import gpt, sequences
from torch.nn.functional import logsigmoid

import sfron_fast as sf
from sfron_fast import methods
from sfron_fast.tasks import Language

SETTINGS = {"lr": 1e-2, "epochs": 2, "max_norm": 1.0}


def batches(count, size, seed, **more):
    rows = sequences(count * size, seed)
    keys = rows[0]
    stacked = {key: torch.stack([row[key] for row in rows]) for key in keys}
    parts = [{k: t[i * size : (i + 1) * size] for k, t in stacked.items()} for i in range(count)]
    return [{**part, **more} for part in parts]


FORGET, RETAIN = batches(2, 3, seed=1), batches(3, 4, seed=2)
IDK = batches(2, 3, seed=3)


def logp(model, batch):
    """log p of each labelled token: a list of vectors, one a sequence."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    found = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return [row[label != -100] for row, label in zip(found, labels, strict=True)]


def whole(model, batch):
    return torch.stack([row.sum() for row in logp(model, batch)])


def retained(model, batch):
    return -torch.stack([row.mean() for row in logp(model, batch)]).mean()


def grad_diff(model, old, batch, _):
    return -retained(model, batch)


def npo(model, old, batch, _):
    with torch.no_grad():
        before = whole(old, batch)
    return (-2 / 0.1 * logsigmoid(-0.1 * (whole(model, batch) - before))).mean()


def simnpo(model, old, batch, _):
    rows = logp(model, batch)
    means = torch.stack([row.mean() for row in rows])
    return (-2 / 4.5 * logsigmoid(-4.5 * means - 0.3)).mean()


def idk_dpo(model, old, batch, preferred):
    with torch.no_grad():
        before = whole(old, preferred) - whole(old, batch)
    ratio = whole(model, preferred) - whole(model, batch) - before
    return (-2 / 0.1 * logsigmoid(0.1 * ratio)).mean()


def tokens(model, batch):
    return torch.cat(logp(model, batch))


def wga(model, old, batch, _):
    found = tokens(model, batch)
    return (found.exp().detach() * found).mean()


def satimp(model, old, batch, _):
    found = tokens(model, batch)
    p = found.exp().detach()
    return (p**5 * (1 - p) * found).mean()


def ceu(model, old, batch, _):
    """Cross-entropy to the prediction with the label's logit at minus infinity."""
    rows = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    rows, labels = rows[labels != -100], labels[labels != -100]
    without = rows.detach().scatter(1, labels.unsqueeze(1), -torch.inf)
    return -(without.softmax(1) * rows.log_softmax(1)).sum(1).mean()


def undial(model, old, batch, _):
    labels = batch["labels"][:, 1:].flatten()
    counted = labels != -100
    rows, before = (
        m(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)[counted] for m in (model, old)
    )
    before = before.detach() - 10.0 * F.one_hot(labels[counted], rows.shape[1])
    return -(before.softmax(1) * rows.log_softmax(1)).sum(1).mean()


METHODS = {  # literal loss, retain weight, settings
    "grad_diff": (grad_diff, 1.0, {}),
    "npo": (npo, 1.0, {}),
    "simnpo": (simnpo, 1.0, {"gamma": 0.3}),
    "idk_dpo": (idk_dpo, 1.0, {}),
    "wga": (wga, 1.0, {}),
    "satimp": (satimp, 0.1, {}),
    "ceu": (ceu, 0.0, {}),
    "undial": (undial, 0.0, {}),
}


def literal(model, loss, retain_weight):
    old, step = copy.deepcopy(model), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS["lr"], weight_decay=0.01)
    for _ in range(SETTINGS["epochs"]):
        for batch, preferred in zip(FORGET, IDK, strict=True):
            total = loss(model, old, batch, preferred)
            total = total + retain_weight * retained(model, RETAIN[step % 3])
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_norm"])
            optimizer.step()
            step += 1


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_the_published_sum(name):
    loss, retain_weight, settings = METHODS[name]
    found, expected = gpt().eval(), gpt().eval()
    sets = {"forget": FORGET, "retain": RETAIN}
    if name == "idk_dpo":
        sets = {"pairs": list(zip(IDK, FORGET, strict=True)), "retain": RETAIN}
    method = getattr(methods, name)
    method(found, **sets, task=Language(), **SETTINGS, **settings)
    literal(expected, loss, retain_weight)
    start, moved = dict(gpt().named_parameters()), 0
    for key, weight in found.named_parameters():
        torch.testing.assert_close(
            weight, dict(expected.named_parameters())[key], rtol=1e-9, atol=1e-9
        )
        moved += not torch.equal(weight, start[key])
    assert moved > 10


def test_npo_finds_shuffled_samples_by_their_numbers():
    """The same batches with their samples in another order, and numbers to know them by."""
    numbered = [{**batch, "id": torch.arange(3) + 3 * i} for i, batch in enumerate(FORGET)]

    class Shuffled:
        passes = 0

        def __iter__(self):
            self.passes += 1
            turn = torch.tensor([1, 2, 0]) if self.passes % 2 else torch.tensor([2, 0, 1])
            return iter([{k: t[turn] for k, t in batch.items()} for batch in numbered])

    ends = [gpt().eval(), gpt().eval()]
    methods.npo(ends[0], forget=FORGET, retain=RETAIN, task=Language(), **SETTINGS)
    shuffled = Shuffled()
    methods.npo(
        ends[1], forget=shuffled, retain=RETAIN, task=Language(), ids=lambda b: b["id"], **SETTINGS
    )
    for a, b in zip(*(m.parameters() for m in ends), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    known = sf.reference_losses(gpt().eval(), FORGET, task=methods.weighted.SumTask(Language()))
    with pytest.raises(ValueError, match="model: expected the weights the reference"):
        methods.npo(ends[0], forget=FORGET, retain=RETAIN, task=Language(), reference=known)


def test_rmu_moves_its_matrices_only_and_what_it_says():
    """Of one step: the literal loss's gradient, by plain descent."""
    layer, trained = "transformer.h.1", r"transformer\.h\.[01]\.mlp\.c_proj\.weight"
    found, expected = gpt().eval(), gpt().eval()
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 1e-2}
    calls = {"forget": FORGET, "retain": RETAIN, "task": Language(), "retain_weight": 3.0}
    methods.rmu(found, **calls, layer=layer, trained=trained, steering=2.0, epochs=1, **settings)

    def hidden(model, batch):
        # the second block's output, before the last norm
        states = []
        hook = model.transformer.h[1].register_forward_hook(lambda m, i, o: states.append(o))
        model(input_ids=batch["input_ids"])
        hook.remove()
        return states[0][0] if isinstance(states[0], tuple) else states[0]

    old = copy.deepcopy(expected)
    u = torch.rand(16, generator=torch.Generator().manual_seed(0)).double()
    names = [f"transformer.h.{i}.mlp.c_proj.weight" for i in (0, 1)]
    moving = [dict(expected.named_parameters())[n] for n in names]
    for batch, kept in zip(FORGET, RETAIN, strict=False):
        pull = (hidden(expected, batch) - 2.0 * u / u.norm()).square().mean()
        stay = (hidden(expected, kept) - hidden(old, kept).detach()).square().mean()
        grads = torch.autograd.grad(pull + 3.0 * stay, moving)
        with torch.no_grad():
            for p, g in zip(moving, grads, strict=True):
                p -= 1e-2 * g
    start = dict(gpt().named_parameters())
    for key, weight in found.named_parameters():
        torch.testing.assert_close(
            weight, dict(expected.named_parameters())[key], rtol=1e-6, atol=1e-8
        )
        assert torch.equal(weight, start[key]) == (key not in names)
        assert weight.requires_grad
    with pytest.raises(ValueError, match="layer: expected a name of model"):
        methods.rmu(found, **calls, layer="model.layers.1", trained=trained)
    with pytest.raises(ValueError, match="trained: expected an expression that finds parameters"):
        methods.rmu(found, **calls, layer=layer, trained="down_proj")


class _Saved:
    """A tensor kept for a backward pass, whose death can be seen."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # an output would keep its own graph


def test_one_graph_is_alive_at_a_time(monkeypatch):
    """When a batch runs, nothing is kept any more for the backward pass of the one before."""
    task, saved, alive = Language(), weakref.WeakSet(), []
    outputs = task.outputs

    def watched(model, batch):
        alive.append(len(saved))
        return outputs(model, batch)

    def keep(tensor):
        kept = _Saved(tensor)
        saved.add(kept)
        return kept

    monkeypatch.setattr(task, "outputs", watched)
    with torch.autograd.graph.saved_tensors_hooks(keep, attrgetter("tensor")):
        methods.grad_diff(gpt().eval(), forget=FORGET, retain=RETAIN, task=task, **SETTINGS)
    assert alive == [0] * 8


def test_bad_pairs_are_named():
    model = gpt().eval()
    other = batches(2, 4, seed=3)
    with pytest.raises(ValueError, match=r"pairs: expected as many samples.*\[4, 3\]"):
        methods.idk_dpo(
            model, pairs=list(zip(other, FORGET, strict=True)), retain=RETAIN, task=Language()
        )
    with pytest.raises(ValueError, match=r"pairs: expected pairs \(preferred, forget\)"):
        methods.idk_dpo(model, pairs=FORGET, retain=RETAIN, task=Language())
