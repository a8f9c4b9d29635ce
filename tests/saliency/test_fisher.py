"""estimate_fisher against loops over samples and batches, and what it must leave alone."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from memory import peak
from models import bits, build, data, loader, same
from torch import nn

import sfron_fast as sf
from sfron_fast import SaliencyMask, estimate_fisher, estimate_mask

SAMPLES, BATCH = 11, 4  # batches of 4, 4 and 3


def squared(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {n: p.grad.detach().double() ** 2 for n, p in model.named_parameters()}


def literal(model, batches, estimator):
    """The three definitions, spelled out; in eval mode."""
    model.eval()
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    samples = 0
    for x, y in batches:
        pieces = (
            [(x[i : i + 1], y[i : i + 1]) for i in range(len(y))]
            if estimator == "sample"
            else [(x, y)]
        )
        for piece in pieces:
            for n, g2 in squared(model, *piece).items():
                total[n] += g2 * (len(piece[1]) if estimator == "batch" else 1)
        samples += len(y)
    return {
        n: f / (len(batches) if estimator == "batch_equal" else samples) for n, f in total.items()
    }


@pytest.mark.checklist("H5")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "dropout"])
@pytest.mark.parametrize("estimator", ["sample", "batch", "batch_equal"])
def test_estimators_equal_their_loops(estimator, kind, dtype):
    model, batches = build(kind, dtype), loader(SAMPLES, BATCH, dtype)
    found = estimate_fisher(model, batches, estimator=estimator, chunk_size=3)
    for name, expected in literal(build(kind, dtype), batches, estimator).items():
        assert found[name].dtype == dtype
        bound = 1e-13 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found[name].double(), expected, rtol=bound, atol=bound * 1e-3)
    assert found.metadata["estimator"] == estimator
    assert [found.metadata[k] for k in ("samples", "batches", "batch_size", "no_gradient")] == [
        SAMPLES,
        3,
        BATCH,
        [],
    ]


@pytest.mark.checklist("H5")
def test_estimators_differ_where_they_should():
    model = build()
    by = {
        e: estimate_fisher(model, loader(SAMPLES, BATCH), estimator=e)["0.weight"]
        for e in ("sample", "batch", "batch_equal")
    }
    assert (by["sample"] - by["batch"]).abs().max() > 1e-4
    assert (by["batch"] - by["batch_equal"]).abs().max() > 1e-4
    even = {
        e: estimate_fisher(model, loader(12, 4), estimator=e)["0.weight"]
        for e in ("batch", "batch_equal")
    }
    torch.testing.assert_close(even["batch"], even["batch_equal"])


def test_sample_estimator_does_not_depend_on_batches_or_chunks():
    model = build("bn", torch.float64)
    expected = estimate_fisher(model, loader(SAMPLES, SAMPLES, torch.float64), estimator="sample")
    for batch, chunk in ((1, 1), (4, 3), (11, 2), (5, 32)):
        found = estimate_fisher(
            model, loader(SAMPLES, batch, torch.float64), estimator="sample", chunk_size=chunk
        )
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-13, atol=1e-17)


@pytest.mark.checklist("H5")
@pytest.mark.parametrize("estimator", ["sample", "batch"])
def test_nothing_of_the_model_changes(estimator):
    model = build("dropout")
    model[1].eval()  # one module in another mode than the rest
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    flags, before = [m.training for m in model.modules()], bits(model)
    random = torch.get_rng_state()
    estimate_fisher(model, [data(6)], estimator=estimator)
    assert [m.training for m in model.modules()] == flags
    assert same(bits(model), before)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(ZeroDivisionError):
        estimate_fisher(model, [data(6)], lambda o, t: 1 / 0, estimator=estimator)
    assert [m.training for m in model.modules()] == flags


class Partly(nn.Module):
    """``unused`` never gets a gradient, ``dead`` gets one that is exactly zero, ``frozen`` wants
    none.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused, self.dead, self.frozen = (
            nn.Linear(6, 4),
            nn.Linear(2, 2),
            nn.Linear(6, 4),
            nn.Linear(4, 4),
        )
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.used(x)) + self.dead(x) * 0.0


