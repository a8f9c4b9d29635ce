"""Losses by the model before unlearning, one a sample, in place of a reference model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from ..data.batches import model_device, progress_bar
from ..errors import require
from ..models.modes import evaluating
from ..models.names import model_digest
from ..tasks import Classification, Task
from ..tasks.task import as_task


class ReferenceLosses:
    """Losses [samples] by sample, on the CPU, and the digest of the weights they are of."""

    def __init__(self, ids: Tensor, losses: Tensor, digest: str) -> None:
        order = ids.argsort()
        self.ids, self.losses, self.digest = ids[order], losses[order], digest

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, ids: Tensor) -> Tensor:
        """Losses [k] of the samples ``ids``, int64 [k], on their device.

        Raises:
            ValueError: no int64 [k], or a sample that was not in the loader.
        """
        right = isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.dim() == 1
        found: object = (ids.dtype, tuple(ids.shape)) if isinstance(ids, Tensor) else type(ids)
        require(right, "ids", "int64 [samples]", found)
        wanted = ids.cpu()
        place = torch.searchsorted(self.ids, wanted).clamp_max(len(self.ids) - 1)
        missing = wanted[self.ids[place] != wanted].tolist()
        require(not missing, "ids", "samples of the loader", f"{missing[:3]}, which are none")
        return self.losses[place].to(ids.device)

    def check(self, model: nn.Module) -> None:
        """Before the first step: refuse a model that the losses are not of.

        Raises:
            ValueError: other weights.
        """
        same = model_digest(model) == self.digest
        remedy = "measure again with reference_losses()"
        require(same, "model", "the weights the reference losses are of", "others", remedy)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; ``torch.load(weights_only=True)`` reads it."""
        return {"ids": self.ids, "losses": self.losses, "digest": self.digest}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "ReferenceLosses":
        """What ``state_dict`` returned."""
        return cls(state["ids"].cpu(), state["losses"].cpu(), state["digest"])


def reference_losses(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    task: Task | None = None,
    ids: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> ReferenceLosses:
    """Each sample's loss by the model as it is, in one pass without gradients, in eval mode.

    For losses that compare with the model before unlearning (``npo_weights``, ``dpo_weights``)::

        reference = sf.reference_losses(model, forget_loader, task=task, ids=ids)  # before step 1
        weights = sf.npo_weights(losses, reference[ids(batch)])

    Args:
        model: any on which a forward pass works; of a sharded one every rank must come here, with
            as many batches, and each keeps its own samples.
        loader: batches of the samples.
        task: what a sample's loss is; None = classification. For sequence losses that are sums
            (NPO, DPO) its losses must be sums too.
        ids: of a prepared batch the samples in it, int64 [samples], each once in a pass. None:
            their positions, 0, 1, ..., for a loader whose order is always the same.

    Raises:
        ValueError: no sample, one that comes twice, a loss that is not finite, or a loader that
            shuffles and no ``ids``.
    """
    task = as_task(task, Classification)
    if ids is None:
        shuffles = isinstance(getattr(loader, "sampler", None), RandomSampler)
        remedy = "let batches hold the number of each sample, and pass ids="
        require(not shuffles, "loader", "one that does not shuffle", "RandomSampler", remedy)
    before = task.state_dict()
    found, names, count = [], [], 0
    try:
        with evaluating(model), torch.no_grad():
            batches = task.prepared(loader, model_device(model), "loader")
            for batch in progress_bar(batches, loader, "Reference losses", progress):
                losses = task.checked(task.losses(model, batch), batch).detach().cpu()
                own = torch.arange(count, count + len(losses)) if ids is None else ids(batch).cpu()
                right = own.dtype == torch.int64 and own.shape == losses.shape
                shape = f"int64 [{len(losses)}]"
                require(right, "ids", shape, (own.dtype, tuple(own.shape)))
                found.append(losses)
                names.append(own)
                count += len(losses)
    finally:
        task.load_state_dict(before)  # what it draws later is as if nobody had looked
    require(count > 0, "loader", "at least one sample", "none")
    every, known = torch.cat(found), torch.cat(names)
    bad = known[~every.isfinite()].tolist()
    require(not bad, "loader", "samples with finite losses", f"not finite: samples {bad[:3]}")
    values, times = known.unique(return_counts=True)
    twice = values[times > 1].tolist()
    require(not twice, "ids", "each sample once", f"several times: {twice[:3]}")
    return ReferenceLosses(known, every, model_digest(model))
