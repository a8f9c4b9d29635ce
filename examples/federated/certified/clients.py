"""What each client does: exact diffusion by gossip, the correction, the controls."""

from dataclasses import dataclass
from time import process_time
from typing import Any, NamedTuple

import networkx
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import sfron_fast as sf
from sfron_fast.methods.certified import newton
from sfron_fast.methods.curvature import Objective, conjugate_gradients

from ..processes import Clock, Neighbours, without

LEAVER = 0  # the client whose data goes
DELETED = 0.2  # of its samples, in the first request; in the second it leaves
DECAY, RATE = 0.02, 0.5
TOLERANCE = 2e-5  # training ends where |grad F| is no more,
EVERY, MOST = 25, 5000  # which is looked at every so many rounds
RESIDUAL = 1e-2
REQUESTS = ("samples", "client")

Data = tuple[Tensor, Tensor]  # one client's images [samples, pixels] and labels [samples]


class Setting(NamedTuple):
    """A graph, and each client's samples, by rank."""

    graph: networkx.Graph
    data: list[Data]
    tolerance: float = TOLERANCE


@dataclass
class Trained:
    """What gossip has led to, and what it took of this client."""

    weights: Tensor  # [weights], the same for each client
    rounds: int
    gradient: float  # of F, its norm
    path: list[tuple[int, float, float]]  # rounds, |grad F|, CPU seconds of this client
    apart: float  # how far this client's own weights are from the mean
    clock: Clock


def classifier(data: Data) -> nn.Module:
    """Softmax regression, from zero."""
    model = nn.Linear(data[0].shape[1], 10).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def diffuse(talk: Neighbours, data: Data, tolerance: float) -> Trained:
    """Exact diffusion (Yuan, Ying, Zhao, Sayed 2019): a gradient step, what mixing took from the
    step before put back, a round of gossip.

    Plain decentralised descent ends beside the minimiser, by more the less alike the clients are.
    """
    model, clients = classifier(data), len(talk.graph)
    weights, clock = list(model.parameters()), Clock()
    images, labels = data
    x = before = parameters_to_vector(weights).detach()
    path: list[tuple[int, float, float]] = []
    size, rounds = float("inf"), 0
    mean = x

    def gradient(at: Tensor) -> Tensor:
        vector_to_parameters(at, weights)
        grads = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
        return parameters_to_vector(grads) + DECAY * at

    while size > tolerance:
        if rounds >= MOST:
            raise RuntimeError(f"|grad F| is {size:.1e} after {rounds} rounds, not {tolerance:g}")
        with clock.charged("gossip"):
            for _ in range(EVERY):
                stepped = x - RATE * gradient(x)
                x, before = talk.mix(stepped + x - before), stepped
            rounds += EVERY
        with clock.charged("looking"):
            mean = talk.total(x) / clients
            size = float(talk.total(gradient(mean)).norm()) / clients
        path.append((rounds, size, clock.seconds["gossip"]))
    apart = float((x - mean).norm())
    return Trained(mean, rounds, size, path, apart, clock)


def corrections(
    talk: Neighbours, start: Tensor, data: Data, tolerance: float, share: float, drift: Tensor
) -> dict[str, Any]:
    """The step and its controls, from the same weights: where each ends, the certificate, seconds.

    Args:
        share: of all samples that remain, this client's.
        drift: gradient at ``start`` of what all had, each client weighted by its samples [weights].
    """
    model, clients, clock = classifier(data), len(talk.graph), Clock()
    weights = list(model.parameters())
    equal: dict[str, Any] = {"decay": DECAY, "weight": 1.0 / clients, "total": talk.total}
    found: dict[str, Any] = {"clock": clock}

    def ended(name: str) -> None:
        found[name] = parameters_to_vector(weights).detach().clone()
        vector_to_parameters(start, weights)

    vector_to_parameters(start, weights)
    sent = talk.sent.total()
    with clock.charged("certified"):
        found["certificate"] = sf.methods.certified(
            model, remaining=[data], tolerance=tolerance, residual=RESIDUAL, **equal
        )
    found["messages"] = talk.sent.total() - sent
    ended("released")
    newton(model, remaining=[data], tolerance=tolerance, residual=RESIDUAL, **equal)
    ended("step")

    # what a smaller bound takes
    with clock.charged("two steps"):
        found["bound of two"], _ = newton(
            model, remaining=[data], tolerance=tolerance, residual=RESIDUAL, steps=2, **equal
        )
    ended("two steps")

    # retraining as it might be done: the same steps from zero
    vector_to_parameters(torch.zeros_like(start), weights)
    bound, found["products from zero"] = float("inf"), 0
    with clock.charged("from zero"):
        while bound * DECAY > tolerance:
            bound, products = newton(model, remaining=[data], residual=RESIDUAL, **equal)
            found["products from zero"] += products
    ended("from zero")

    # the diagonal in place of the curvature
    objective = Objective(model, [data], **equal)
    fisher = sf.estimate_fisher(model, [data], estimator="sample")
    diagonal = parameters_to_vector([fisher[name] for name in objective.names]).to(start)
    diagonal = talk.total(diagonal / clients) + DECAY
    objective.move(-objective.gradient() / diagonal)
    ended("diagonal Fisher")

    # each client weighted by its samples: drift is what the objective of training did not see
    objective = Objective(model, [data], **{**equal, "weight": share})
    change = objective.gradient() - drift
    objective.move(-conjugate_gradients(objective.product, change, RESIDUAL)[0])
    ended("sample weights")
    return found


def client(settings: dict[str, Setting]) -> dict[str, Any]:
    """All this client does, by setting; run in every client's process."""
    begun = process_time()
    found: dict[str, Any] = {
        n: _client(setting, dist.get_rank()) for n, setting in settings.items()
    }
    return found | {"seconds": process_time() - begun}


def _client(setting: Setting, rank: int) -> dict[str, Any]:
    talk, (images, labels) = Neighbours(setting.graph), setting.data[rank]
    original = diffuse(talk, (images, labels), setting.tolerance)
    found: dict[str, Any] = {"original": original, "sent": [talk.sent]}
    counts = [len(labels) for _, labels in setting.data]
    model = classifier((images, labels))
    vector_to_parameters(original.weights, list(model.parameters()))
    share = counts[rank] / sum(counts)
    drift = Objective(model, [(images, labels)], DECAY, share, talk.total).gradient()
    for request in REQUESTS:
        rest = remaining(setting, request)
        if rank in rest.graph:
            talk = Neighbours(rest.graph)
            found["sent"].append(talk.sent)
            data = rest.data[rank]
            left = sum(len(rest.data[node][1]) for node in rest.graph)
            found[request] = {
                **corrections(
                    talk, original.weights, data, setting.tolerance, len(data[1]) / left, drift
                ),
                "retrained": diffuse(talk, data, setting.tolerance),
            }
    return found


def remaining(setting: Setting, request: str) -> Setting:
    """What is left of graph and data when a request is met."""
    if request == "client":
        return setting._replace(graph=without(setting.graph, LEAVER))
    images, labels = setting.data[LEAVER]
    gone = round(DELETED * len(labels))
    data = list(setting.data)
    data[LEAVER] = images[gone:], labels[gone:]
    return setting._replace(data=data)
