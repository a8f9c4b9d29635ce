"""What a diffusion model shall say on a forget condition instead: losses that are descended."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.draws import uniform
from ..errors import number, require


class Objective:
    """One of the classes below, for ``Denoising(instead=...)``."""

    def drawn(self, keys: Tensor, x0: Tensor) -> dict[str, Tensor]:
        """What is drawn for the samples ``x0`` of these keys, beside timestep and noise:
        [samples, ...].
        """
        return {}

    def losses(self, task: Any, model: nn.Module, batch: Any) -> Tensor:
        """Of a prepared forget batch [samples]."""
        raise NotImplementedError


class Relabel(Objective):
    """What the model itself says of the same noisy image under another condition (SalUn, Fan et
    al., ICLR 2024; SFR-on's concept removal), without a gradient through that.

    Args:
        to: the other condition: a class, a tensor (the embedding of a prompt [...]), a mapping of
            classes, or a function of the batch's conditions [samples, ...]. Let it be fixed: a
            class drawn anew at each step trains towards the average of all classes.
        teacher: the model asked, put to eval(); None = the one that is trained, as it is then.
    """

    def __init__(
        self,
        to: int | Tensor | Mapping[int, int] | Callable[[Tensor], Tensor],
        teacher: nn.Module | None = None,
    ) -> None:
        known = isinstance(to, (int, Tensor, Mapping)) or callable(to)
        wanted = "a class, a tensor, a mapping or a function"
        require(known, "to", wanted, type(to).__name__)
        self.to, self.teacher = to, None if teacher is None else teacher.eval()

    def losses(self, task: Any, model: nn.Module, batch: Any) -> Tensor:
        """Squared errors to the prediction under the other condition."""
        others = {**batch, "condition": self.condition(batch["condition"])}
        wanted = _asked(task, self.teacher, model, others)
        return task.errors(task.outputs(model, batch), wanted)

    def condition(self, own: Tensor) -> Tensor:
        """The other condition of each sample.

        Raises:
            ValueError: a class that the mapping lacks.
        """
        to: Any = self.to
        if isinstance(to, Tensor):
            return to.to(own).expand_as(own)
        if isinstance(to, Mapping):
            missing = sorted(set(own.tolist()) - set(to))
            require(not missing, "to", f"a class for each of {sorted(to)}", missing)
            return own.new_tensor([to[label] for label in own.tolist()])
        return to(own) if callable(to) else torch.full_like(own, to)


class Unconditional(Objective):
    """Away from the condition (ESD, Gandikota et al., ICCV 2023): the teacher's prediction without
    the condition, less ``guidance`` times what the condition adds to it.

    Args:
        teacher: the model before the run, put to eval(): ``copy.deepcopy(model)``.
        guidance: eta >= 0; 0 = the prediction without the condition.
    """

    def __init__(self, teacher: nn.Module, guidance: float = 1.0) -> None:
        good, found = isinstance(teacher, nn.Module), type(teacher).__name__
        require(good, "teacher", "a model", found, "pass copy.deepcopy(model)")
        self.teacher, self.guidance = teacher.eval(), number("guidance", guidance, 0.0)

    def losses(self, task: Any, model: nn.Module, batch: Any) -> Tensor:
        """Squared errors to that prediction."""
        require(self.teacher is not model, "teacher", "another model", "the one that is trained")
        without = {**batch, "condition": task.nothing(batch["condition"])}
        plain, own = (_asked(task, self.teacher, model, b) for b in (without, batch))
        wanted = plain - self.guidance * (own - plain)
        return task.errors(task.outputs(model, batch), wanted)


class Memorise(Objective):
    """Other images learnt in place of those forgotten (DiMUM): the denoising loss of an
    alternative under the forget condition, with the sample's own timestep and noise.

    Args:
        alternatives: [count, ...] images as x0 is; each sample is given one of them, drawn.
    """

    def __init__(self, alternatives: Tensor) -> None:
        good = isinstance(alternatives, Tensor) and alternatives.dim() > 1 and len(alternatives) > 0
        found: object = type(alternatives).__name__
        if isinstance(alternatives, Tensor):
            found = tuple(alternatives.shape)
        require(good, "alternatives", "images [count, ...]", found)
        self.alternatives = alternatives

    def drawn(self, keys: Tensor, x0: Tensor) -> dict[str, Tensor]:
        """The alternative of each sample."""
        place = (uniform(keys, 1)[:, 0] * len(self.alternatives)).long()
        return {"alternative": self.alternatives[place.to(self.alternatives.device)]}

    def losses(self, task: Any, model: nn.Module, batch: Any) -> Tensor:
        """The denoising losses of the alternatives."""
        return _learnt(task, model, batch)


class Surrogate(Objective):
    """Noise learnt in place of what is forgotten (SA, Heng and Soh, NeurIPS 2023): the denoising
    loss of elements spread evenly over [-1, 1], others in every batch, under the forget condition.
    """

    def drawn(self, keys: Tensor, x0: Tensor) -> dict[str, Tensor]:
        """The noise that each sample is replaced by."""
        even = uniform(keys, x0[0].numel()) if len(x0) else x0.flatten(1)
        return {"alternative": even.mul(2.0).sub(1.0).view(x0.shape)}

    def losses(self, task: Any, model: nn.Module, batch: Any) -> Tensor:
        """The denoising losses of the noise."""
        return _learnt(task, model, batch)


def _learnt(task: Any, model: nn.Module, batch: Any) -> Tensor:
    """The denoising losses [samples] of what each sample was drawn in its place."""
    x0 = batch["alternative"].to(batch["x0"])
    found, wanted = tuple(x0.shape), tuple(batch["x0"].shape)
    require(found == wanted, "alternatives", f"images as x0, {wanted}", found)
    other = task.at(x0, batch["condition"], batch["t"], batch["noise"], batch["rest"])
    return task.losses(model, other)


def _asked(task: Any, teacher: nn.Module | None, model: nn.Module, batch: Any) -> Tensor:
    """The prediction of the teacher, or of the model as it is."""
    with torch.no_grad():
        return task.outputs(model if teacher is None else teacher, batch)