@pytest.mark.checklist("H5")
@pytest.mark.parametrize("estimator", ["sample", "batch", "batch_equal"])
def test_parameters_without_gradient(estimator):
    model = Partly()
    fishers = [estimate_fisher(model, loader(9, 4, seed=s), estimator=estimator) for s in (1, 2)]
    assert fishers[0].metadata["no_gradient"] == ["unused.bias", "unused.weight"]
    assert not any(n.startswith("frozen") for n in fishers[0])
    assert not fishers[0]["unused.weight"].any()
    pair = {"forget": fishers[0], "retain": fishers[1]}
    authors = SaliencyMask.from_fisher(**pair, zero_over_zero=True)
    for mask in (authors, SaliencyMask.top_k(**pair, fraction=1.0)):
        counts = mask.counts()
        assert counts["unused.weight"] == counts["unused.bias"] == 0
        # 0 / 0 where a gradient exists: the ratio is 1, as in the authors' code
        assert counts["dead.weight"] == 24
    above = SaliencyMask.from_fisher(**pair, threshold=1.0001, zero_over_zero=True)
    assert above.counts()["dead.weight"] == 0
    ours = SaliencyMask.from_fisher(**pair).counts()
    assert ours["dead.weight"] == ours["dead.bias"] == ours["unused.weight"] == 0


@pytest.mark.parametrize("estimator", ["sample", "batch"])
def test_low_precision_gradients_accumulate_in_fp32(estimator):
    """Trap 10: a bf16 accumulator would stop growing after some 256 equal addends."""

    class Scale(nn.Module):  # no matmul: torch's is slow in bf16 on some CPUs
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))

        def forward(self, x):
            return x * self.weight

    model = Scale()
    x, y = torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    one = estimate_fisher(model, [(x, y)], estimator=estimator)["weight"]
    many = estimate_fisher(model, [(x, y)] * 400, estimator=estimator)["weight"]
    assert one.dtype == torch.float32
    assert one.min() > 0
    torch.testing.assert_close(many, one, rtol=1e-5, atol=0)


def test_tied_parameters_count_once_with_their_whole_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model = Tied().double()
    batches = loader(5, 5, torch.float64)
    for estimator in ("sample", "batch"):
        found = estimate_fisher(model, batches, estimator=estimator)
        assert list(found) == ["a.weight"]
        torch.testing.assert_close(
            found["a.weight"], literal(model, batches, estimator)["a.weight"]
        )


def test_custom_loss_reaches_every_estimator():
    model, (x, y) = build(dtype=torch.float64), data(6, torch.float64)

    def loss(output, target):
        return (output**2).mean()

    found = estimate_fisher(model, [(x, y)], loss, estimator="batch")
    grads = torch.autograd.grad((model(x) ** 2).mean(), list(model.parameters()))
    for (name, _), g in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(found[name], g**2)
    alone = estimate_fisher(model, [(x[:1], y[:1])], loss, estimator="sample")
    torch.testing.assert_close(
        alone["0.weight"], estimate_fisher(model, [(x[:1], y[:1])], loss)["0.weight"]
    )


def test_it_works_under_no_grad_and_skips_empty_batches():
    model, (x, y) = build(), data(6)
    expected = estimate_fisher(model, [(x, y)], estimator="sample")
    with torch.no_grad():
        found = estimate_fisher(model, [(x[:0], y[:0]), (x, y)], estimator="sample")
        estimate_fisher(model, [(x, y)])
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert found.metadata["samples"] == 6
    assert found.metadata["batches"] == 1


@pytest.mark.parametrize("estimator", ["sample", "batch"])
def test_a_non_finite_sample_is_an_error_wherever_it_is(estimator):
    for i in (0, 5, 10):
        x, y = data(SAMPLES)
        x[i, 0] = float("nan")
        with pytest.raises(ValueError, match="loader: expected a finite loss"):
            estimate_fisher(build(), [(x, y)], estimator=estimator, chunk_size=4)


class Sometimes(Partly):
    """``dead`` is left out of batches of 3, so the last one may reach less than the others."""

    def forward(self, x):
        return self.frozen(self.used(x)) if len(x) == 3 else super().forward(x) + self.dead(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["sample", "batch", "batch_equal"])
