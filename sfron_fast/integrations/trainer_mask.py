"""A saliency mask from what a Hugging Face Trainer loads."""

from typing import Any

import torch
from transformers import Trainer

from ..errors import require
from ..saliency.fisher import estimate_mask
from ..saliency.mask import SaliencyMask
from ..tasks import Classification, Language, Task
from .trainer_budget import check_sized


def trainer_mask(
    trainer: Trainer, forget_dataset: Any, *, task: Task | None = None, **settings: Any
) -> SaliencyMask:
    """``sf.estimate_mask`` of the Trainer's model over its training data, the retain set, and
    ``forget_dataset``, each loaded as the Trainer loads what it evaluates: its collator, its
    columns, each sample once.

    Call it before ``train()``. The settings of an optimizer's factory are read there, so they may
    get their mask when the Trainer is made already::

        trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=(optimizer_factory, settings))
        settings["saliency"] = trainer_mask(trainer, forget_set)

    Args:
        forget_dataset: in the form of ``train_dataset``; with a length.
        task: what one sample's loss is; None = ``Language()`` where labels are sequences, else
            ``Classification()``.
        settings: the other arguments of ``estimate_mask``: threshold, estimator, ...

    Raises:
        ValueError: a data set without a length, or batches without labels; as ``estimate_mask``.
    """
    sets = {"forget": forget_dataset, "retain": trainer.train_dataset}
    for name, dataset in zip(("forget_dataset", "train_dataset"), sets.values(), strict=True):
        check_sized(name, dataset)
    loaders: dict[str, Any] = {n: trainer.get_eval_dataloader(d) for n, d in sets.items()}
    if task is None:
        labels = next(iter(loaders["forget"])).get("labels")
        found = type(labels).__name__
        require(isinstance(labels, torch.Tensor), "forget_dataset", "labels in its batches", found)
        task = Language() if labels.dim() > 1 else Classification()
    several = trainer.accelerator.num_processes > 1
    group = torch.distributed.group.WORLD if several else None
    model: Any = trainer.model
    with trainer.compute_loss_context_manager():
        return estimate_mask(model, **loaders, task=task, group=group, **settings)
