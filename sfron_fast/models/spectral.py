"""FastClip (arXiv 2402.16017, AISTATS 2024): spectral norms of the layers as a model runs them, and
a bound on them.

A layer is an affine map f(x) = M x + b of inputs of the shape it gets. M is never made: it has the
stride and the padding of a convolution in it, and the BatchNorm after it (in eval mode). What is
needed of it comes from autograd, for a few orthonormal inputs X at a time:

    Y = f(X) - f(0),    norms = singular values of Y,    X <- orthonormal(gradient of |Y|^2 / 2)

The norm of a convolution's kernel, reshaped to a matrix, is another number: for a kernel of k x k
up to k times too small.

Where a norm is above the bound c, gradient steps on the weights take the map to what it would say
of inputs shorter by c / norm, along its singular vectors:

    min over the weights of |f(V) - f(0) - (f0(s V) - f0(0))|^2,    s = min(1, c / norms)

Departures: a step goes to the minimum along its gradient, where the authors have one rate for all
layers; they iterate with I + M^T M, which takes more passes to the same X, and shorten all of V by
the largest norm's c / norm, also where that is below 1 already.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from ..data.batches import call
from ..errors import number, require, warn
from .linear import is_linear
from .modes import evaluating, recording

VECTORS = 8  # iterated together, as the top of a spectrum is often flat
# relative change of the norm in a pass, to stop at: for a result, for a look, in a round
SETTLED, SURE, SETTLING = 1e-6, 1e-4, 1e-3
PASSES, ROUNDS = 1000, 200
ENOUGH = 1.02  # of the bound: what is above by less is left, as it is approached ever more slowly

Weights = list[Tensor]


@dataclass(frozen=True)
class Affine:
    """A layer on inputs of one shape, with the BatchNorm after it if there is one."""

    layers: tuple[nn.Module, ...]
    zero: Tensor  # [1, ...], an input

    def weights(self) -> Weights:
        """What M is made of, besides running statistics."""
        weights: list[Any] = [layer.weight for layer in self.layers]
        return [weight.detach() for weight in weights if weight is not None]

    def linear(self, x: Tensor, weights: Weights) -> Tensor:
        """M x [vectors, ...] under these weights: what it says of x, less what it says of 0."""
        zero, given = self.zero, iter(weights)
        for layer in self.layers:
            own = {} if layer.weight is None else {"weight": next(given)}
            x, zero = (functional_call(layer, own, (at,)) for at in (x, zero))
        return x - zero

    def start(self) -> Tensor:
        """Orthonormal inputs [vectors, ...], the same at every call."""
        size = self.zero.numel()
        drawn = torch.randn(size, min(VECTORS, size), generator=torch.Generator().manual_seed(0))
        return torch.linalg.qr(drawn.to(self.zero)).Q.T.reshape(-1, *self.zero.shape[1:])

    def settle(self, x: Tensor, weights: Weights, change: float) -> tuple[Tensor, Tensor]:
        """The largest singular values [values], falling, and their inputs [values, ...],
        once the first of them moves by no more than this from one pass to the next.
        """
        last = 0.0
        for left in reversed(range(PASSES)):
            pulled: Any = vjp(lambda at: self.linear(at, weights), x)
            y, back = pulled
            known = bool(y.isfinite().all())
            require(known, "model", "finite weights and statistics", "NaN or inf")
            turn, norms, _ = torch.linalg.svd(y.flatten(1), full_matrices=False)
            largest = float(norms[0])
            if abs(largest - last) <= change * largest or not left:
                break
            last = largest
            x = torch.linalg.qr(back(y)[0].flatten(1).T).Q.T.reshape(x.shape)
        return norms, (turn.T @ x.flatten(1)).reshape(-1, *x.shape[1:])

    def pull(self, x: Tensor, norms: Tensor, bound: float) -> None:
        """One gradient step of the weights towards what the map says of shorter inputs."""
        weights = self.weights()
        pulled: Any = vjp(lambda own: self.linear(x, own), weights)
        said, back = pulled
        short = (bound / norms).clamp(max=1.0).view(-1, *[1] * (said.dim() - 1))
        (grads,) = back(said - short * said)
        # what a step of rate 1 changes, to first order: M is linear in each of two weights at most
        there, back_again = (
            self.linear(x, [w + sign * g for w, g in zip(weights, grads, strict=True)])
            for sign in (1.0, -1.0)
        )
        moves = (there - back_again) / 2.0
        rate = sum(g.square().sum() for g in grads) / moves.square().sum()
        torch._foreach_sub_(weights, [rate * g for g in grads])


def spectral_norms(model: nn.Module, inputs: Any) -> dict[str, float]:
    """The spectral norm of every linear layer, convolution and BatchNorm, by its name; of a layer
    with a BatchNorm right after it that of both together, under the name of the first.

    Args:
        inputs: a batch as the model takes it: a tensor, or a mapping that is given by keyword. One
            pass in eval mode shows the shapes, on which a convolution's norm depends; what is
            called twice counts as at its first call, what is no module of its own is not seen.

    Raises:
        ValueError: no such layer; weights that are neither fp32 nor fp64; a BatchNorm without
            running statistics, which is no affine map.
    """
    found = {}
    with _looking(model):
        for name, layer in _layers(model, inputs).items():
            norms, _ = layer.settle(layer.start(), layer.weights(), SETTLED)
            found[name] = float(norms[0])
    return found


def clip_spectral_norms(model: nn.Module, inputs: Any, *, bound: float) -> nn.Module:
    """Weights, in place, such that no norm of ``spectral_norms`` is above ``bound`` by more than
    two or three in a hundred; layers that are not above keep their bits. Returns the model.

    Training moves norms again, also through the statistics of a BatchNorm: clip after every epoch,
    or more often.

    Args:
        inputs: as ``spectral_norms`` takes them.

    Raises:
        ValueError: as ``spectral_norms``; a bound that is not above 0. Nothing is changed then.

    Warns:
        RuntimeWarning: a norm is still above.
    """
    number("bound", bound, 0.0, open_low=True)
    with _looking(model):
        above = [n for n, layer in _layers(model, inputs).items() if not _clip(layer, bound)]
    if above:
        warn(f"spectral norms still above {bound:g} in {', '.join(above)}; clip once more")
    return model


def _clip(layer: Affine, bound: float) -> bool:
    """Whether its norm is below, in the end."""
    enough = ENOUGH * bound
    norms, x = layer.settle(layer.start(), layer.weights(), SURE)
    for _ in range(ROUNDS if layer.weights() else 0):
        if norms[0] <= enough:
            return True
        layer.pull(x, norms, bound)
        norms, x = layer.settle(x, layer.weights(), SETTLING)
        if norms[0] <= enough:  # perhaps beside another that is the largest by now
            norms, x = layer.settle(layer.start(), layer.weights(), SURE)
    return bool(norms[0] <= enough)


@contextmanager
def _looking(model: nn.Module) -> Iterator[None]:
    with recording(model), torch.no_grad(), evaluating(model):
        yield


def _layers(model: nn.Module, inputs: Any) -> dict[str, Affine]:
    """By name, from one pass of the model, in the order in which they are called."""
    found: dict[str, Affine] = {}
    said: dict[int, tuple[str, Any, int]] = {}  # by identity, outputs and how often written to

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0]
            _check(name, module, x)
            before, last, version = said.get(id(x), ("", None, 0))
            # not what an activation has been written over
            follows = last is x and x._version == version and len(found[before].layers) == 1
            if _is_batch_norm(module) and follows:
                found[before] = Affine((*found[before].layers, module), found[before].zero)
            elif name not in found:
                tokens = is_linear(module) and x.dim() > 2  # each by itself
                one = x.flatten(0, -2)[:1] if tokens else x[:1]
                found[name] = Affine((module,), torch.zeros_like(one))
                if not tokens:
                    said[id(output)] = name, output, output._version

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if _is_affine(module):
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        call(model, inputs)
    kinds = "a linear layer, a convolution or a BatchNorm"
    require(bool(found), "model", kinds, f"none called in {type(model).__name__}")
    return found


def _check(name: str, module: Any, x: Tensor) -> None:
    """Refuse a layer that is no affine map, or whose weight could not be set."""
    running = not _is_batch_norm(module) or module.running_mean is not None
    require(running, "model", "BatchNorm with running statistics", f"{name!r} without")
    wide = x.dtype in (torch.float32, torch.float64)
    require(wide, "model", "layers on fp32 or fp64", f"{name!r} on {x.dtype}", "use .float()")
    plain = module.weight is None or isinstance(module.weight, nn.Parameter)
    remedy = "remove the parametrization, then clip"
    require(plain, "model", "weights that are parameters", f"{name!r}, made of others", remedy)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _is_affine(module: nn.Module) -> bool:
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return convolution or is_linear(module) or _is_batch_norm(module)
