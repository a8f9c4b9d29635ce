"""A retain step inside backward: each weight moves as soon as its gradient is whole, and the
gradient is freed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch.distributed as dist
from torch import Tensor

from ..errors import require
from ..ops.layout import is_sharded
from .base import SFRonOptimizer
from .batch import Batch
from .step_checks import check_step


@contextmanager
def step_in_backward(optimizer: SFRonOptimizer) -> Iterator[None]:
    """The update of the next ``step()``, done within one backward; gradients are never held all at
    once.

    ::

        with sf.step_in_backward(opt):
            F.cross_entropy(model(xr), yr).backward()
        opt.step()                     # closes the step: the cycle, hooks, schedulers

    The bits are those of the ordinary step, the slow interpolation of a cycle's last step included.
    It costs a launch for each parameter. Forget steps stay as they are: their clip needs all
    gradients. With FSDP2 a gradient is that of the rank's shard.

    What needs all gradients before the update, or more than one backward, is not to be had:
    ``clip_retain``, ``clip_grad_norm_``, ``torch.amp.GradScaler``, accumulation over several
    backwards (sum the losses), checkpointing with ``use_reentrant=True``, DDP. A ``found_inf`` or
    ``grad_scale`` set before it counts. An error during backward, also one raised by a check here,
    leaves the step half done: go on from a checkpoint.

    Raises:
        ValueError: a group with ``clip_retain``; a setting, parameter or state that a step would
            refuse, before the first weight moves. A gradient can only be looked at when it comes.
        RuntimeError: gradients left from before; the step before was not closed; a weight got a
            second gradient; a job of several ranks whose parameters are not sharded, which nothing
            would reduce in time.
    """
    params = [
        (p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad
    ]
    _check(optimizer, [p for p, _ in params])
    hooks = [
        p.register_post_accumulate_grad_hook(partial(optimizer.retain_one, group))
        for p, group in params
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check(optimizer: SFRonOptimizer, params: list[Tensor]) -> None:
    clips = optimizer.param_groups[0]["clip_retain"]
    require(
        not clips,
        "clip_retain",
        "False: the norm is known only after backward",
        "True",
        "use step() alone",
    )
    if optimizer.mid_step:
        raise RuntimeError(
            "step_in_backward: expected step() after the last one, found none; call it to close a"
            " step"
        )
    if any(p.grad is not None for p in params):
        raise RuntimeError(
            "step_in_backward: expected no gradients before it, found some; call zero_grad()"
        )
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1 and not all(map(is_sharded, params)):
        raise RuntimeError(
            f"step_in_backward: expected parameters sharded by fully_shard in a job of {ranks}"
            " ranks, found whole ones, whose gradients are reduced too late; use step() alone"
        )
    trained = [(g, [p for p in g["params"] if p.requires_grad]) for g in optimizer.param_groups]
    batches = [part for g, ps in trained if ps for part in Batch(g, ps, [], []).split()]
    check_step(optimizer, batches, [], forget=False, single=True)
