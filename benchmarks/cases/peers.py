"""Other packages' optimizers, where installed, as their users write them.

Plain steps only, as none has masks. What keeps its moments in 8 bits moves fewer bytes; its first
step, which is what is checked, is still that of fp32. On a CPU torchao and bitsandbytes run (`make
bench` installs them); apex, built from NVIDIA's source, and FlashOptim need a GPU and say so.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..harness import Arm, Case
from . import arms, probes
from .arms import ADAMW, SGD, Problem, list_arm
from .lists import Shape, weights
from .step_cases import FLOORS


def apex(problem: Problem, kind: str) -> Any:
    """NVIDIA apex's multi-tensor optimizers."""
    import apex.optimizers as peer

    return (
        peer.FusedAdam(problem.params, **ADAMW)
        if kind == "adamw"
        else peer.FusedSGD(problem.params, **SGD)
    )


def bitsandbytes(problem: Problem, kind: str) -> Any:
    """bitsandbytes' 32-bit optimizers: equal work."""
    import bitsandbytes.optim as peer

    return (
        peer.AdamW32bit(problem.params, **ADAMW)
        if kind == "adamw"
        else peer.SGD32bit(problem.params, **SGD)
    )


def bitsandbytes_8bit(problem: Problem, kind: str) -> Any:
    """What bitsandbytes is known for."""
    import bitsandbytes.optim as peer

    return (
        peer.AdamW8bit(problem.params, **ADAMW)
        if kind == "adamw"
        else peer.SGD8bit(problem.params, **SGD)
    )


def torchao(problem: Problem, kind: str, name: str = "AdamW8bit") -> Any:
    """torchao's AdamW with 8-bit moments: a compiled function per shape, called per parameter."""
    import torchao.optim as peer

    if kind != "adamw":
        raise ValueError("torchao has no SGD")
    return getattr(peer, name)(problem.params, **ADAMW)


def torchao_fp32(problem: Problem, kind: str) -> Any:
    """The same with fp32 moments: equal work.

    The underscore is torchao's, which lists it among its public names.
    """
    return torchao(problem, kind, "_AdamW")


def flashoptim(problem: Problem, kind: str, **settings: Any) -> Any:
    """FlashOptim's Triton optimizers; 8-bit moments are their default."""
    import flashoptim as peer

    made = peer.FlashAdamW if kind == "adamw" else peer.FlashSGD
    return made(problem.params, **(ADAMW if kind == "adamw" else SGD), **settings)


def flashoptim_fp32(problem: Problem, kind: str) -> Any:
    """The same with fp32 moments: equal work."""
    return flashoptim(problem, kind, quantize=False, master_weight_bits=None)


PACKAGES = "other packages"  # ends the names of the cases
PEERS = {
    "apex": apex,
    "bitsandbytes, fp32 moments": bitsandbytes,
    "bitsandbytes, 8-bit moments": bitsandbytes_8bit,
    "torchao, fp32 moments": torchao_fp32,
    "torchao, 8-bit moments": torchao,
    "FlashOptim, fp32 moments": flashoptim_fp32,
    "FlashOptim, 8-bit moments": flashoptim,
}


def peer(name: str, shapes: list[Shape], kind: str, device: str) -> Arm:
    """A plain step of a peer; raises where it is not installed or does not cover it."""
    problem = Problem([(1,)], device)
    PEERS[name](problem, kind)  # before anything is allocated
    problem = Problem(shapes, device)
    return list_arm(name, problem, PEERS[name](problem, kind).step)


def peer_case(name: str, shapes: list[Shape], kind: str, device: str) -> Case:
    """Apart from the plain steps: slow ones would leave the others few rounds. Beside moments of 8
    bits stand ours.
    """
    moved = int(FLOORS[kind, "plain"] * weights(shapes))
    about: dict[str, Any] = {"shapes": shapes, "kind": kind, "device": device}
    made: list[Callable[[], Arm]] = [partial(probes.probe, moved, device)]
    made += [partial(arms.best_stock, **about, work="plain")]
    made += [partial(peer, package, **about) for package in PEERS]
    made += [partial(arms.compact, shapes, kind, "plain", 1.0, device, 0.5)]
    made += [partial(arms.ours, **about, work="plain")]
    compiling = 90.0 if kind == "adamw" else 0.0  # torchao's
    return Case(f"{name}, {kind} plain, {PACKAGES}", made, moved, seconds=8.0, needs=compiling)