@pytest.mark.parametrize(
    "make", [Partly, Sometimes, lambda: build("dropout")], ids=["partly", "sometimes", "dropout"]
)
# several batches, the last of 3, a single one
@pytest.mark.parametrize("sizes", [(9, 4), (11, 4), (3, 5)], ids=str)
def test_mask_in_one_call_is_that_of_the_fishers(make, estimator, dtype, sizes):
    model, loaders = make().to(dtype), [loader(*sizes, dtype, seed=s) for s in (1, 2)]
    if make is Sometimes and estimator == "sample" and sizes[0] == 3:
        with pytest.raises(ValueError, match="depends on the samples beside"):
            estimate_fisher(model, loaders[0], estimator=estimator)
        return
    fishers = [
        estimate_fisher(model, batches, estimator=estimator, chunk_size=3) for batches in loaders
    ]
    wanted = SaliencyMask.from_fisher(forget=fishers[0], retain=fishers[1], threshold=0.8)
    found = estimate_mask(
        model,
        forget=loaders[0],
        retain=loaders[1],
        threshold=0.8,
        estimator=estimator,
        chunk_size=3,
    )
    assert found == wanted
    assert found.metadata == wanted.metadata


def test_mask_in_one_call_refuses_gradients_that_are_not_finite():
    """The root of 0 is finite, its gradient is not; 4 samples forget, 5 retain."""

    def loss(output, target):
        return (output.sum() * (len(target) - 5)).abs().sqrt()

    with pytest.raises(ValueError, match=r"retain\['.*'\]: expected finite values >= 0"):
        estimate_mask(build(), forget=[data(4)], retain=[data(5)], loss_fn=loss, estimator="batch")


def test_what_is_held_at_a_time():
    """In units of the model: sums and a gradient; for a mask the sums of two sets. By samples no
    gradient, and for a mask of low memory one sum.
    """
    model = nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(16)])
    batches = [(torch.ones(1, 100), torch.ones(1, 100))] * 3

    def fisher(estimator):
        estimate_fisher(model, batches, F.mse_loss, estimator=estimator)

    def mask(**settings):
        estimate_mask(model, forget=batches, retain=batches, loss_fn=F.mse_loss, **settings)

    for expected, call in (
        (2, lambda: fisher("batch")),
        (1, lambda: fisher("sample")),
        (3, lambda: mask(estimator="batch")),
        (2, lambda: mask()),
        (1, lambda: mask(low_memory=True)),
    ):
        assert expected <= peak(call) / (16 * 100 * 100 * 4) < expected + 0.3


def test_batches_of_other_sizes_are_told():
    """Squared means of unequal batches are compared: their noise falls with the size."""
    model, cuts = build(), lambda n, size: loader(n, size, seed=n)
    with pytest.warns(
        RuntimeWarning, match=r"2 samples in a forget batch and 12 in a retain batch"
    ) as caught:
        estimate_mask(model, forget=cuts(12, 2), retain=cuts(24, 12), estimator="batch")
    assert caught[0].filename == __file__
    # a last batch of 1
    fishers = [estimate_fisher(model, cuts(n, 8), estimator="batch_equal") for n in (9, 16)]
    with pytest.warns(RuntimeWarning, match=r"on average 4.5 .* and 8 .*'batch_equal'"):
        SaliencyMask.from_fisher(forget=fishers[0], retain=fishers[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        estimate_mask(model, forget=cuts(12, 2), retain=cuts(24, 12))
        estimate_mask(model, forget=cuts(23, 6), retain=cuts(24, 6), estimator="batch")


@pytest.mark.parametrize("estimator", ["sample", "batch"])
def test_data_parallel(estimator):
    plain, wrapped = build("bn"), nn.DataParallel(build("bn"))
    expected = estimate_fisher(plain, loader(9, 4), estimator=estimator)
    found = estimate_fisher(wrapped, loader(9, 4), estimator=estimator)
    assert all(torch.equal(found[f"module.{n}"], f) for n, f in expected.items())
    for model in (plain, wrapped):
        sf.unlearn(
            model,
            retain=loader(9, 3),
            forget=loader(9, 3),
            recipe=sf.Recipe.paper(cycles=2, lr=0.5, estimator=estimator),
        )
    assert same(bits(plain), bits(wrapped.module))


def test_model_digest_tells_weights_apart():
    fishers = [estimate_fisher(build(seed=s), [data(4)]).metadata["model"] for s in (0, 0, 1)]
    assert fishers[0] == fishers[1] != fishers[2]
    wrapped = nn.DataParallel(build(seed=0))
    assert sf.models.names.model_digest(wrapped) == fishers[0]
