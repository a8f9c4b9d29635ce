"""``linear_logp`` against all logits in fp64."""

import math
import random
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from head_cases import error, full_logits, head_case, remembered_case, small_tiles

import sfron_fast as sf
from sfron_fast.ops import linear_logp as file
from sfron_fast.ops import linear_tiles, registry

CASES = {
    "plain": {},
    "no bias": {"bias": False},
    "cap": {"softcap": 5.0, "size": 3.0},
    "scale": {"logit_scale": 0.0625, "bias": False},
    "both": {"softcap": 3.0, "logit_scale": 0.25},
    "one token": {"rows": 1, "ignored": 0},
    "one class": {"classes": 1, "size": 0.5},
    "whole tiles": {"classes": 256},
    "one tile": {"classes": 64},
    "all counted": {"ignored": 0},
    "large": {"size": 2500.0},
}


def tiled(hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0):
    """The op itself, which takes fp64 in tiles too; the public call does not."""
    op = registry.op("linear_logp")
    return op(hidden, weight, labels, bias, softcap, logit_scale, -100)[:2]


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    small_tiles(monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_tiles_in_fp64_are_all_logits(name):
    """The same arithmetic as of fp32, to fp64's roundings: signs, scales and sums are right."""
    case = head_case(dtype=torch.float64, **CASES[name])
    truth, found = case.results(full_logits), case.results(tiled)
    public = case.results(sf.linear_logp)
    for key, wanted in truth.items():
        assert error(found[key], wanted) < 1e-12, key
        assert error(public[key], wanted) < 1e-12, key


def assert_as_good_as_torch(case, function=sf.linear_logp):
    """Each result's error within 3 times that of all logits in the same dtype, or 3e-7."""
    truth = case.to(torch.float64).results(full_logits)
    torchs, ours = case.results(full_logits), case.results(function)
    for key, wanted in truth.items():
        assert ours[key].isfinite().all(), key
        best = max(error(torchs[key], wanted), 1e-7)
        assert error(ours[key], wanted) <= 3 * best, key


@pytest.mark.parametrize("name", CASES)
def test_fp32_is_as_good_as_torch(name):
    assert_as_good_as_torch(head_case(**CASES[name]))


@pytest.mark.parametrize("at", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("loss", [1e-1, 1e-3, 1e-5, 1e-7])
def test_remembered_tokens_keep_their_digits(loss, at):
    """Where the loss is what the label's probability lacks of 1."""
    case = remembered_case(loss, at)
    truth = case.to(torch.float64).results(full_logits)
    losses = -truth["output 0"]
    assert losses.min() > 0
    assert losses.max() < 3 * loss
    torchs, ours = case.results(full_logits), case.results(sf.linear_logp)
    for key, wanted in truth.items():
        assert error(ours[key], wanted) <= max(3 * error(torchs[key], wanted), 1e-6), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "both", "one token"])
def test_narrow_dtypes_round_once(dtype, name):
    """Of the inputs as they are, in fp32; only the gradients are rounded."""
    case = head_case(dtype=dtype, **{**CASES[name], "decades": 3})
    truth, ours = case.to(torch.float64).results(full_logits), case.results(sf.linear_logp)
    for key, wanted in truth.items():
        assert ours[key].dtype == (dtype if key.startswith("d ") else torch.float32), key
        assert error(ours[key], wanted) < (torch.finfo(dtype).eps if key[0] == "d" else 1e-6), key


def test_hand_example():
    """Logits 0, ln 3 of hidden 1: p = 1/4, 3/4; of the label 1: logp = ln 3/4, lse = ln 4.

    Upstream 2 and -1: at the logits 2 (onehot - p) - p = (-3/4, -1/4).
    """
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    logp, lse = sf.linear_logp(hidden, weight, torch.tensor([1]))
    (2 * logp - lse).sum().backward()
    assert logp.item() == pytest.approx(math.log(3 / 4), rel=1e-6)
    assert lse.item() == pytest.approx(math.log(4), rel=1e-6)
    assert weight.grad.flatten().tolist() == pytest.approx([-0.75, -0.25], rel=1e-6)
    assert hidden.grad.item() == pytest.approx(-0.25 * math.log(3), rel=1e-6)


