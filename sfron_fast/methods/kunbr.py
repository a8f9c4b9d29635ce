"""KUnBR (arXiv 2511.11667, AAAI 2026): unlearn the blocks that know most, each inside the model as
it was, where no other layer can hide the knowledge instead.

    K_l = E over forget samples of |d l / d theta_l|_1, divided by its sum over layers

1. GradDiff on the whole model. 2. The densest blocks of neighbouring layers are chosen, never one
that holds one of the last two layers. 3. Each in turn is put into the original model, all else
frozen, unlearnt there by GradDiff, and put back. 4. Descent on the retain set, all weights moving.

Changes the model in place and returns it. Departures and choices, as the paper was read through
reviews and its code (which visits blocks in turn and has no density): density is taken before step
1, over trainable weights; AdamW and its defaults instead of Lion; each block is visited once; step
4 is the last, where the paper's rounds mix in retain samples. Further keywords go to ``descend``
(weight_decay, max_norm).
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import each_tensor
from ..errors import by_keyword, integer, require
from ..models.modes import evaluating, recording
from ..tasks import Task
from .descent import Loader, batches, task_or_classification
from .finetune import finetune
from .grad_diff import grad_diff
from .original import Original, only
from .weighted import USUAL

UNTOUCHED = 2  # last layers, whose block is never chosen


@by_keyword
def kunbr(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    layers: str,
    size: int,
    top: int,
    task: Task | None = None,
    chosen: Sequence[int] | None = None,
    reinsert: bool = True,
    retain_weight: float = 1.0,
    epochs: int = 10,
    block_epochs: int = 10,
    retain_epochs: int = 1,
    lr: float = 1e-5,
    retain_lr: float | None = None,
    **settings: Any,
) -> nn.Module:
    """KUnBR.

    Args:
        layers: name of the list of layers, as ``model.named_modules()`` has it: "model.layers".
        size: layers of a block; the last block may have fewer.
        top: how many blocks are unlearnt by themselves, the densest first.
        chosen: numbers of the blocks instead of the ``top`` densest.
        reinsert: False = the blocks are unlearnt, all else frozen, where they are: the ablation.
        epochs, block_epochs: passes over the forget set in step 1, and for each block in step 3.
        retain_epochs: passes over the retain set in step 4; 0 = without.
        retain_lr: of step 4, None = ``lr``.

    Raises:
        ValueError: layers that are not there, or a setting out of range, by name.
    """
    task = task_or_classification(task)
    integer("retain_epochs", retain_epochs, 0)
    integer("block_epochs", block_epochs, 1)
    blocks = layer_blocks(model, layers, size)
    free = (len(model.get_submodule(layers)) - UNTOUCHED) // size  # type: ignore[arg-type]
    if chosen is None:
        integer("top", top, 1, free)
        density = block_density(model, forget, blocks, task=task)
        chosen = density[:free].argsort(descending=True)[:top].tolist()
    inside = len(chosen) > 0 and all(0 <= number < free for number in chosen)
    few = f"block numbers from 0 to {free - 1}, as the last {UNTOUCHED} layers are left"
    require(inside, "chosen", few, list(chosen))

    sets: dict[str, Any] = {"forget": forget, "retain": retain, "task": task, "lr": lr}
    sets["retain_weight"] = retain_weight
    original = Original(model)
    grad_diff(model, epochs=epochs, **sets, **settings)
    for number in chosen:
        names = set(blocks[number])
        cover = {n: p for n, p in model.named_parameters() if n in original.kept and n not in names}
        kept = {n: p.detach().clone() for n, p in cover.items()} if reinsert else {}
        with torch.no_grad():
            for name in kept:
                cover[name].copy_(original.kept[name])
        with only(model, blocks[number]):
            grad_diff(model, epochs=block_epochs, **sets, **settings)
        with torch.no_grad():
            for name, weight in kept.items():
                cover[name].copy_(weight)
    if retain_epochs:
        rest: dict[str, Any] = {**USUAL, **settings}
        rate = lr if retain_lr is None else retain_lr
        finetune(model, retain, task=task, epochs=retain_epochs, lr=rate, **rest)
    return model


def layer_blocks(model: nn.Module, layers: str, size: int) -> list[list[str]]:
    """Names of the trainable parameters of each ``size`` neighbouring layers."""
    integer("size", size, 1)
    found = dict(model.named_modules()).get(layers)
    listed = isinstance(found, nn.ModuleList)
    require(listed, "layers", "the name of a ModuleList in model.named_modules()", repr(layers))
    depth = len(found)  # type: ignore[arg-type]
    several = depth - UNTOUCHED >= size
    require(several, "size", f"a block outside the last {UNTOUCHED} of {depth} layers", size)
    blocks: list[list[str]] = [[] for _ in range(-(-depth // size))]
    for name, p in model.named_parameters():
        if p.requires_grad and name.startswith(layers + "."):
            blocks[int(name[len(layers) + 1 :].split(".")[0]) // size].append(name)
    empty = [number for number, names in enumerate(blocks) if not names]
    require(not empty, "model", "a trainable parameter in every block", f"none in {empty}")
    return blocks


def block_density(
    model: nn.Module, forget: Loader, blocks: list[list[str]], *, task: Task | None = None
) -> Tensor:
    """Each block's share of the forget gradients' absolute values, fp64 [blocks], summing to 1.

    Of every sample's own gradient, one at a time, in eval mode: no sum of gradients is kept.
    """
    task = task_or_classification(task)
    named = dict(model.named_parameters())
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    with evaluating(model), recording(model):
        for batch in batches(model, forget, "forget", task):
            for s in range(task.samples(batch)):
                loss = task.mean_loss(model, each_tensor(batch, itemgetter(slice(s, s + 1))))
                flat = [named[name] for names in blocks for name in names]
                grads = iter(torch.autograd.grad(loss, flat, materialize_grads=True))
                for number, names in enumerate(blocks):
                    for _ in names:
                        sums[number] += next(grads).float().abs().sum().double().cpu()
    return sums / sums.sum()
