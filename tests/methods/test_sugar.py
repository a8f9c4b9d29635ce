"""SUGAR: the Fisher of sampled outputs, the surrogates, and the steps, each against its formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfron_fast import methods
from sfron_fast.methods.elastic import Elastic

LATENT, PIXELS, SEED = 4, 6, 5
SHAPE = (2, 2)  # of a latent, in places


def generator(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(LATENT, 5), nn.Tanh(), nn.Linear(5, PIXELS)).double()


class Wide(nn.Module):
    """The same of latents [samples, 2, 2]."""

    def __init__(self):
        super().__init__()
        self.inner = generator()

    def forward(self, latents):
        return self.inner(latents.flatten(1))


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(9)
        self.linear = nn.Linear(PIXELS, 3).double()

    def forward(self, outputs):
        return self.linear(outputs.flatten(1)).tanh()


def latents(count, seed, shape=(LATENT,)):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=draw, dtype=torch.float64)


def cosine(a, b):
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


# --- the Fisher of sampled outputs ----------------------------------------------------------------


def test_the_fisher_is_of_the_outputs_it_drew():
    model, w, draws = generator(), latents(5, seed=1), 3
    found = methods.sampled_fisher(model, w, draws=draws, seed=SEED)
    draw = torch.Generator().manual_seed(SEED)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(draws):
        noise = torch.randn(5, PIXELS, generator=draw).double()
        for one, epsilon in zip(w, noise, strict=True):
            # d/dtheta of -log N(x; G, 6) at x = G + 6^.5 epsilon
            outputs = model(one)
            x = (outputs + PIXELS**0.5 * epsilon).detach()
            negative = (x - outputs).square().sum() / (2 * PIXELS)
            score = torch.autograd.grad(negative, list(model.parameters()))
            for total, s in zip(expected, score, strict=True):
                total += s.square() / (5 * draws)
    for f, e in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-9)


def test_it_tends_to_the_curvature_where_the_released_one_is_zero():
    model, w = generator(), latents(3, seed=1)
    found = methods.sampled_fisher(model, w.repeat(2000, 1), draws=2, seed=SEED)
    params = list(model.parameters())
    exact = [torch.zeros_like(p) for p in params]
    for one in w:
        for pixel in model(one):
            grads = torch.autograd.grad(pixel, params, retain_graph=True)
            for total, g in zip(exact, grads, strict=True):
                total += g.square() / (len(w) * PIXELS)
    for f, e in zip(found.values(), exact, strict=True):
        torch.testing.assert_close(f, e, rtol=0.15, atol=1e-6)
    twin = copy.deepcopy(model)
    released = torch.autograd.grad(F.mse_loss(model(w), twin(w).detach()), params)
    assert all(not g.any() for g in released)


def test_the_pull_is_the_penalty():
    model, penalty = generator(), 3.0
    fisher = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    pull, start = Elastic(model, fisher, penalty), copy.deepcopy(model)
    assert pull().item() == 0.0
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    grads = torch.autograd.grad(pull(), list(model.parameters()))
    named = zip(grads, model.named_parameters(), start.parameters(), strict=True)
    for g, (name, p), s in named:
        torch.testing.assert_close(g, penalty * fisher[name] * (p - s))


# --- surrogates -----------------------------------------------------------------------------------


def test_surrogates_lie_where_the_formula_says():
    w, mean = latents(3, seed=2, shape=SHAPE), latents(1, seed=3, shape=SHAPE)[0]
    through = methods.SurrogateLatents(mean, 2.5)(w)
    for one, found in zip(w, through, strict=True):
        expected = mean - 2.5 * (one - mean) / (one - mean).norm()
        torch.testing.assert_close(found, expected)
    network = nn.Linear(4, 4).double()
    learnt = methods.SurrogateLatents(mean, 2.5, network)(w)
    for one, found in zip(w, learnt, strict=True):
        own = network((one - mean).flatten()).view(SHAPE)
        torch.testing.assert_close(found, mean - 2.5 * own / own.norm())
    assert torch.equal(methods.SurrogateLatents(mean, 2.5)(mean.unsqueeze(0))[0], mean)


def test_surrogates_are_learnt_by_the_loop():
    model, features = Wide().train(), Features()
    w, others = latents(3, seed=2, shape=SHAPE), latents(7, seed=3, shape=SHAPE)
    settings = {"distance": 1.5, "feature_weight": 0.7, "width": 8, "lr": 1e-2, "seed": SEED}
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = methods.fit_surrogates(
        model, identities=w, others=others, features=features, epochs=4, **settings
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    moving = [*model.parameters(), *features.parameters()]
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in moving)

    torch.manual_seed(SEED)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    adam = torch.optim.Adam(network.parameters(), lr=1e-2)
    mean, was = others.mean(0), model(w).detach()
    for _ in range(4):
        own = network((w - mean).flatten(1))
        outputs = model(mean - 1.5 * (own / own.norm(dim=1, keepdim=True)).view_as(w))
        loss = ((outputs - was) ** 2).mean()
        loss = loss + 0.7 * cosine(features(outputs), features(was).detach()).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    for a, b in zip(found.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-7, atol=1e-9)


# --- a request ------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [0.0, 0.8])
def test_a_request_is_the_loop(replay):
    model, features = Wide().train(), Features()
    w, others = latents(3, seed=2, shape=SHAPE), latents(7, seed=3, shape=SHAPE)
    surrogates = methods.SurrogateLatents(others.mean(0), 1.5)
    first, start = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    reach, weight, near, penalty, lr = 0.6, 0.4, 2, 300.0, 1e-2
    fisher = methods.sampled_fisher(model, others, seed=SEED)
    loop = copy.deepcopy(model)
    found = methods.sugar(
        model,
        identities=w,
        others=others,
        surrogates=surrogates,
        reach=reach,
        features=features,
        feature_weight=weight,
        neighbours=near,
        penalty=penalty,
        replay=replay,
        batch=2,
        seed=SEED,
        epochs=3,
        lr=lr,
    )
    assert found is model
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in features.parameters())

    draw, adam = torch.Generator().manual_seed(SEED), torch.optim.Adam(loop.parameters(), lr=lr)
    pulls = []

    def diverted(v):
        is_now, shall_be = loop(v), first(surrogates(v)).detach()
        loss = ((is_now - shall_be) ** 2).mean(1)
        return loss + weight * (1 - cosine(features(is_now), features(shall_be).detach()))

    for _ in range(3):
        for rows in torch.randperm(3, generator=draw).split(2):
            v = w[rows].repeat(near, 1, 1)
            u = others[torch.randint(7, (len(v),), generator=draw)]
            r = reach * torch.rand(len(v), 1, generator=draw).double().view(-1, 1, 1)
            v = v + r * (u - v) / (u - v).flatten(1).norm(dim=1).view(-1, 1, 1)
            loss = diverted(w[rows]).mean()
            for some in v.split(len(rows)):
                loss = loss + diverted(some).mean()
            if replay:
                kept = others[torch.randint(7, (len(rows) + len(v),), generator=draw)]
                loss = loss + replay * ((loop(kept) - first(kept).detach()) ** 2).mean()
            pull = sum(
                (f * (p - s) ** 2).sum()
                for f, p, s in zip(fisher.values(), loop.parameters(), start, strict=True)
            )
            pulls.append(penalty / 2 * pull.item())
            adam.zero_grad()
            (loss + penalty / 2 * pull).backward()
            adam.step()
    for a, b, s in zip(model.parameters(), loop.parameters(), start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert (b - s).abs().max() > 1e-3
    assert max(pulls) > 1e-2  # it had a say


def test_a_neighbour_towards_itself_stays():
    """u = w, as in the released code, is 0 / 0."""
    model, w = generator(), latents(1, seed=2)
    through = methods.SurrogateLatents(torch.zeros(LATENT).double(), 1.0)
    settings = {"identities": w, "others": w, "surrogates": through, "reach": 1.0, "epochs": 2}
    methods.sugar(model, **settings)
    assert all(p.isfinite().all() for p in model.parameters())


def test_elastic_weights_keep_the_others():
    """A request with and without them, and again from where it ended: nothing older is needed."""
    w, others = latents(2, seed=2), latents(64, seed=3)
    through = methods.SurrogateLatents(others.mean(0), 2.0)
    moved = {}
    for penalty in (0.0, 60.0):
        model = generator()
        before = model(others).detach()
        for one in w.split(1):
            methods.sugar(
                model,
                identities=one,
                others=others,
                surrogates=through,
                reach=0.1,
                penalty=penalty,
                epochs=60,
                lr=5e-3,
            )
        moved[penalty] = F.mse_loss(model(others), before).item()
    assert moved[60.0] < 0.7 * moved[0.0]


def good(model):
    w = latents(2, seed=2)
    return {"identities": w, "others": latents(4, seed=3), "surrogates": lambda v: -v, "reach": 1.0}


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("identities", {"identities": latents(0, seed=2)}),
        ("identities", {"identities": torch.ones(2, LATENT, dtype=torch.int64)}),
        ("others", {"others": latents(4, seed=3, shape=(LATENT + 1,))}),
        ("reach", {"reach": -1.0}),
        ("neighbours", {"neighbours": -1}),
        ("penalty", {"penalty": float("nan")}),
        ("replay", {"replay": -1.0}),
        ("feature_weight", {"feature_weight": -1.0}),
        ("batch", {"batch": 0}),
        ("fisher", {"fisher": {}}),
        ("fisher", {"fisher": {n: torch.ones(1) for n, _ in generator().named_parameters()}}),
        ("epochs", {"epochs": 0}),
    ],
)
def test_a_bad_request_is_named_and_nothing_moves(argument, change):
    model = generator()
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        methods.sugar(model, **good(model) | change)
    assert all(torch.equal(start[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("others", {"others": latents(4, seed=3, shape=(LATENT + 1,))}),
        ("distance", {"distance": 0.0}),
        ("feature_weight", {"feature_weight": -1.0}),
        ("width", {"width": 0}),
        ("epochs", {"epochs": 0}),
    ],
)
def test_bad_surrogates_are_named(argument, change):
    settings = {"identities": latents(2, seed=2), "others": latents(4, seed=3), "distance": 1.0}
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        methods.fit_surrogates(generator(), features=Features(), **settings | change)
