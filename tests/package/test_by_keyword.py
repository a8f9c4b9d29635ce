"""Forget and retain are named in every call: a TypeError shows the form, IDEs see the signature."""

import inspect

import pytest
import torch

import sfron_fast as sf
from sfron_fast import evaluation
from sfron_fast.methods import salun, scrub, selective_amnesia

NAMED = [
    (sf.unlearn, 1, "unlearn(model, forget=..., retain=...)"),
    (sf.estimate_mask, 1, "estimate_mask(model, forget=..., retain=...)"),
    (
        sf.SaliencyMask.from_fisher,
        0,
        "SaliencyMask.from_fisher(forget=..., retain=...)",
    ),
    (
        sf.SaliencyMask.top_k,
        0,
        "SaliencyMask.top_k(forget=..., retain=..., fraction=...)",
    ),
    (
        sf.PairedLoader,
        0,
        "PairedLoader(forget=..., retain=..., batch_size=..., retain_steps=...)",
    ),
    (sf.evaluate, 1, "evaluate(model, forget=..., retain=..., holdout=...)"),
    (evaluation.collect, 1, "collect(model, forget=..., retain=..., holdout=...)"),
    (evaluation.mia_entropy, 0, "mia_entropy(forget=..., retain=..., holdout=...)"),
    (
        evaluation.mia_modified_entropy,
        0,
        "mia_modified_entropy(forget=..., retain=..., holdout=...)",
    ),
    (scrub, 1, "scrub(model, forget=..., retain=...)"),
    (selective_amnesia, 1, "selective_amnesia(model, forget=..., retain=...)"),
    (salun, 1, "salun(model, forget=..., mixed=...)"),
]


@pytest.mark.parametrize(("function", "front", "form"), NAMED)
def test_positional_use_shows_the_form(function, front, form):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError) as error:
        function(*[model] * front, [], [])
    name = form.partition("(")[0]
    assert str(error.value) == (
        f"{name}: expected {form}, found 2 more by position; say which is which"
    )


@pytest.mark.parametrize(("function", "front", "form"), NAMED)
def test_the_signature_stays(function, front, form):
    kinds = {n: p.kind for n, p in inspect.signature(function).parameters.items()}
    assert kinds["forget"] is inspect.Parameter.KEYWORD_ONLY
    assert function.__doc__ or inspect.isclass(function)
