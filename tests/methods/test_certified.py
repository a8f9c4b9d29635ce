"""The certified step: curvature against dense Hessians, the bound, the noise, several clients."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.utils import parameters_to_vector

from sfron_fast import methods
from sfron_fast.methods.certified import newton
from sfron_fast.methods.curvature import Objective, conjugate_gradients
from sfron_fast.methods.gaussian_noise import add_noise, gaussian_sigma

PIXELS, CLASSES, DECAY = 5, 3, 0.1


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(PIXELS, CLASSES).double()


def samples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, PIXELS, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (count,), generator=generator)


class Sum:
    """What so many threads have, summed in their order."""

    def __init__(self, clients):
        self.barrier, self.found = threading.Barrier(clients), {}

    def of(self, number):
        def total(values):
            self.found[number] = values
            self.barrier.wait()
            summed = sum(self.found[n] for n in sorted(self.found))
            self.barrier.wait()
            return summed

        return total


def by_clients(clients, call):
    """``call(number, total)`` of each client at once; the results by number."""
    sums = Sum(clients)
    with ThreadPoolExecutor(clients) as pool:
        jobs = [pool.submit(call, number, sums.of(number)) for number in range(clients)]
        return [job.result(timeout=60) for job in jobs]


def objective(model, parts, weights):
    """F [] as a function of the weights, written out."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def value(flat):
        pieces = flat.split([shape.numel() for shape in shapes])
        named = {n: v.view(s) for n, v, s in zip(names, pieces, shapes, strict=True)}
        losses = [F.cross_entropy(functional_call(model, named, (x,)), y) for x, y in parts]
        terms = [w * loss for w, loss in zip(weights, losses, strict=True)]
        return sum(terms) + DECAY / 2 * flat.square().sum()

    return value


def flat(model):
    return parameters_to_vector(model.parameters()).detach()


PARTS = [samples(7, 1), samples(4, 2), samples(12, 3)]
EQUAL = [1 / 3] * 3


def test_gradient_and_products_are_those_of_the_whole_objective():
    """Client weights whatever the sizes, and batches that a client's data are cut into."""
    model = linear()
    value = objective(model, PARTS, EQUAL)
    v = torch.randn(len(flat(model)), dtype=torch.float64)

    def client(number, total):
        x, y = PARTS[number]
        batches = [(x[:3], y[:3]), (x[3:], y[3:])]
        mine = Objective(copy.deepcopy(model), batches, DECAY, 1 / 3, total)
        mine.check()
        return mine.gradient(), mine.product(v), mine.product(v)

    for gradient, product, again in by_clients(3, client):
        torch.testing.assert_close(gradient, torch.func.grad(value)(flat(model)))
        torch.testing.assert_close(product, hessian(value)(flat(model)) @ v)
        assert torch.equal(product, again)


def test_conjugate_gradients_solve_to_the_residual_asked_for():
    torch.manual_seed(0)
    half = torch.randn(30, 30, dtype=torch.float64)
    matrix, b = half @ half.T + torch.eye(30), torch.randn(30, dtype=torch.float64)
    counts = []
    for residual in (1e-1, 1e-4, 1e-10):
        x, count = conjugate_gradients(lambda v: matrix @ v, b, residual)
        assert (b - matrix @ x).norm() <= 1.01 * residual * b.norm()
        counts.append(count)
    assert counts[0] < counts[1] < counts[2]
    zero, none = conjugate_gradients(lambda v: matrix @ v, 0 * b, 1e-2)
    assert none == 0
    assert (zero == 0).all()


def test_the_step_is_newtons_and_the_bound_holds():
    model = linear()
    value = objective(model, PARTS, EQUAL)
    start = flat(model)
    expected = start - torch.linalg.solve(hessian(value)(start), torch.func.grad(value)(start))
    optimum = expected
    for _ in range(20):
        step = torch.linalg.solve(hessian(value)(optimum), torch.func.grad(value)(optimum))
        optimum = optimum - step

    def client(number, total):
        mine = copy.deepcopy(model)
        settings = {"remaining": [PARTS[number]], "decay": DECAY, "weight": 1 / 3}
        bound, _ = newton(mine, **settings, total=total, residual=1e-9, tolerance=1e-3)
        return flat(mine), bound

    for found, bound in by_clients(3, client):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        gradient = torch.func.grad(value)(expected).norm().item()
        assert bound == pytest.approx((gradient + 1e-3) / DECAY, rel=1e-6)
        distance = (found - optimum).norm().item()
        assert 1e-6 < distance <= gradient / DECAY
    assert (expected - optimum).norm() < 0.5 * (start - optimum).norm()


