"""Other packages' optimizers, where installed, each as its users write it: plain steps, as none has masks.

What keeps its moments in 8 bits moves fewer bytes; its first step, which is what is checked, is still that of fp32.
"""

from typing import Any

from .arms import ADAMW, SGD, Problem, list_arm
from .harness import Arm
from .lists import Shape


def apex(problem: Problem, kind: str) -> Any:
    """NVIDIA apex's multi-tensor optimizers."""
    import apex.optimizers as peer

    return peer.FusedAdam(problem.params, **ADAMW) if kind == "adamw" else peer.FusedSGD(problem.params, **SGD)


def bitsandbytes(problem: Problem, kind: str) -> Any:
    """bitsandbytes' 32-bit optimizers."""
    import bitsandbytes.optim as peer

    return peer.AdamW32bit(problem.params, **ADAMW) if kind == "adamw" else peer.SGD32bit(problem.params, **SGD)


def torchao(problem: Problem, kind: str) -> Any:
    """torchao's AdamW with 8-bit moments, one compiled function per parameter."""
    import torchao.optim as peer

    if kind != "adamw":
        raise ValueError("torchao has no SGD")
    return peer.AdamW8bit(problem.params, **ADAMW)


def flashoptim(problem: Problem, kind: str, **settings: Any) -> Any:
    """FlashOptim's Triton optimizers; 8-bit moments are their default."""
    import flashoptim as peer

    made = peer.FlashAdamW if kind == "adamw" else peer.FlashSGD
    return made(problem.params, **(ADAMW if kind == "adamw" else SGD), **settings)


def flashoptim_fp32(problem: Problem, kind: str) -> Any:
    """The same with fp32 moments: equal work."""
    return flashoptim(problem, kind, quantize=False, master_weight_bits=None)


PEERS = {
    "apex": apex,
    "bitsandbytes, 32 bit": bitsandbytes,
    "torchao, 8-bit moments": torchao,
    "FlashOptim, fp32 moments": flashoptim_fp32,
    "FlashOptim, 8-bit moments": flashoptim,
}


def peer(name: str, shapes: list[Shape], kind: str, device: str, **rest: Any) -> Arm:
    """A plain step of a peer; raises where it is not installed or does not cover it."""
    problem = Problem([(1,)], device)
    PEERS[name](problem, kind)  # before anything is allocated
    problem = Problem(shapes, device)
    return list_arm(name, problem, PEERS[name](problem, kind).step)