MUTANTS = {
    "the first row's gradient for every row": (
        "softmax_tiles",
        lambda tiles, head, labels, sums, factor, *rest: linear_tiles.softmax_tiles(
            tiles, head, labels, sums, factor[:1].expand_as(factor), *rest
        ),
    ),
    "an unnormalised lse": (
        "softmax_tiles",
        lambda tiles, head, labels, sums, factor, *rest: linear_tiles.softmax_tiles(
            tiles, head, labels, sums * torch.tensor([[1.0], [0.0]]), factor, *rest
        ),
    ),
    "a dropped bias": (
        "Head",
        lambda weight, bias, *rest: linear_tiles.Head(weight, 0 * bias, *rest),
    ),
    "a dropped cap": (
        "Head",
        lambda weight, bias, cap, scale: linear_tiles.Head(weight, bias, None, scale),
    ),
    "rows scaled alike": (
        "head_gradients",
        lambda tiles, hidden, head, scale, needed: linear_tiles.head_gradients(
            tiles, hidden, head, torch.ones_like(scale), needed
        ),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_judge_catches(name, monkeypatch):
    monkeypatch.setattr(file, *MUTANTS[name])
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(head_case(**CASES["both"]))


def test_nothing_to_do():
    """All labels ignored, and no rows: zeros, and gradients of zero."""
    for rows in (3, 0):
        case = head_case(rows=rows, ignored=1)
        for key, found in case.results(sf.linear_logp).items():
            assert not found.any(), key


def test_padded_classes_have_no_part():
    """A bias of -inf, or of -1e4, on what only fills the matrix up."""
    case = head_case(classes=200)
    wanted = case.results(sf.linear_logp)
    for value in (-torch.inf, -1e4):
        padded = head_case(classes=200)
        filling = torch.randn(56, 16)
        padded.weight = torch.cat([padded.weight, filling])
        padded.bias = torch.cat([padded.bias, torch.full((56,), value)])
        found = padded.results(sf.linear_logp)
        for key, result in found.items():
            if key in ("d weight", "d bias"):
                assert not result[200:].any(), key
                result = result[:200]
            torch.testing.assert_close(result, wanted[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_poisoned_row_shows_and_no_other(poison):
    case = head_case(ignored=0, bias=False)
    clean = case.results(sf.linear_logp)
    case.hidden[3, 0] = poison
    found = case.results(sf.linear_logp)
    others = torch.arange(37) != 3
    assert not found["output 0"][3].isfinite()
    assert not found["d hidden"][3].isfinite().all()
    for key in ("output 0", "output 1", "d hidden"):
        torch.testing.assert_close(found[key][others], clean[key][others])


def test_only_the_gradients_that_are_needed(monkeypatch):
    case, asked = head_case(), []

    def spy(tiles, hidden, head, scale, needed):
        asked.append(list(needed))
        return linear_tiles.head_gradients(tiles, hidden, head, scale, needed)

    monkeypatch.setattr(file, "head_gradients", spy)
    wanted = case.results(sf.linear_logp)
    for name, mask in (("hidden", [True, False, False]), ("weight", [False, True, False])):
        leaf = getattr(case, name).clone().requires_grad_()
        given = {"hidden": case.hidden, "weight": case.weight, name: leaf}
        logp, lse = sf.linear_logp(**given, labels=case.labels, bias=case.bias)
        ((logp * case.upstream[0]).sum() + (lse * case.upstream[1]).sum()).backward()
        assert asked[-1] == mask
        torch.testing.assert_close(leaf.grad, wanted[f"d {name}"])


def test_a_tied_head_gets_both_gradients():
    def run(weight, head):
        weight = weight.clone().requires_grad_()
        ids, labels = torch.randint(203, (2, 11), generator=torch.Generator().manual_seed(1))
        logp, _ = head(F.embedding(ids, weight), weight, labels)
        logp.sum().backward()
        return weight.grad

    weight = torch.randn(203, 16)
    torch.testing.assert_close(run(weight, sf.linear_logp), run(weight, full_logits))


def test_second_derivatives_and_gradcheck():
    case = head_case(4, 3, 70, torch.float64, softcap=2.0, ignored=3, decades=1)
    leaves = [t.nan_to_num().requires_grad_() for t in (case.hidden, case.weight, case.bias)]

    def run(hidden, weight, bias):
        return tiled(hidden, weight, case.labels, bias=bias, softcap=2.0)

    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, [t[:5] if t is leaves[0] else t for t in leaves])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    case = head_case(7, 5, 70, dtype, ignored=3)
    for leaf in (False, True):
        tensors = [t.nan_to_num().requires_grad_(leaf) for t in (case.hidden, case.weight)]
        bias = case.bias.requires_grad_(leaf)
        arguments = (*tensors, case.labels, bias, 3.0, 0.5, -100)
        torch.library.opcheck(torch.ops.sfron_fast.linear_logp.default, arguments)


def test_compiled_is_eager():
    case = head_case()
    compiled = torch.compile(sf.linear_logp, fullgraph=True, backend="aot_eager")
    wanted, found = case.results(sf.linear_logp), case.results(compiled)
    for key, result in found.items():
        assert torch.equal(result, wanted[key]), key


@pytest.mark.parametrize("seed", range(25))
def test_random_shapes(seed):
    """fp64 in tiles, to 1e-11; any sizes, numbers, ignored rows and upstream gradients."""
    rng = random.Random(seed)
    case = head_case(
        rng.choice([1, 2, 5, 33, 130]),
        rng.choice([1, 3, 17]),
        rng.choice([1, 2, 63, 64, 65, 129, 300]),
        torch.float64,
        bias=rng.random() < 0.5,
        softcap=rng.choice([None, 0.5, 30.0]),
        logit_scale=rng.choice([1.0, -0.3, 4.0]),
        size=rng.choice([0.01, 1.0, 20.0]),
        ignored=rng.choice([0, 2, 7]),
    )
    truth, found = case.results(full_logits), case.results(tiled)
    for key, wanted in truth.items():
        # where a single class is all there is, the truth is 0
        scale = max(float(wanted.norm()), 1e-3 * float(case.upstream.norm()))
        assert float((found[key] - wanted).norm()) < 1e-11 * scale, key


def test_torch_func():
    """Gradients of each sample at once, by the formula."""
    case = head_case(6, 4, 70, ignored=3, bias=False)
    hidden, labels = case.hidden.nan_to_num().view(3, 2, 4), case.labels.view(3, 2)

    def loss(weight, hidden, labels):
        logp, lse = sf.linear_logp(hidden, weight, labels)
        return (logp + lse.square()).sum()

    every = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(case.weight, hidden, labels)
    for found, *sample in zip(every, hidden, labels, strict=True):
        weight = case.weight.clone().requires_grad_()
        loss(weight, *sample).backward()
        torch.testing.assert_close(found, weight.grad)


def test_memory_does_not_grow_with_the_vocabulary():
    """Beside the gradients: two tiles' worth at most."""
    peaks = []
    for classes in (1024, 8192):
        case = head_case(64, 8, classes, bias=False)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
            hidden, weight = (t.requires_grad_() for t in (case.hidden, case.weight))
            sf.linear_logp(hidden, weight, case.labels)[0].sum().backward()
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        peaks.append(max(accumulate(e.nbytes() for e in events)) - weight.grad.nbytes)
    assert peaks[1] < peaks[0] + 64 * 64 * 4
    assert peaks[1] < 8 * 64 * 64 * 4


CASE = head_case(6, 4, 9, ignored=0)
WRONG = {
    "labels shape": ("labels", {"labels": CASE.labels[1:]}),
    "labels device": ("tensors", {"labels": CASE.labels.to("meta")}),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals(name):
    blamed, change = WRONG[name]
    given = {"hidden": CASE.hidden, "weight": CASE.weight, "labels": CASE.labels, **change}
    with pytest.raises(ValueError, match=f"^{blamed}: expected"):
        sf.linear_logp(**given)


def test_a_label_that_nobody_could_read_shows():
    """As on a GPU, where labels are not looked at."""
    sums = linear_tiles.LogSums(torch.tensor([3, 9, -1]), CASE.hidden)
    for tile in linear_tiles.logit_tiles(CASE.hidden[:3], linear_tiles.Head(CASE.weight)):
        sums.add(tile)
    assert sums.result()[0].isnan().tolist() == [False, True, True]
