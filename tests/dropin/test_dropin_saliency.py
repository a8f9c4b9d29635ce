"""The drop-in checklist, section H: masks and Fishers.

(Attacks and reports have their lines in their own tests.)
"""

import copy
import logging

import pytest
import torch
from models import bits, build, data, loader, random_fishers, random_mask, same
from test_dropin_compile import NoHostRead
from torch import nn

from sfron_fast import Fisher, SaliencyMask, SFRonAdamW, SFRonSGD, estimate_fisher, functional
from sfron_fast.ops.reference import pack_bits

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


# --- H1 -------------------------------------------------------------------------------------------


@pytest.mark.checklist("H1")
def test_coverage_names_what_matches_and_what_does_not():
    mask = random_mask(build())
    named = [*list(build().named_parameters())[1:], ("head.weight", nn.Parameter(torch.ones(2)))]
    assert mask.coverage(named) == {
        "matched": ["0.bias", "2.weight", "2.bias"],
        "unmatched": ["head.weight"],
        "unused": ["0.weight"],
    }
    wrapped = [(f"module._orig_mod.{n}", p) for n, p in build().named_parameters()]
    assert mask.coverage(wrapped) == {
        "matched": [n for n, _ in wrapped],
        "unmatched": [],
        "unused": [],
    }


@pytest.mark.checklist("H1")
@BOTH
def test_an_optimizer_reports_the_coverage_and_refuses_a_hole(kind, caplog):
    model = build()
    mask, named = random_mask(model), list(model.named_parameters())
    with caplog.at_level(logging.INFO, logger="sfron_fast"):
        kind(named[:3], saliency=mask)
    assert "saliency: 3 matched, 0 unmatched, 1 unused" in caplog.text
    for foreign in (("head.weight", nn.Parameter(torch.ones(2))), ("0.weights", named[0][1])):
        with pytest.raises(
            ValueError, match=rf"saliency: expected a mask for each of 2 .*{foreign[0]}"
        ):
            kind([named[1], foreign], saliency=mask)


@pytest.mark.checklist("H1")
@BOTH
def test_names_are_looked_up_and_not_tensors(kind):
    """The authors' diffusion script asks for a name in a list of tensors, finds none, and applies
    no mask at all.
    """
    model = build()
    before = bits(model)
    optimizer = kind(
        model.named_parameters(), lr=0.1, weight_decay=0.0, saliency=random_mask(model)
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.forget_step()
    for name, p in model.named_parameters():
        assert torch.equal(p.detach() != before[name], random_mask(model).to_bool(name)), name


@pytest.mark.checklist("H1")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("edited", [False, True], ids=["replaced", "edited"])
def test_a_mask_that_is_replaced_or_edited_counts_from_the_next_forget_step(count, edited):
    """And it is the one that a state dict is signed with."""
    params = {f"w{i}": nn.Parameter(torch.zeros(8)) for i in range(count)}
    even, odd = (
        SaliencyMask.from_bool({n: torch.arange(8) % 2 == i for n in params}) for i in (0, 1)
    )
    optimizer = SFRonSGD(params.items(), lr=1.0, saliency=copy.deepcopy(even))
    for mask in (even, odd, even):
        if edited:
            for name in params:
                optimizer.saliency[name].copy_(mask[name])
        else:
            optimizer.saliency = mask
        before = {n: p.detach().clone() for n, p in params.items()}
        for p in params.values():
            p.grad = torch.ones(8)
        optimizer.forget_step()
        assert all(torch.equal(p != before[n], mask.to_bool(n)) for n, p in params.items())
        assert optimizer.state_dict()["param_groups"][0]["mask_digest"] == mask.digest()
        for p in params.values():
            p.grad = torch.zeros(8)
        optimizer.step()


@pytest.mark.checklist("H1")
def test_a_mask_that_would_be_ignored_is_refused():
    model = build()
    mask, weight = random_mask(model), nn.Parameter(torch.ones(2))
    optimizer = SFRonSGD(model.named_parameters())
    with pytest.raises(
        ValueError, match="saliency: expected None: no group of this optimizer is masked"
    ):
        optimizer.saliency = mask
    optimizer.param_groups[0]["masked"] = True
    optimizer.saliency = mask
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="saliency: expected a SaliencyMask"):
        optimizer.saliency = {}
    other = SaliencyMask.from_bool({"head": torch.ones(2)})
    for wrong, message in (
        (None, "masked: expected masked=False"),
        (other, "saliency: expected a mask for each"),
    ):
        before = bits(model)
        optimizer.saliency = wrong
        with pytest.raises(ValueError, match=message):
            optimizer.forget_step()
        assert same(bits(model), before)
    optimizer.saliency = mask
    with pytest.raises(ValueError, match="masked: expected True or False, found 'no'"):
        optimizer.add_param_group({"params": [("head", weight)], "masked": "no"})


# --- H2, H3 ---------------------------------------------------------------------------------------


@pytest.mark.checklist("H2")
@pytest.mark.parametrize("numel", [*range(0, 26), 63, 64, 65, 1001])
def test_bytes_are_the_eighth_rounded_up(numel):
    mask = SaliencyMask.from_bool({"w": torch.arange(numel) % 3 == 0})
    assert mask["w"].shape == ((numel + 7) // 8,)
    assert torch.equal(mask.to_bool("w"), torch.arange(numel) % 3 == 0)


@pytest.mark.checklist("H3")
def test_saluns_files_load(tmp_path):
    """A dictionary of int64 zeros and ones by name, from a model in DataParallel."""
    model = build()
    chosen = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        for n, p in model.named_parameters()
    }
    torch.save({f"module.{n}": c.long() for n, c in chosen.items()}, tmp_path / "with_0.5.pt")
    mask = SaliencyMask.from_bool(torch.load(tmp_path / "with_0.5.pt", weights_only=True))
    assert mask == SaliencyMask.from_bool(chosen)
    assert mask.coverage(model.named_parameters())["unmatched"] == []
    SFRonSGD(model.named_parameters(), saliency=mask)
    assert all(torch.equal(mask[n], pack_bits(c)) for n, c in chosen.items())


