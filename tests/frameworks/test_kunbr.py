"""KUnBR: density against the literal sum, and what the re-insertion leaves as it was."""

import copy
import importlib

import pytest
import torch
from tiny import gpt, sequences

from sfron_fast import methods
from sfron_fast.methods.kunbr import block_density, layer_blocks
from sfron_fast.tasks import Language

METHOD = importlib.import_module("sfron_fast.methods.kunbr")
LAYERS, DEPTH = "transformer.h", 6


def batches(count, size, seed):
    rows = sequences(count * size, seed)
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return [{k: t[i * size : (i + 1) * size] for k, t in stacked.items()} for i in range(count)]


FORGET, RETAIN = batches(2, 3, seed=1), batches(3, 4, seed=2)
SETS = {"forget": FORGET, "retain": RETAIN, "task": Language()}
STEPS = {"lr": 1e-3, "max_norm": 1.0}


def model():
    found = gpt(layers=DEPTH).eval()
    found.transformer.wte.requires_grad_(False)
    return found


def weights(found):
    return {n: p.detach().clone() for n, p in found.named_parameters()}


def of_block(name, number, size=2):
    return any(name.startswith(f"{LAYERS}.{number * size + i}.") for i in range(size))


def test_density_is_the_sum_of_absolute_gradients_of_each_sample():
    found = model().train()
    found.transformer.h[1].ln_1.weight.requires_grad_(False)
    density = block_density(found, FORGET, layer_blocks(found, LAYERS, 2), task=Language())
    assert found.training
    sums = [0.0] * (DEPTH // 2)
    for batch in FORGET:
        for s in range(3):
            one = {key: rows[s : s + 1] for key, rows in batch.items()}
            found.eval().zero_grad()
            found(**one).loss.backward()
            for name, p in found.named_parameters():
                for number in range(len(sums)):
                    if of_block(name, number) and p.grad is not None:
                        sums[number] += p.grad.abs().sum().item()
    expected = torch.tensor(sums, dtype=torch.float64)
    torch.testing.assert_close(density, expected / expected.sum(), rtol=1e-6, atol=0)
    assert density.std() > 1e-3  # else any order would do


def watched(monkeypatch, found):
    """What each call of GradDiff found, and left: weights, and names that could move."""
    seen, run = [], methods.grad_diff

    def look(given, **settings):
        before = weights(given)
        moving = {n for n, p in given.named_parameters() if p.requires_grad}
        run(given, **settings)
        seen.append((before, moving, weights(given)))
        return given

    monkeypatch.setattr(METHOD, "grad_diff", look)
    return seen


@pytest.mark.parametrize("reinsert", [True, False])
def test_a_block_is_unlearnt_in_the_original_and_put_back(monkeypatch, reinsert):
    found = model()
    start, trainable = weights(found), {n for n, p in found.named_parameters() if p.requires_grad}
    density = block_density(found, FORGET, layer_blocks(found, LAYERS, 2), task=Language())
    seen = watched(monkeypatch, found)
    methods.kunbr(
        found,
        **SETS,
        **STEPS,
        layers=LAYERS,
        size=2,
        top=2,
        epochs=1,
        block_epochs=1,
        retain_epochs=0,
        reinsert=reinsert,
    )
    order = density[:2].argsort(descending=True).tolist()  # the third block has the last two
    assert len(seen) == 3
    assert seen[0][1] == trainable
    current = seen[0][2]
    for number, (before, moving, after) in zip(order, seen[1:], strict=True):
        assert moving == {n for n in trainable if of_block(n, number)}
        for name in start:
            inside = of_block(name, number)
            around = start if reinsert else current
            assert torch.equal(before[name], (current if inside else around)[name])
            # the attention's key bias has no gradient, as a softmax does not see it
            assert inside or torch.equal(after[name], before[name])
            if inside:
                current[name] = after[name]
        assert any(not torch.equal(after[n], before[n]) for n in moving)
    for name, weight in found.named_parameters():
        assert torch.equal(weight, current[name])
        assert weight.requires_grad == (name in trainable)
    assert any(not torch.equal(current[n], start[n]) for n in trainable if of_block(n, 2))


def test_it_ends_with_the_retain_set(monkeypatch):
    """Descent of every weight on it, at a rate of its own."""
    found = model()
    seen = watched(monkeypatch, found)
    settings = {"layers": LAYERS, "size": 2, "top": 1, "chosen": [1], "block_epochs": 1}
    methods.kunbr(found, **SETS, **STEPS, **settings, epochs=1, retain_epochs=2, retain_lr=1e-2)
    expected = model()
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            weight.copy_((seen[1] if of_block(name, 1) else seen[0])[2][name])
    methods.finetune(
        expected,
        RETAIN,
        task=Language(),
        epochs=2,
        lr=1e-2,
        optimizer="adamw",
        cosine=False,
        weight_decay=0.01,
        max_norm=1.0,
    )
    for weight, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("layers", {"layers": "model.layers"}),
        ("layers", {"layers": "transformer.wte"}),
        ("size", {"size": 0}),
        ("size", {"size": 5}),
        ("top", {"top": 0}),
        ("top", {"top": 3}),
        ("chosen", {"chosen": [2]}),
        ("chosen", {"chosen": []}),
        ("block_epochs", {"block_epochs": 0}),
        ("retain_epochs", {"retain_epochs": -1}),
        ("epochs", {"epochs": 0}),
        ("forget", {"forget": []}),
        ("retain_weight", {"retain_weight": -1.0}),
    ],
)
def test_bad_input_is_named_and_nothing_moves(argument, changes):
    found = model()
    start = copy.deepcopy(weights(found))
    settings = {**SETS, **STEPS, "layers": LAYERS, "size": 2, "top": 2, **changes}
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        methods.kunbr(found, **settings)
    assert all(torch.equal(start[n], p) for n, p in found.named_parameters())
