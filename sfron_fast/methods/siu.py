"""SIU, Single Image Unlearning (arXiv 2405.12523, NeurIPS 2024): an image-text model forgets what
a concept looks like, from one image, by a cross-entropy and a dual-masked divergence.

    loss = ce_weight * mean l + kl_weight * mean over samples of
           sum_t K_S(t) sum_v K_V(v) p_0(v | t) log(p_0(v | t) / p(v | t))

l the cross-entropy of a sample's answer, p_0 the model before. K_S is 0 at tokens that contradict
what the model knew, which are those where a substitute is said in the concept's place; K_V is 0 at
the words of the concept's name. So the divergence, which keeps all else, does not call the name
back. The second mask takes the name's mass out of p_0 and leaves q whole: the gradient on a logit
is K_S (q sum_u K_V p_0 - K_V p_0), and where p_0 was all name there is none.

Departures: the paper's text was not at hand; the equation and the defaults are as others have
reported them, those of a model of 7 billion weights. How its sums are normalised was not to be
found: here the sum over tokens is taken literally and samples are averaged. Masks are sets of
tokens, so a word that is a substitute is one wherever it is said.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import by_keyword, integer, number, require
from ..losses import soft_target_kl
from ..tasks import Task
from ..tasks.task import check_depends
from .descent import Loader, batches, descend, task_or_classification, teach
from .original import Original, adapters_alone
from .weighted import USUAL


@by_keyword
def siu(
    model: nn.Module,
    *,
    data: Loader,
    names: Sequence[int],
    substitutes: Sequence[int],
    task: Task | None = None,
    ce_weight: float = 0.9,
    kl_weight: float = 0.75,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.05,
    seed: int = 0,
    epochs: int = 1,
    lr: float = 3e-4,
    **settings: Any,
) -> nn.Module:
    """SIU, in place: the model with its adapters is returned; all other weights keep their bits.

    Args:
        data: batches of the task: questions about the image with answers as of a concept that was
            never seen, and beside them what shall stay: facts about the concept in words, and
            questions about other images.
        names: the tokens (classes) of the concept's name, where K_V is 0; none = without this mask.
        substitutes: the tokens said in its place, where K_S is 0; none = without this mask.
        rank, alpha, dropout, seed: of ``add_lora``, for a model without adapters. One that has some
            keeps them, and p_0 is the model with them.
        settings: of ``descend``; AdamW, a constant lr and a weight decay of .01 if they do not say
            otherwise.

    Raises:
        ValueError: a setting out of range, by name; a token that is no class; an empty loader; no
            linear layer; a mask.
    """
    number("ce_weight", ce_weight, 0.0)
    number("kl_weight", kl_weight, 0.0)
    number("lr", lr, 0.0)
    require("mask" not in settings, "mask", "none", "one", "the adapters are what is trained")
    masked = [integer("names", token, 0) for token in names]
    said = [integer("substitutes", token, 0) for token in substitutes]
    task = task_or_classification(task)
    task.needs("losses_of", "logits", "unit_labels")

    def loss(batch: Any, original: Original) -> Tensor:
        with original.weights(model):
            before = teach(model, batch, task)
        classes = before.shape[1]
        for argument, tokens in (("names", masked), ("substitutes", said)):
            most = max(tokens, default=0)
            require(most < classes, argument, f"tokens below {classes}", most)
        outputs = task.outputs(model, batch)
        labels = task.unit_labels(outputs, batch)
        kept = ~torch.isin(labels, labels.new_tensor(said))
        mean = task.checked(task.losses_of(outputs, batch), batch).mean()
        kl = soft_target_kl(
            task.logits(outputs, batch),
            before,
            kept.to(before) / task.samples(batch),
            class_weights=before.new_ones(classes).index_fill(0, labels.new_tensor(masked), 0.0),
        )
        found = ce_weight * mean + kl_weight * kl
        check_depends(found, task)
        return found

    with adapters_alone(model, rank=rank, alpha=alpha, dropout=dropout, seed=seed):
        original = Original(model)

        def losses(_: int) -> Iterator[Tensor]:
            for batch in batches(model, data, "data", task):
                yield loss(batch, original)

        return descend(model, losses, epochs=epochs, lr=lr, **{**USUAL, **settings})