@pytest.mark.checklist("H3")
def test_top_k_sorts_nothing(monkeypatch):
    """Of billions of weights a full sort would need eight bytes each."""
    for name in ("sort", "argsort", "topk", "unique"):
        monkeypatch.setattr(torch, name, None)
        monkeypatch.setattr(torch.Tensor, name, None)
    forget, retain = random_fishers({"a": (40, 5), "b": (100,)})
    mask = SaliencyMask.top_k(forget=forget, retain=retain, fraction=0.3)
    assert sum(mask.counts().values()) == 90


# --- H4 -------------------------------------------------------------------------------------------


@pytest.mark.checklist("H4")
@pytest.mark.parametrize("estimator", ["batch", "batch_equal", "sample"])
def test_a_batch_costs_one_accumulation_and_no_host_read(estimator, monkeypatch):
    """Values are read after the pass: as often for nine batches as for three."""
    reads, calls = {}, []
    real = functional.fisher_accumulate_
    monkeypatch.setattr(
        functional, "fisher_accumulate_", lambda f, g, w: (calls.append(len(g)), real(f, g, w))[1]
    )

    class Count(NoHostRead):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen = getattr(self, "seen", 0) + (
                function is torch.ops.aten._local_scalar_dense.default
            )
            return function(*args, **(kwargs or {}))

    for samples in (12, 36):
        calls.clear()
        model, batches = build(), [(x, y) for x, y in loader(samples, 4)]
        with Count() as count:
            found = estimate_fisher(model, batches, estimator=estimator)
        reads[samples] = count.seen
        # by samples each layer adds its own, in the backward
        assert len(calls) == (0 if estimator == "sample" else samples // 4)
        assert set(calls) <= {0, 4}  # all four tensors at once; the first call has no gradient yet
        assert all(found[n].device == p.device for n, p in model.named_parameters())
    assert reads[12] == reads[36]


@pytest.mark.checklist("H4")
@pytest.mark.parametrize("estimator", ["batch", "batch_equal", "sample"])
def test_an_estimate_goes_on_from_an_earlier_one(estimator, tmp_path):
    """Part of the data today, the rest after the machine came back: the Fisher of all of it."""
    model, batches = build(), list(loader(22, 4))
    whole = estimate_fisher(model, batches, estimator=estimator)
    part = estimate_fisher(model, batches[:2], estimator=estimator)
    torch.save({"values": dict(part), "metadata": part.metadata}, tmp_path / "part.pt")
    saved = torch.load(tmp_path / "part.pt", weights_only=True)
    again = estimate_fisher(model, batches[2:], estimator=estimator, start=Fisher(**saved))
    assert again.metadata == whole.metadata
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=2e-6, atol=1e-12)
    assert same(dict(part), saved["values"])


@pytest.mark.checklist("H4")
def test_an_estimate_of_something_else_is_no_start():
    model, batches = build(), list(loader(8, 4))
    start = estimate_fisher(model, batches)
    for wrong in (
        estimate_fisher(model, batches, estimator="batch"),
        estimate_fisher(model, batches, draws=2),
        estimate_fisher(build(seed=1), batches),
        Fisher(dict(start), {}),
        Fisher({"0.weight": start["0.weight"]}, start.metadata),
    ):
        with pytest.raises(ValueError, match="start: expected"):
            estimate_fisher(model, batches, start=wrong)


@pytest.mark.checklist("H4")
def test_progress_is_shown_where_wanted(capsys):
    pytest.importorskip("tqdm")
    estimate_fisher(build(), list(loader(8, 4)))
    assert capsys.readouterr().err == ""
    estimate_fisher(build(), list(loader(8, 4)), progress=True)
    assert "Fisher" in capsys.readouterr().err


# --- H5 -------------------------------------------------------------------------------------------


@pytest.mark.checklist("H5")
@pytest.mark.parametrize("estimator", ["batch", "batch_equal", "sample"])
def test_the_first_batch_counts_like_the_others(estimator):
    """A port of SalUn overwrites the first batch's gradients instead of adding them."""
    model, batches = build(dtype=torch.float64), list(loader(12, 4, torch.float64))
    one = [estimate_fisher(model, [b], estimator=estimator) for b in batches]
    all_of_them = estimate_fisher(model, batches, estimator=estimator)
    for name in all_of_them:
        torch.testing.assert_close(
            all_of_them[name], sum(f[name] for f in one) / 3, rtol=1e-12, atol=0
        )


@pytest.mark.checklist("H5")
@pytest.mark.parametrize("estimator", ["batch", "batch_equal", "sample"])
def test_a_fisher_is_of_the_eval_mode_model(estimator):
    """Dropout off, running statistics of BatchNorm; whatever mode the model was in."""
    found = []
    for training in (True, False):
        model = build("dropout").train(training)
        found.append(estimate_fisher(model, [data(8)], estimator=estimator))
        assert model.training == training
    assert same(dict(found[0]), dict(found[1]))