def test_two_steps_are_one_and_another():
    twice, both = linear(), linear()
    settings = {"remaining": [PARTS[0]], "decay": DECAY}
    (first, count), (bound, more) = newton(twice, **settings), newton(twice, **settings)
    assert newton(both, **settings, steps=2) == (bound, count + more)
    assert torch.equal(flat(twice), flat(both))
    assert bound < 0.2 * first


def hockey_stick(sigma, distance, epsilon):
    """The integral of max(p - e^epsilon q, 0) of the two normals, as a sum."""
    width = 12 * sigma + distance
    z = torch.linspace(-width, width, 400_001, dtype=torch.float64)
    p, q = (torch.exp(-((z - m) ** 2) / (2 * sigma**2)) for m in (0.0, distance))
    scale = sigma * math.sqrt(2 * math.pi)
    return ((p - math.exp(epsilon) * q).clamp(min=0).sum() * (z[1] - z[0]) / scale).item()


@pytest.mark.parametrize("distance", [0.01, 3.0])
@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-5), (0.1, 1e-3), (4.0, 1e-2)])
def test_sigma_is_the_least_that_hides_the_distance(distance, epsilon, delta):
    sigma = gaussian_sigma(distance, epsilon, delta)
    assert hockey_stick(sigma, distance, epsilon) == pytest.approx(delta, rel=1e-3)
    assert hockey_stick(0.99 * sigma, distance, epsilon) > 1.01 * delta
    if epsilon < 1.0:  # where the usual formula holds, it asks for more
        assert sigma < distance * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


@pytest.mark.parametrize("clients", [1, 3])
def test_noise_of_all_clients_together_has_sigma(clients):
    model = nn.Linear(100, 100).double()

    def client(number, total):
        mine = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(number)
        add_noise(mine, 0.3, None if clients == 1 else total, generator)
        return flat(mine) - flat(model)

    found = by_clients(clients, client)
    assert all(torch.equal(noise, found[0]) for noise in found)
    assert found[0].std().item() == pytest.approx(0.3, rel=0.03)
    assert abs(found[0].mean().item()) < 0.01


def test_a_certificate_says_what_was_done():
    model, plain = linear(), linear()
    settings = {"remaining": [PARTS[2]], "decay": DECAY, "tolerance": 1e-4}
    generator = torch.Generator().manual_seed(5)
    found = methods.certified(model, **settings, epsilon=2.0, delta=1e-3, generator=generator)
    distance, products = newton(plain, **settings)
    assert (found.distance, found.products) == (distance, products)
    assert (found.epsilon, found.delta) == (2.0, 1e-3)
    assert found.sigma == gaussian_sigma(distance, 2.0, 1e-3)
    noise = torch.randn(
        len(flat(model)), generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    torch.testing.assert_close(flat(model), flat(plain) + found.sigma * noise)
    # nobody's generator: other noise each time
    other, another = linear(), linear()
    for each in (other, another):
        methods.certified(each, **settings)
    assert not torch.equal(flat(other), flat(another))


def test_only_the_last_layer():
    """What is frozen is part of the inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    x, y = PARTS[2]
    with pytest.raises(ValueError, match=r"^model: expected logits that are linear .*found others"):
        newton(model, remaining=[(x, y)], decay=DECAY)
    before = flat(model)
    model[0].requires_grad_(False)
    inputs, last = model[:2](x).detach(), copy.deepcopy(model[2])
    newton(model, remaining=[(x, y)], decay=DECAY)
    newton(last, remaining=[(inputs, y)], decay=DECAY)
    torch.testing.assert_close(flat(model[2]), flat(last))
    assert torch.equal(flat(model[0]), before[: len(flat(model[0]))])


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("decay", {"decay": 0.0}),
        ("weight", {"weight": 0.5}),
        ("weight", {"weight": -1.0}),
        ("epsilon", {"epsilon": 0.0}),
        ("epsilon", {"epsilon": math.inf}),
        ("delta", {"delta": 0.0}),
        ("delta", {"delta": 1.5}),
        ("tolerance", {"tolerance": -1.0}),
        ("residual", {"residual": 0.0}),
        ("steps", {"steps": 0}),
        ("remaining", {"remaining": []}),
        ("targets", {"remaining": [(PARTS[0][0], PARTS[0][1] + CLASSES)]}),
        ("model", {"model": linear().requires_grad_(False)}),
    ],
)
def test_bad_input_is_named_and_nothing_moves(argument, changes):
    settings = {"model": linear(), "remaining": [PARTS[0]], "decay": DECAY, **changes}
    model = settings.pop("model")
    before = flat(model)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        methods.certified(model, **settings)
    assert torch.equal(flat(model), before)
