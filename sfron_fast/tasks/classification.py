"""Classification: batches (inputs, targets), one label or one value a sample."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import call, each_tensor, move, tensors_in
from ..errors import require
from ..losses import adaptive_cross_entropy_parts
from .labels import IGNORED, check_counted, check_labels, checked_cross_entropy
from .outputs import logits_of
from .task import Task, Units

SampleLoss = Callable[[Any, Tensor], Tensor]  # (output, targets) -> losses [samples]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TOKENS = (
    "for tokens pass loss_fn=..., with F.cross_entropy(output.flatten(0, 1), targets.flatten())"
    " in it"
)


class Classification(Task):
    """Batches ``(inputs, targets)``: the cross-entropy of outputs [samples, classes], or a loss of
    your own. Batches of Hugging Face's collators are read too: of a mapping ``labels`` [samples]
    are the targets and the rest the inputs, ``logits`` are taken from an output object.

    Args:
        loss_fn: (output, targets) -> losses [samples]; None = cross-entropy, for which targets are
            int64 labels [samples].
    """

    argument = "loss_fn"

    def __init__(self, loss_fn: SampleLoss | None = None) -> None:
        self.loss_fn = loss_fn
        self.in_nats = loss_fn is None

    def prepare(self, batch: Any, device: torch.device, name: str = "loader") -> Any:
        """(inputs, targets) on ``device``; inputs are a tensor or a nest of them.

        Raises:
            ValueError: no such pair, or labels of tokens.
        """
        if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
            labels = batch["labels"]
            one = self.loss_fn is not None or labels.dim() == 1
            require(one, name, "labels [samples]", tuple(labels.shape), "pass task=sf.Language()")
            batch = {key: value for key, value in batch.items() if key != "labels"}, labels
        return move(batch, device, name)

    def samples(self, batch: Any) -> int:
        """As many as there are targets."""
        return len(batch[1])

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for the inputs; a mapping is given to it by keyword."""
        outputs = call(model, batch[0])
        return logits_of(outputs, self.argument) if self.loss_fn is None else outputs

    def losses_of(self, outputs: Any, batch: Any) -> Tensor:
        """The cross-entropy of each sample [samples], or what ``loss_fn`` says."""
        if self.loss_fn is not None:
            return self.loss_fn(outputs, batch[1])
        check_classes(outputs, batch[1])
        return F.cross_entropy(outputs, batch[1], reduction="none")

    def check(self, model: nn.Module, batch: Any) -> None:
        """A look at all labels, by the outputs of the first sample."""
        if self.loss_fn is None:
            outputs = self._first_outputs(model, batch)
            check_classes(outputs, batch[1][:1])
            check_labels(outputs, batch[1])

    def checked_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """``losses``, after a look at the labels."""
        outputs = self.outputs(model, batch)
        self._check(outputs, batch[1])
        return self.checked(self.losses_of(outputs, batch), batch)

    def adaptive_loss(
        self, model: nn.Module, batch: Any, temperature: float, floor: float
    ) -> tuple[Tensor, Tensor]:
        """The adaptive loss [] and the losses [samples]; of cross-entropies by one kernel."""
        if self.loss_fn is not None:
            return super().adaptive_loss(model, batch, temperature, floor)
        outputs, targets = self.outputs(model, batch), batch[1]
        self._check(outputs, targets)
        return adaptive_cross_entropy_parts(outputs, targets, temperature, floor=floor)[:2]

    def units(self, outputs: Any, batch: Any) -> Units:
        """Each sample is one unit."""
        values = self.checked(self.losses_of(outputs, batch), batch)
        sample = torch.arange(len(values), device=values.device)
        return Units(values, sample, torch.ones_like(sample))

    def logits(self, outputs: Any, batch: Any) -> Tensor:
        """The outputs themselves."""
        return outputs

    def unit_labels(self, outputs: Any, batch: Any) -> Tensor:
        """The labels."""
        return batch[1]

    def targets(self, batch: Any) -> Tensor:
        """The second of the pair."""
        return batch[1]

    def correct(self, outputs: Any, batch: Any, name: str) -> Tensor:
        """Whether the largest logit is the label's."""
        check_logits(outputs, batch[1], name)
        return outputs.argmax(1) == batch[1]

    def tells_right(self, model: nn.Module) -> bool:
        """Of outputs [samples, classes]; what a loss of your own is given may be anything."""
        return self.loss_fn is None

    def _first_outputs(self, model: nn.Module, batch: Any) -> Any:
        with torch.no_grad():
            return self.outputs(model, each_tensor(batch, lambda t: t[:1]))

    def _check(self, outputs: Any, targets: Tensor) -> None:
        if self.loss_fn is None:
            check_classes(outputs, targets)
            check_labels(outputs, targets)


