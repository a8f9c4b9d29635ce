"""The optimizer of a Hugging Face Trainer: named parameters in groups, with and without decay."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer

from ..errors import require
from ..optim.adamw import SFRonAdamW
from ..optim.base import SFRonOptimizer
from ..optim.sgd import SFRonSGD

NAMES: dict[str, type[SFRonOptimizer]] = {"sfron_adamw": SFRonAdamW, "sfron_sgd": SFRonSGD}


def optimizer_factory() -> Callable[..., SFRonOptimizer]:
    """For ``Trainer(optimizer_cls_and_kwargs=(optimizer_factory, kwargs))``; kwargs are those of
    ``make_optimizer``.
    """
    return make_optimizer


def make_optimizer(
    model: nn.Module,
    *,
    optimizer: str | type[SFRonOptimizer],
    weight_decay: float = 0.0,
    **settings: Any,
) -> SFRonOptimizer:
    """``optimizer`` over the trainable parameters, named, without decay where the Trainer has none
    (biases, norms).

    Args:
        optimizer: SFRonSGD or SFRonAdamW, or "sfron_sgd" or "sfron_adamw", for a file of settings.
            ``TrainingArguments(optim=...)`` itself takes transformers' own names alone.
        weight_decay: of the parameters that decay. The Trainer's own ``args.weight_decay`` and
            ``args.learning_rate`` do not reach a factory.
        settings: the optimizer's other arguments.
    """
    if isinstance(optimizer, str):
        known = " or ".join(map(repr, NAMES))
        require(optimizer in NAMES, "optimizer", f"a class, or {known}", repr(optimizer))
        optimizer = NAMES[optimizer]
    # it asks nothing of self
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [(n, p) for n, p in named if (n in decaying) == decays],
            "weight_decay": weight_decay * decays,
        }
        for decays in (True, False)
    ]
    return optimizer([g for g in groups if g["params"]], **settings)
