"""The labels of a loader's samples, where its data set holds them: no sample is loaded."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset


def labels_of(loader: Any) -> set[int] | None:
    """The classes of a DataLoader's data set: what ``targets`` of torchvision's kind or the last
    tensor of a TensorDataset says, of a ``Subset`` those of its samples; None where nothing does.
    """
    dataset, chosen = getattr(loader, "dataset", None), None
    while isinstance(dataset, Subset):
        numbers = torch.as_tensor(dataset.indices)
        chosen = numbers if chosen is None else numbers[chosen]
        dataset = dataset.dataset
    labels: Any = getattr(dataset, "targets", None)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        labels = dataset.tensors[-1]
    if isinstance(labels, (list, tuple)) and all(type(label) is int for label in labels):
        labels = torch.tensor(labels)
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        return None
    return set(labels.cpu()[slice(None) if chosen is None else chosen].tolist())


def share_no_label(forget: Any, retain: Any) -> bool:
    """Whether every class of the forget set goes: the retain set is known to have none of them."""
    ours, theirs = labels_of(forget), labels_of(retain)
    return bool(ours) and bool(theirs) and not (ours or set()) & (theirs or set())