class MeanLoss(Classification):
    """The short form of Fisher passes: batches (inputs, targets), and the mean loss [] of a batch,
    as torch's losses give it; None = F.cross_entropy.
    """

    def __init__(self, loss_fn: Callable[[Any, Tensor], Tensor] | None) -> None:
        self.plain = loss_fn is None or loss_fn is F.cross_entropy
        super().__init__(cross_entropy if self.plain else loss_fn)

    def check(self, model: nn.Module, batch: Any) -> None:
        """Under F.cross_entropy a look at all labels, by the outputs of the first sample."""
        if self.plain:
            check_counted(self._first_outputs(model, batch), batch[1])

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for the inputs; for F.cross_entropy its logits."""
        outputs = call(model, batch[0])
        return logits_of(outputs, self.argument) if self.plain else outputs

    def mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """What ``loss_fn`` says of the whole batch []."""
        assert self.loss_fn is not None
        return self._scalar(self.loss_fn(self.outputs(model, batch), batch[1]))

    def losses_of(self, outputs: Any, batch: Any) -> Tensor:
        """Of each sample what ``loss_fn`` says of a batch of it alone [samples]."""
        samples = self.samples(batch)
        if samples > 1 and self.plain:
            return _each_cross_entropy(outputs, batch[1])
        assert self.loss_fn is not None
        targets = batch[1].split(1)
        pairs = zip(_split(outputs, samples), targets, strict=True)
        return torch.stack([self._scalar(self.loss_fn(*pair)) for pair in pairs])

    def _scalar(self, loss: Tensor) -> Tensor:
        found = f"shape {tuple(loss.shape)}"
        require(loss.dim() == 0, "loss_fn", "a scalar mean loss", found, "use reduction='mean'")
        return loss


def check_classes(outputs: Any, targets: Tensor) -> None:
    """Outputs [samples, classes] and an int64 label for each sample, or a loss of the caller's."""
    require(
        targets.dtype == torch.int64, "targets", "int64 labels", targets.dtype, "use targets.long()"
    )
    tensor = isinstance(outputs, Tensor)
    found = tuple(outputs.shape) if tensor else type(outputs).__name__
    require(
        tensor and outputs.dim() == 2 and targets.shape == outputs.shape[:1],
        "loss_fn",
        "one of your own, unless outputs are [samples, classes] and targets [samples]",
        f"none, for outputs and targets of {found}, {tuple(targets.shape)}",
        _TOKENS,
    )


def check_logits(logits: Any, labels: Any, where: str) -> None:
    """Finite logits [samples, classes], or -inf for a class that is switched off, and an integer
    label for each.
    """
    found: object = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    good = isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1
    require(
        good,
        where,
        "logits [batch, classes >= 2]",
        found,
        "let the model return one logit per class",
    )
    require(
        logits.is_floating_point(), where, "floating-point logits", logits.dtype, "return scores"
    )
    good = isinstance(labels, Tensor) and labels.ndim == 1 and labels.dtype in INTEGERS
    found = (
        (labels.dtype, tuple(labels.shape)) if isinstance(labels, Tensor) else type(labels).__name__
    )
    require(
        good, where, "integer labels [batch]", found, "turn one-hot labels into indices: .argmax(1)"
    )
    rows, classes = logits.shape
    require(
        len(labels) == rows > 0,
        where,
        f"{rows or 'some'} labels",
        len(labels),
        "one per row of logits",
    )
    found = [label for label in (int(labels.min()), int(labels.max())) if not 0 <= label < classes]
    require(
        not found, where, f"labels in [0, {classes})", found, "give the model one output per class"
    )
    off = logits == -torch.inf  # a class that is switched off
    bad = int(((~torch.isfinite(logits) & ~off) | off.all(1, keepdim=True)).any(1).sum())
    found, remedy = (
        f"NaN or inf in {bad} of {rows} rows",
        "the model diverged: lower the forget weight or lr",
    )
    require(
        not bad, where, "finite logits (or -inf for classes that are switched off)", found, remedy
    )


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """F.cross_entropy, which reads [samples, tokens, classes] along the tokens: in silence where
    both are as many.
    """
    tokens = isinstance(outputs, Tensor) and outputs.dim() == 3
    require(
        not (tokens and targets.shape == outputs.shape[:2]),
        "loss_fn",
        "one of your own for outputs [samples, tokens, classes]",
        "F.cross_entropy",
        _TOKENS,
    )
    return checked_cross_entropy(outputs, targets)


def _split(outputs: Any, samples: int) -> Iterator[Any]:
    """The outputs of each sample alone; cut at once, as the backward of a slice is as large as the
    whole.
    """
    tensors = tensors_in(outputs)
    parts = [t.split(1) if t.shape[:1] == (samples,) else (t,) * samples for t in tensors]
    for alone in zip(*parts, strict=True):
        left = iter(alone)
        yield each_tensor(outputs, partial(_next, left))


def _next(parts: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(parts)


def _each_cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """``cross_entropy`` of each sample alone [samples]: of several labels the mean of those that
    count.
    """
    cross_entropy(outputs[:1], targets[:1])  # it refuses what it would refuse of all
    losses = checked_cross_entropy(outputs, targets, "none").view(len(targets), -1)
    if targets.is_floating_point():
        return losses.mean(1)
    counted = (targets != IGNORED).view(len(targets), -1).sum(1)
    return losses.sum(1) / counted
