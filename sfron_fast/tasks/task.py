"""Task: everything a method asks of a batch. A kind of data is a task, not another method."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.batches import call, check_loader, move_tensors, tensors_in
from ..errors import require
from ..losses import adaptive_weights
from ..weights import with_ceiling


class Units(NamedTuple):
    """The losses below a sample, for example of its tokens, sample after sample."""

    losses: Tensor  # [units]
    sample: Tensor  # int64 [units], the sample that each belongs to
    lengths: Tensor  # int64 [samples], units of each sample; their sum is the number of units


class Task:
    """How one kind of batch is prepared, counted and judged.

    A task of your own overrides ``losses``, and of the rest what its batches need::

        class Regression(sf.Task):
            def losses(self, model, batch):
                return (model(batch["x"]) - batch["y"]).square().mean(1)

    Methods with a teacher, or that look at single tokens, want ``losses_of``, ``logits``, ``units``
    or ``targets`` too; what a task lacks is refused by name when a method asks for it.

    Whatever is drawn at random (a time step, noise) is drawn in ``prepare`` and lies in the batch
    it returns: teachers see the same noise, and ``losses`` is a function of the model and the
    batch alone. A generator of the task's own goes into ``state_dict``.
    """

    argument = "task"  # what errors name
    relative = False  # whether ``usual`` says what losses are relative to
    in_nats = False  # whether a loss is a negative log-likelihood, in nats

    def prepare(self, batch: Any, device: torch.device, name: str = "loader") -> Any:
        """A batch of the loader called ``name``, checked and on ``device``, with what is drawn.

        Raises:
            ValueError: there is no tensor in it.
        """
        found = type(batch).__name__
        require(bool(tensors_in(batch)), name, "batches with a tensor in them", found)
        return move_tensors(batch, device)

    def samples(self, batch: Any) -> int:
        """How many samples a batch has, prepared or not: 0 is skipped. By default the length of its
        first tensor.

        Raises:
            ValueError: there is none, or it is one number.
        """
        first = next((t for t in tensors_in(batch) if isinstance(t, Tensor)), None)
        found = type(batch).__name__ if first is None else "one number"
        good = first is not None and first.dim() > 0
        remedy = "let prepare() return the batch, or override samples()"
        require(good, self.argument, "a batch whose first tensor is [samples, ...]", found, remedy)
        assert first is not None
        return len(first)

    def prepared(self, loader: Iterable[Any], device: torch.device, name: str) -> Iterator[Any]:
        """One pass over the batches of ``loader`` that have samples, prepared."""
        check_loader(loader, name)
        for drawn in loader:
            batch = self.prepare(drawn, device, name)
            if self.samples(batch):
                yield batch

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """What the model says of a prepared batch; a mapping is given to it by keyword."""
        return call(model, batch)

    def losses_of(self, outputs: Any, batch: Any) -> Tensor:
        """Each sample's loss [samples], of outputs that are there already."""
        raise self._lacks("losses_of")

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Each sample's loss [samples]. May run under ``torch.func.vmap``, one sample at a time."""
        return self.losses_of(self.outputs(model, batch), batch)

    def check(self, model: nn.Module, batch: Any) -> None:
        """Refuse a batch, once ``losses`` has failed under ``torch.func.vmap``, for what could not
        be looked at in there.
        """

    def mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean of the samples' losses []: what is descended on a retain batch."""
        return self.checked_losses(model, batch).mean()

    def checked_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """``losses``, checked; what a training step starts from."""
        return self.checked(self.losses(model, batch), batch)

    def adaptive_loss(
        self, model: nn.Module, batch: Any, temperature: float, floor: float
    ) -> tuple[Tensor, Tensor]:
        """The adaptively weighted loss [] (docs/equations.md, 4 and 5) and each sample's own
        [samples].
        """
        values = self.checked_losses(model, batch)
        return (adaptive_weights(values, temperature, floor) * values).sum(), values

    def ceiling_loss(
        self,
        model: nn.Module,
        batch: Any,
        temperature: float,
        floor: float,
        ceiling: float,
        reference: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As ``adaptive_loss``; samples whose loss has reached ceiling * reference weigh 0
        (``with_ceiling``), the others what they did.
        """
        values = self.checked_losses(model, batch)
        weights = adaptive_weights(values, temperature, floor)
        return (with_ceiling(weights, values, ceiling, reference) * values).sum(), values

    def token_ceiling_loss(
        self,
        model: nn.Module,
        batch: Any,
        temperature: float,
        floor: float,
        ceiling: float,
        reference: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``ceiling_loss``, of each token of a sequence, which then counts for no more; also
        whether any token is below it, bool [].
        """
        raise self._lacks("token_ceiling_loss")

    def usual(self, batch: Any) -> Tensor | None:
        """The loss that samples of what each was drawn with usually have [samples]: losses are then
        weighted, and the ceiling taken, relative to it. None = of all the same.
        """
        return None

    def replacement_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Each forget sample's loss [samples] against what shall be in its place: descended by a
        recipe whose objective is "replace".
        """
        raise self._lacks("replacement_losses")

    def counted(self, model: nn.Module, batch: Any) -> Tensor:
        """Which samples have something to be asked, bool [samples]: the mean and the adaptive
        weights are of these. For ranks that share a batch.
        """
        return torch.ones(self.samples(batch), dtype=torch.bool)

    def units(self, outputs: Any, batch: Any) -> Units:
        """The losses of the units that samples are made of."""
        raise self._lacks("units")

    def units_by(self, model: nn.Module, batch: Any) -> Units:
        """The same from the batch."""
        return self.units(self.outputs(model, batch), batch)

    def logits(self, outputs: Any, batch: Any) -> Tensor:
        """Logits [units, classes], to compare with a teacher's."""
        raise self._lacks("logits")

    def unit_labels(self, outputs: Any, batch: Any) -> Tensor:
        """The right class of each unit, int64 [units], in the order of ``logits``."""
        raise self._lacks("unit_labels")

    def targets(self, batch: Any) -> Tensor:
        """What the batch says of its samples [samples, ...]: labels, or which are forgotten."""
        raise self._lacks("targets")

    def correct(self, outputs: Any, batch: Any, name: str) -> Tensor:
        """Which units the model gets right, bool [units]: for accuracies along a run."""
        raise self._lacks("correct")

    def tells_right(self, model: nn.Module) -> bool:
        """Whether ``correct`` may be asked along any run, as it costs no more than a loss does."""
        return self.has("correct")

    def begin(self, model: nn.Module, rank: int, ranks: int) -> None:
        """A run of ``unlearn`` begins on ``model``, whose batches so many ranks share."""

    def end(self, model: nn.Module) -> None:
        """The run is over."""

    @contextmanager
    def estimating(self, rank: int, ranks: int) -> Iterator[None]:
        """Around the Fisher pass over one of the sets: both should draw the same."""
        yield

    def reseeded(self) -> "Task":
        """The same task that draws other noise."""
        raise self._lacks("reseeded")

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on with the same draws, in types that ``weights_only`` loads.

        Evaluations take it before and put it back after.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""

    def checked(self, values: Tensor, batch: Any) -> Tensor:
        """``values``, if they are one loss for each sample.

        Raises:
            ValueError: they are of another shape.
        """
        samples = self.samples(batch)
        found: object = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        remedy = "reduce nothing over the samples" if found == [] else ""
        require(found == [samples], self.argument, f"per-sample losses [{samples}]", found, remedy)
        floats = values.is_floating_point()
        require(floats, self.argument, "losses of a floating dtype", values.dtype)
        return values

    def has(self, name: str) -> bool:
        """Whether the task has overridden this."""
        return getattr(type(self), name) is not getattr(Task, name)

    def needs(self, *names: str) -> None:
        """Raise ValueError, before anything is done, if the task has not overridden these."""
        for name in names:
            if not self.has(name):
                raise self._lacks(name)

    def _lacks(self, what: str) -> ValueError:
        named = "losses() or losses_of()" if what == "losses_of" else f"{what}()"
        return ValueError(
            f"task: expected a task with {named}, which this method asks for, found"
            f" {type(self).__name__} without it; pass another, or override it"
        )


def check_depends(loss: Tensor, task: Task) -> None:
    """Raise ValueError for a loss that no backward would reach a weight from."""
    expected = "a loss that depends on a trainable parameter"
    require(loss.requires_grad, task.argument, expected, "a constant")


def as_task(
    task: Task | None, short: Callable[[Any], Task], loss_fn: Callable[..., Tensor] | None = None
) -> Task:
    """``task``, or ``short(loss_fn)`` where there is none.

    Raises:
        ValueError: it is no task, or there are both.
    """
    if task is None:
        return short(loss_fn)
    both = loss_fn is not None
    require(not both, "task", "one of task and loss_fn", "both", "put the loss into the task")
    found = task.__name__ if isinstance(task, type) else type(task).__name__
    good = isinstance(task, Task)
    require(good, "task", "a Task, for example Classification()", found, "pass an instance")
    return task
