"""The pass of the Fisher of samples: what it refuses, falls back to, and what does not move it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from models import bits, build, loader, same
from sample_models import CLASSES, Convolutions, Tied, by_loops, images, sentences, tokens_loss
from torch import nn

import sfron_fast as sf
from sfron_fast import SaliencyMask, estimate_fisher, estimate_mask


class Mixing(nn.Module):
    """The mean of the batch enters every sample's output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, x):
        out = self.layer(x)
        return out - 0.5 * out.mean(0)


class Strange(nn.Module):
    """One function that is not known among those that are."""

    def __init__(self):
        super().__init__()
        self.first, self.odd, self.head = nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.odd(self.first(x)))


def rows(samples, seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


class Unseen(Mixing):
    """What two samples do not show: the one before the last enters, the third and later are cut."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        out = self.layer(x)
        return (
            out + x.roll(2, 0)[:, :CLASSES]
            if self.how == "roll"
            else torch.cat([out[:3], 0 * out[3:]])
        )


@pytest.mark.parametrize("how", ["roll", "capacity"])
@pytest.mark.parametrize("estimator", [None, "sample"])
def test_samples_that_are_mixed_in_a_whole_batch_are_refused(how, estimator):
    with pytest.raises(ValueError, match="found 'sample' and a loss that depends on the samples"):
        estimate_fisher(Unseen(how), rows(8), estimator=estimator)


def test_rows_of_samples_without_a_gradient_are_not_guessed():
    """Places come first, and the losses that could show it are flat."""

    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.layer = nn.Embedding(20, 6), nn.Linear(6, CLASSES)

        def forward(self, ids):
            return self.layer(torch.tanh(self.tokens(ids.t()))).mean(0)

    def flat(out, target):
        return (out.square().sum(1) * (target > 0)).mean()

    ids, target = torch.randint(20, (8, 16)), torch.ones(8)
    target[0] = target[-1] = 0
    with pytest.raises(ValueError, match=r"estimator: expected 8 rows of 'layer.*, found 2;"):
        estimate_fisher(Places(), [(ids, target)], flat)
    target[0] = target[-1] = 1
    model, data = Places(), [(ids, target)]
    found = estimate_fisher(model, data, flat)
    for name, wanted in by_loops(model, data, flat).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Mixing(), "a loss that depends on the samples beside"),
        (
            nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, CLASSES)),
            "statistics of the batch in 0.weight",
        ),
    ],
    ids=["mean", "batch norm"],
)
def test_samples_that_are_mixed_are_refused(model, said):
    before = bits(model)
    with pytest.raises(ValueError, match=f"estimator: expected 'batch', .*{said}.*eval"):
        estimate_fisher(model, rows(8), estimator="sample")
    assert same(bits(model), before)
    with pytest.warns(RuntimeWarning, match=f"estimator 'batch' is used, not 'sample': .*{said}"):
        found = estimate_fisher(model, rows(8))
    assert found.metadata["estimator"] == "batch"


def test_what_is_not_known_goes_through_vmap_and_is_named():
    torch.manual_seed(0)
    model, batches = Strange(), rows(11)
    with pytest.warns(RuntimeWarning, match=r"1 of 5 parameters .* odd.weight \(prelu\)"):
        found = estimate_fisher(model, batches, estimator="sample", chunk_size=3)
    with pytest.warns(RuntimeWarning, match=r"not 'sample': odd.weight \(prelu\)"):
        assert estimate_fisher(model, batches).metadata["estimator"] == "batch"
    with pytest.raises(ValueError, match=r"low_memory: expected False.*odd.weight \(prelu\)"):
        estimate_mask(model, forget=batches, retain=batches, low_memory=True)
    for name, wanted in by_loops(model, batches).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-9)


def test_a_function_that_comes_later_is_refused():
    class Later(Strange):
        def forward(self, x):
            return self.head(self.odd(self.first(x)) if len(x) == 3 else self.first(x))

    batches = rows(11)
    with pytest.raises(ValueError, match=r"same functions for every batch.*'odd.weight' in prelu"):
        estimate_fisher(Later(), batches, estimator="sample")


def test_inputs_that_are_not_by_sample():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, CLASSES)

        def forward(self, x, scale):
            return self.layer(x) * scale

    batches = [({"x": x, "scale": torch.ones(CLASSES)}, y) for x, y in rows(8)]
    with pytest.raises(ValueError, match=r"estimator: expected 'batch' .* where inputs are not"):
        estimate_fisher(Shared(), batches, estimator="sample")
    with pytest.warns(RuntimeWarning, match="inputs are not tensors"):
        assert estimate_fisher(Shared(), batches).metadata["estimator"] == "batch"


def trained(model, batches, loss=F.cross_entropy):
    """A little: gradients of a model that has learnt something are not all of one size."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(10):
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return model.eval()


def recut(batches, size):
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    return list(zip(x.split(size), y.split(size), strict=True))


KINDS = {
    "dense": (
        lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
        lambda: rows(60),
        F.cross_entropy,
    ),
    "convolutions": (Convolutions, lambda: images(4, 8, 8, sizes=(8,) * 4), F.cross_entropy),
    "decoder": (
        lambda: Tied(checkpoints=False),
        lambda: sentences(6, 20, each=True, sizes=(6,) * 4),
        tokens_loss,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_does_not_depend_on_the_cut(kind):
    """Squares of batch means grow with 1 / size: the same two sets, cut otherwise, gave masks of
    twice the density. Few weights are near a tie, which rounding decides.
    """
    torch.manual_seed(0)
    make, data, loss = KINDS[kind]
    batches = data()
    model = trained(make(), batches, loss)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    torch.manual_seed(1)
    n = len(y)
    forget, retain = [(x[: n // 4], y[: n // 4])], [(x[n // 4 :], y[n // 4 :])]
    masks = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mine, theirs in ((4, 4), (2, 9), (n, n), (3, 1)):
            sets = {"forget": recut(forget, mine), "retain": recut(retain, theirs)}
            masks.append(estimate_mask(model, **sets, loss_fn=loss))
    total = sum(map(masks[0].size, masks[0]))
    for mask in masks[1:]:
        differ = sum(int((mask.to_bool(k) != masks[0].to_bool(k)).sum()) for k in mask)
        assert differ <= 1e-3 * total
    density = sum(masks[0].counts().values()) / total
    assert 0.05 < density < 0.95
    sets = {"forget": recut(forget, 1), "retain": recut(retain, n)}
    with pytest.warns(RuntimeWarning, match="depends on how the sets were cut"):
        other = estimate_mask(model, **sets, loss_fn=loss, estimator="batch")
    assert abs(sum(other.counts().values()) / total - density) > 0.2  # the control


@pytest.mark.parametrize("threshold", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_low_memory_is_that_of_two_fishers(kind, threshold):
    torch.manual_seed(0)
    make, data, loss = KINDS[kind]
    model, batches = make().eval(), data()
    half = len(batches) // 2
    sets = {"forget": batches[:half], "retain": batches[half:]}
    fishers = {name: estimate_fisher(model, b, loss) for name, b in sets.items()}
    for zero_over_zero in (False, True):
        rest = {"threshold": threshold, "zero_over_zero": zero_over_zero}
        wanted = SaliencyMask.from_fisher(**fishers, **rest)
        found = estimate_mask(model, **sets, loss_fn=loss, low_memory=True, **rest)
        for name in wanted:
            a, b = fishers["forget"][name], threshold * fishers["retain"][name]
            # each side is a sum of 30 or so roundings of at most itself
            near = (a - b).abs() <= 2.0**-23 * 60 * (a + b)
            assert bool((near | (found.to_bool(name) == wanted.to_bool(name))).all())
            assert near.float().mean() < 0.01 or not bool((a + b)[near].any())
        assert found.metadata["low_memory"] is True
        for side in sets:
            kept = ("samples", "no_gradient", "model", "estimator")
            assert all(found.metadata[side][k] == fishers[side].metadata[k] for k in kept)


def test_low_memory_refuses_what_it_cannot_do():
    model, batches = build(), list(loader(8, 4))
    for changes, said in (
        ({"estimator": "batch"}, "estimator: expected 'sample', with low_memory"),
        ({"forget": iter(batches)}, "forget: expected a loader that can be passed twice"),
        ({"retain": []}, "retain: expected at least one sample"),
        ({"draws": 0}, "draws: expected an integer > 0"),
        ({"chunk_size": 0}, "chunk_size: expected an integer > 0"),
    ):
        settings = {"forget": batches, "retain": batches, "low_memory": True, **changes}
        with pytest.raises(ValueError, match=said):
            estimate_mask(model, **settings)
    model, batches = nn.Linear(6, CLASSES), rows(8)
    huge = [(1e25 * x, y) for x, y in batches]  # a square is beyond fp32
    with pytest.raises(ValueError, match="difference at 'weight': expected finite values"):
        estimate_mask(model, forget=huge, retain=batches, low_memory=True)


def test_a_mask_of_low_memory_knows_its_draws():
    model, batches = build(), list(loader(8, 4))
    sets = {"forget": batches[:1], "retain": batches[1:]}
    found, wanted = (estimate_mask(model, **sets, low_memory=low, draws=2) for low in (True, False))
    assert found == wanted
    assert found.metadata["forget"]["draws"] == wanted.metadata["forget"]["draws"] == 2


def test_every_draw_is_squared():
    """An expectation over noise of squared gradients, not the square of an expectation."""

    class Noisy(sf.Task):
        def __init__(self):
            self.generator = torch.Generator().manual_seed(0)

        def prepare(self, batch, device, name="loader"):
            x, y = super().prepare(batch, device, name)
            return x + torch.randn(x.shape, generator=self.generator), y

        def losses(self, model, batch):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model, batches = build(dtype=torch.float32), list(loader(6, 3))
    found = estimate_fisher(model, batches, task=Noisy(), draws=3)
    task, total = Noisy(), {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        for _ in range(3):
            x, y = task.prepare(batch, torch.device("cpu"))
            for i in range(len(y)):
                model.zero_grad()
                F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
                for name, p in model.named_parameters():
                    total[name] += p.grad**2 / 18
    for name, wanted in total.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-9)
    kept = {k: found.metadata[k] for k in ("samples", "batches", "draws")}
    assert kept == {"samples": 6, "batches": 2, "draws": 3}
    with pytest.raises(ValueError, match="draws: expected 1, with estimator 'batch'"):
        estimate_fisher(model, batches, estimator="batch", draws=2)
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="draws: expected an integer > 0"):
            estimate_fisher(model, batches, draws=bad)


def test_a_compiled_model_is_seen_through():
    model, batches = build(), list(loader(8, 4))
    wanted = estimate_fisher(model, batches)
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0][0])
    found = estimate_fisher(compiled, batches)
    assert found.metadata["estimator"] == "sample"
    assert all(torch.equal(found[f"_orig_mod.{n}"], f) for n, f in wanted.items())
    inside = build()
    inside[0].compile(backend="eager")
    inside(batches[0][0])
    assert same(dict(estimate_fisher(inside, batches)), dict(wanted))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, delta):
        x, scale = ctx.saved_tensors
        return delta * scale, (delta * x).sum(0)


def test_a_function_that_no_mode_sees_is_not_passed_over():
    """A kernel of somebody's own: without a look at it, its weight would have a Fisher of zero."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.head(_Scale.apply(x, self.scale))

    model = Own()
    model.scale.grad = grad = torch.full((6,), 3.0)
    with pytest.warns(RuntimeWarning, match=r"not 'sample': scale \(a function that torch shows"):
        found = estimate_fisher(model, rows(8))
    assert found.metadata["estimator"] == "batch"
    assert found["scale"].all()
    with pytest.raises(RuntimeError, match=r"estimator: expected a model that torch.func.vmap can"):
        estimate_fisher(model, rows(8), estimator="sample")
    assert model.scale.grad is grad
    assert torch.equal(grad, torch.full((6,), 3.0))


def test_a_parameter_added_in_place_is_added_once():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)
            self.places, self.token = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(2))

        def forward(self, x):
            x = self.first(x)
            x += self.places
            x[:, :2] = self.token
            return self.head(torch.tanh(x))

    model, batches = Places(), rows(7)
    with pytest.warns(RuntimeWarning, match=r"2 of 6 .*places \(\w+\), token \(__setitem__\)"):
        found = estimate_fisher(model, batches, estimator="sample")
    for name, wanted in by_loops(model, batches).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-9)


def test_a_model_that_differentiates_itself_is_not_known():
    """Gradients inside the forward pass, which samples' own cannot be told from."""

    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x):
            x = x.detach().requires_grad_()
            energy = self.head(torch.tanh(self.first(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    batches = [(x, torch.randn(len(x), 6)) for x, _ in rows(8)]
    with pytest.warns(RuntimeWarning, match="'batch' is used, not 'sample': first.weight"):
        found = estimate_fisher(Force(), batches, F.mse_loss)
    assert found.metadata["estimator"] == "batch"


def test_complex_parameters_are_refused():
    model = nn.Linear(6, CLASSES, dtype=torch.complex64)
    for estimator in (None, "batch"):
        with pytest.raises(ValueError, match=r"model: expected trainable .*complex64 .*weight"):
            estimate_fisher(model, rows(8), estimator=estimator)


class Chosen(nn.Module):
    """A layer for the tokens that count, as many of one sample as of another by chance."""

    def __init__(self):
        super().__init__()
        self.tokens, self.some = nn.Embedding(20, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, ids):
        x, kept = torch.tanh(self.tokens(ids)), ids > 0
        x = torch.zeros_like(x).index_put((kept,), torch.tanh(self.some(x[kept])))
        return self.head(x.mean(1))


def test_rows_that_values_choose_are_not_known():
    ids = torch.randint(1, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    for sample, length in enumerate((4, 2, 6, 4)):  # four for each on the whole
        ids[sample, length:] = 0
    with pytest.warns(RuntimeWarning, match=r"'sample': some.weight \(rows that their values"):
        found = estimate_fisher(Chosen(), [(ids, torch.arange(4))])
    assert found.metadata["estimator"] == "batch"


class Cached(nn.Module):
    """A view of its weight that is made once."""

    def __init__(self):
        super().__init__()
        self.layer, self.head, self.cache = nn.Linear(6, 6), nn.Linear(6, CLASSES), []

    def forward(self, x):
        if not self.cache:
            self.cache.append(self.layer.weight.t())
        return self.head(torch.tanh(x @ self.cache[0]))


def test_a_view_from_another_pass_is_not_passed_over():
    with pytest.raises(ValueError, match=r"'layer.weight' in a function that torch shows"):
        estimate_fisher(Cached(), rows(8))


def test_a_copy_without_gradient_has_no_part():
    class Copied(Cached):
        def forward(self, x):
            with torch.no_grad():
                still = self.layer.weight.t()
            return self.head(
                torch.tanh(self.layer(x) + x @ still + x @ self.layer.weight.T.detach())
            )

    torch.manual_seed(0)
    model, batches = Copied(), rows(7)
    found = estimate_fisher(model, batches)
    assert found.metadata["estimator"] == "sample"
    for name, wanted in by_loops(model, batches).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-9)


class Unusual(nn.Module):
    """Parameters in places where those of layers are not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.vector, self.both = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)
        self.number, self.row = nn.Parameter(torch.randn(6)), nn.Embedding(3, 6)
        self.square, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(6, CLASSES)

    def forward(self, x):
        # an input takes a weight's dtype, a vector passes a layer, a layer gives a number
        x = self.second(torch.tanh(self.first(x)).to(self.second.weight))
        x = x * self.both(self.vector) + F.linear(x, self.number).unsqueeze(1)
        x = x + self.row(torch.tensor(1))
        mixed = self.square.view(2, 8).t().reshape(4, 4)  # as large as its transpose, but another
        return self.head(torch.cat([F.linear(x[:, :4], mixed), x[:, 4:]], 1))


def test_one_weight_of_two_groupings_does_not_add_up():
    class Groups(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, CLASSES)

        def forward(self, x):
            grouped = F.conv2d(x, self.conv.weight, groups=2)
            return self.head(torch.tanh(grouped + self.conv(x[:, :2])).mean((2, 3)))

    model, batches = Groups(), images(4, 5, 5)
    with pytest.warns(RuntimeWarning, match=r"conv.weight \(uses that do not add up\)"):
        found = estimate_fisher(model, batches, estimator="sample")
    for name, wanted in by_loops(model, batches).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-9)


def test_parameters_in_unusual_places_are_exact():
    model, batches = Unusual(), rows(7)
    with pytest.warns(RuntimeWarning, match=r"7 of 12 .*square \(reshape\), second.weight \(to\)"):
        found = estimate_fisher(model, batches, estimator="sample")
    assert found.metadata["no_gradient"] == []
    for name, wanted in by_loops(model, batches).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-9)


def test_a_view_with_other_rows_is_not_known():
    """The weight of a convolution is also a matrix: nothing here adds up the two."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, CLASSES)

        def forward(self, x):
            also = F.linear(x.mean((2, 3)), self.conv.weight.view(4, 3))
            return self.head(self.conv(x).mean((2, 3)) + also)

    with pytest.warns(RuntimeWarning, match=r"conv.weight \(linear\)"):
        found = estimate_fisher(Both(), images(3, 4, 4))
    assert found.metadata["estimator"] == "batch"
