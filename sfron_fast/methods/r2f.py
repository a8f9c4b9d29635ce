"""R2F, Recover-to-Forget (arXiv 2512.07374): one step along a gradient that is never computed, but
decoded from the gradients of low-rank factors.

With W + B A, A [rank, in] random and B [out, rank] zero, B's gradient is X = G A^T, G [out, in]
that of W. A decoder guesses the rest from where the rows of G lay on a proxy model:

    G^ = X D,   D = (A S A^T + ridge I)^-1 A S,   S = E[G^T G] over the proxy's batches

and the step is W <- W + norm * G^ / |G^|, the norm over all matrices. Of the model that unlearns
neither G nor G^ is formed: |G^|^2 = tr(X^T X D D^T), and X D is added to W in place.

Departures: the published decoder and its loss were not to be found, so this is the linear one that
is best in squares; the step climbs the loss of what is to be forgotten, where the paper descends
that of a target pair; it has a length in place of a rate, as decoded gradients are shrunk. Only
models tuned from the proxy are served: for others the pseudo-inverse may be better.
"""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import by_keyword, integer, number, require
from ..models.linear import is_linear, matrix
from ..models.modes import evaluating, recording
from ..tasks import Task
from .descent import Loader, batches, task_or_classification
from .original import only

Matrices = dict[str, Tensor]  # by name of a linear layer


@dataclass(frozen=True)
class Decoder:
    """What each layer's factor reads, and what its gradient is decoded by."""

    down: Matrices  # A [rank, in]
    up: Matrices  # D [rank, in]

    def without_proxy(self) -> "Decoder":
        """The pseudo-inverse, which knows no proxy: D = (A A^T)^-1 A."""
        up = {name: torch.linalg.pinv(a.double()).T.to(a) for name, a in self.down.items()}
        return Decoder(self.down, up)

    def norm(self, factors: Matrices) -> float:
        """|X D| over all layers."""
        pairs = [(x.double(), self.up[name].to(x.device).double()) for name, x in factors.items()]
        return sum(float(((x.T @ x) * (d @ d.T)).sum()) for x, d in pairs) ** 0.5


@by_keyword
def r2f(
    model: nn.Module, *, forget: Loader, decoder: Decoder, norm: float, task: Task | None = None
) -> nn.Module:
    """R2F: one step of length ``norm`` up the decoded gradient of the mean loss of ``forget``,
    which holds several wordings of what is to go. In place, in eval mode; returns the model.
    """
    number("norm", norm, 0.0)
    factors = factor_gradients(model, forget, decoder, task=task)
    size = decoder.norm(factors)
    require(0.0 < size < float("inf"), "forget", "a gradient that is finite and not 0", size)
    with torch.no_grad():
        for name, x in factors.items():
            w = _matrix(model.get_submodule(name))
            w.addmm_(x.to(w), decoder.up[name].to(w), alpha=norm / size)
    return model


def factor_gradients(
    model: nn.Module, loader: Loader, decoder: Decoder, *, task: Task | None = None
) -> Matrices:
    """X [out, rank] of each layer, of the mean loss over all samples of ``loader``."""
    task, samples, zeros = task_or_classification(task), 0, {}
    modules = dict(model.named_modules())
    for name, a in decoder.down.items():
        w = _matrix(modules[name]) if name in modules else a[:0, :0]
        fits, found = w.shape[1] == a.shape[1], tuple(w.shape)
        require(fits, "decoder", f"a layer {name!r} of {a.shape[1]} inputs", found)
        zeros[name] = w.new_zeros(len(w), len(a))
    sums = {name: torch.zeros_like(b) for name, b in zeros.items()}
    with only(model, []), evaluating(model), recording(model), ExitStack() as hooks:
        for name, b in zeros.items():
            add = partial(_add, decoder.down[name], b.requires_grad_())
            hooks.callback(modules[name].register_forward_hook(add).remove)
        for batch in batches(model, loader, "forget", task):
            count = task.samples(batch)
            grads = torch.autograd.grad(task.mean_loss(model, batch), list(zeros.values()))
            torch._foreach_add_(list(sums.values()), list(grads), alpha=float(count))
            samples += count
    return {name: s / samples for name, s in sums.items()}


@by_keyword
def fit_decoder(
    proxy: nn.Module,
    *,
    loader: Loader,
    layers: str,
    rank: int = 8,
    ridge: float = 1e-3,
    seed: int = 0,
    task: Task | None = None,
) -> Decoder:
    """A decoder from the proxy's full gradients, one a batch of ``loader``; in eval mode.

    Args:
        layers: a regular expression that finds the names of the linear layers, in full.
        ridge: relative to the mean of the diagonal of A S A^T.
        seed: of A, whose entries are normal with variance 1 / in.
    """
    integer("rank", rank, 1)
    number("ridge", ridge, 0.0)
    task, draw = task_or_classification(task), torch.Generator().manual_seed(seed)
    found = {n: m for n, m in proxy.named_modules() if re.fullmatch(layers, n)}
    require(bool(found), "layers", "an expression that finds linear layers", repr(layers))
    down, up, both = {}, {}, {}  # both: A S = E[X^T G], so that S is not formed
    for name, module in found.items():
        w = _matrix(module)
        down[name] = (torch.randn(rank, w.shape[1], generator=draw) / w.shape[1] ** 0.5).to(w)
        both[name] = torch.zeros_like(down[name], dtype=torch.float64)
    weights = [proxy.get_parameter(f"{name}.weight") for name in found]
    with only(proxy, [f"{n}.weight" for n in found]), evaluating(proxy), recording(proxy):
        for batch in batches(proxy, loader, "loader", task):
            grads = torch.autograd.grad(task.mean_loss(proxy, batch), weights)
            for (name, module), grad in zip(found.items(), grads, strict=True):
                g = (grad if isinstance(module, nn.Linear) else grad.T).double()
                both[name] += (g @ down[name].double().T).T @ g
    for name, a_s in both.items():
        square = a_s @ down[name].double().T
        square.diagonal().add_(ridge * square.diagonal().mean())
        up[name] = torch.linalg.solve(square, a_s).to(down[name])
    return Decoder(down, up)


def _matrix(module: nn.Module) -> Tensor:
    """Of a layer that is named; anything else is refused."""
    require(is_linear(module), "layers", "nn.Linear or a Conv1D", type(module).__name__)
    return matrix(module)


def _add(a: Tensor, b: Tensor, _: nn.Module, args: Any, output: Tensor) -> Tensor:
    """What a layer says with B A beside its weight."""
    return output + F.linear(F.linear(args[0], a.to(args[0])), b)
