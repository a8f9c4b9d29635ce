"""Diffusion: batches of clean images or latents with what they are conditioned on."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..data.batches import move_tensors
from ..data.draws import normal, uniform
from ..errors import number, require
from ..losses import adaptive_mse_parts
from ..ops.dtypes import accumulate_dtype, wide
from .averaged import check_averaged, reset_averaged
from .denoisers import Condition, check_batch, predict
from .images import count_images, read_images
from .objectives import Objective
from .places import Places
from .schedule import Prediction, read_schedule
from .task import Task

Reduction = Literal["mean", "sum"]
REDUCTIONS = get_args(Reduction)
OBJECTIVES = "Relabel, Unconditional, Memorise or Surrogate"


class Denoising(Task):
    """Denoising losses: for each sample a timestep and noise are drawn, and its loss is the squared
    error of what the model says of the noisy image (docs/diffusion.md).

    A batch is a pair ``(x0, condition)``, a mapping with one of ``x0``, ``latents``,
    ``pixel_values`` or ``images``, the condition under its keyword, ``condition``, ``labels`` or
    ``label``, and what else the model takes by keyword (``added_cond_kwargs`` of SDXL); or, without
    a condition, x0 alone. x0 is [samples, ...] of a floating dtype, latents scaled already.

    The model is called as ``model(noisy, timesteps [samples], class_labels=condition)`` and returns
    the prediction, as a tensor, ``.sample`` or the first of a tuple: UNet2DModel,
    UNet2DConditionModel and DiTTransformer2DModel of diffusers do. Of one that predicts a variance
    too (twice the channels) that half is not trained.

    What is drawn depends on the seed, the loader's name, how many of its batches came before, and
    the sample's place in the batch (``id`` [samples] of a mapping, if it has one) alone: a run that
    is resumed goes on with the same draws, and so do ranks that share batches, as
    DistributedSampler deals them out. Fisher passes over both sets have draws of their own, the
    same for both, and drop no condition.

    Args:
        scheduler: DDPMScheduler or another of diffusers with ``alphas_cumprod``, or these [T].
        condition: the keyword for the condition; or ``(model, noisy, timesteps, condition, **rest)
            -> prediction``; None = there is none.
        null: the condition that stands for none: a class, or a tensor of an empty prompt
            [...]. Without it nothing is dropped.
        drop, drop_forget: share of retain and of forget samples whose condition is dropped in
            training steps, for guidance; None = .1 where there is a ``null``.
        prediction: "epsilon", "v" or "sample"; None = as the scheduler says, else "epsilon".
        reduction: a sample's loss is the "mean" or the "sum" over its elements.
        reference: ``loss_profile`` of the retain set by the model before the run: losses are then
            weighted relative to what is usual at their timestep, and so is a recipe's ceiling.
        instead: what is descended on forget batches by a recipe with ``objective="replace"``, and
            by ``methods.selective_amnesia``: ``Relabel``, ``Unconditional``, ``Memorise`` or
            ``Surrogate``.
        ema: the averaged weights that belong to the model (EMAModel of diffusers, or torch's
            AveragedModel): a run begins from them, or is refused, and sets them to the raw weights
            at its end, as an average over a short run is the model from before it.
        seed: of all draws.

    Raises:
        ValueError: a setting out of range, or a scheduler of flow matching, by name.
    """

    argument = "task"

    def __init__(
        self,
        scheduler: Any,
        condition: Condition = "class_labels",
        *,
        null: int | Tensor | None = None,
        drop: float | None = None,
        drop_forget: float = 0.0,
        prediction: Prediction | None = None,
        reduction: Reduction = "mean",
        reference: Any = None,
        instead: Objective | None = None,
        ema: Any = None,
        seed: int = 0,
    ) -> None:
        self.schedule = read_schedule(scheduler, prediction)
        known = condition is None or isinstance(condition, str) or callable(condition)
        require(known, "condition", "a keyword, a function or None", type(condition).__name__)
        good = null is None or isinstance(null, (int, Tensor))
        require(good, "null", "a class, a tensor or None", type(null).__name__)
        self.condition, self.null = condition, null
        drop = (0.0 if null is None else 0.1) if drop is None else drop
        for name, share in (("drop", drop), ("drop_forget", drop_forget)):
            number(name, share, 0.0, 1.0)
            require(share == 0.0 or null is not None, "null", f"a condition, with {name}", None)
        self.drop = {"retain": drop, "forget": drop_forget}
        require(reduction in REDUCTIONS, "reduction", "'mean' or 'sum'", repr(reduction))
        self.reduction: Reduction = reduction
        good = reference is None or hasattr(reference, "at")
        require(good, "reference", "what loss_profile returned", type(reference).__name__)
        known = instead is None or isinstance(instead, Objective)
        require(known, "instead", OBJECTIVES, type(instead).__name__)
        require(isinstance(seed, int), "seed", "an integer", repr(seed))
        self.reference, self.instead, self.ema = reference, instead, ema
        self.relative = reference is not None
        self.places = Places(seed)

    @property
    def timesteps(self) -> int:
        """T, how many there are."""
        return len(self.schedule.kept)

    # --- batches --------------------------------------------------------------------------------

    def prepare(self, batch: Any, device: torch.device, name: str = "loader") -> dict[str, Any]:
        """The batch with what is drawn for it, on ``device``.

        Raises:
            ValueError: no images, or no condition for each.
        """
        x0, condition, rest = read_images(batch, self.condition, name)
        ids = rest.pop("id", None)
        x0, condition, rest = move_tensors([x0, condition, rest], device)
        keys = self.places.take(name, len(x0), ids, device)
        noise = normal(keys("noise"), x0.shape[1:])
        chosen = uniform(keys("timestep"), 2)
        t = (chosen[:, 0] * self.timesteps).long()
        training = not self.places.estimates
        dropped = chosen[:, 1] < (self.drop.get(name, 0.0) if training else 0.0)
        made = self.at(x0, condition, t, noise, rest, dropped)
        if self.instead is not None and name == "forget" and training:
            made |= self.instead.drawn(keys("instead"), x0)
        return move_tensors(made, device)

    def at(
        self,
        x0: Tensor,
        condition: Tensor | None,
        t: Tensor,
        noise: Tensor,
        rest: Mapping[str, Any] | None = None,
        dropped: Tensor | None = None,
    ) -> dict[str, Any]:
        """A prepared batch of chosen timesteps int64 [samples] and noise, like x0."""
        if dropped is not None and self.null is not None and condition is not None:
            condition = torch.where(
                dropped.view(-1, *[1] * (condition.dim() - 1)), self.nothing(condition), condition
            )
        return {
            "x0": x0,
            "noisy": self.schedule.noisy(x0, noise, t),
            "target": self.schedule.target(x0, noise, t),
            "noise": noise,
            "t": t,
            "condition": condition,
            "rest": dict(rest or {}),
        }

    def nothing(self, condition: Tensor) -> Tensor:
        """The null condition, as many times as ``condition``."""
        null = self.null
        require(null is not None, "null", "a condition that stands for none", null)
        if isinstance(null, int):
            return torch.full_like(condition, null)
        assert isinstance(null, Tensor)
        return null.to(condition).expand_as(condition)

    def samples(self, batch: Any) -> int:
        """Images."""
        return count_images(batch)

    # --- losses ---------------------------------------------------------------------------------

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """The prediction [samples, ...], like x0."""
        check_batch(model, batch, self.condition)
        found = predict(model, self.condition, batch)
        like = batch["target"].shape
        if isinstance(found, Tensor) and found.shape == (like[0], 2 * like[1], *like[2:]):
            found = found[:, : like[1]]  # the rest is a variance
        shape: object = type(found).__name__
        if isinstance(found, Tensor):
            shape = list(found.shape)
        require(shape == list(like), self.argument, f"a prediction {list(like)}", shape)
        return found

    def losses_of(self, outputs: Tensor, batch: Any) -> Tensor:
        """Each image's squared error [samples]."""
        return self.errors(outputs, batch["target"])

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The same of any target."""
        each = (wide(prediction) - wide(target)).square().flatten(1)
        return each.sum(1) if self.reduction == "sum" else each.mean(1)

    def adaptive_loss(
        self, model: nn.Module, batch: Any, temperature: float, floor: float
    ) -> tuple[Tensor, Tensor]:
        """The adaptive loss [] and the losses [samples], by one kernel."""
        return self._weighted(model, batch, temperature, floor, self.usual(batch), None)

    def ceiling_loss(
        self,
        model: nn.Module,
        batch: Any,
        temperature: float,
        floor: float,
        ceiling: float,
        reference: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As ``adaptive_loss``, with a ceiling; by the kernel where it is relative."""
        if isinstance(reference, Tensor) and reference.dim():
            return self._weighted(model, batch, temperature, floor, reference, ceiling)
        return super().ceiling_loss(model, batch, temperature, floor, ceiling, reference)

    def usual(self, batch: Any) -> Tensor | None:
        """What the reference says of each image's timestep [samples]."""
        return None if self.reference is None else self.reference.at(batch["t"])

    def replacement_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Each image's loss against what ``instead`` wants [samples]."""
        if self.instead is None:
            raise self._lacks("replacement_losses")
        return self.instead.losses(self, model, batch)

    def needs(self, *names: str) -> None:
        """What a method asks of the task."""
        if "replacement_losses" in names:
            wanted = f"{OBJECTIVES}, for objective='replace' and for SA"
            require(self.instead is not None, "instead", wanted, None)
        super().needs(*names)

    def _weighted(
        self,
        model: nn.Module,
        batch: Any,
        temperature: float,
        floor: float,
        reference: Tensor | None,
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        prediction, target = self.outputs(model, batch), batch["target"]
        if prediction.dtype != target.dtype:
            prediction, target = wide(prediction), wide(target)
        return adaptive_mse_parts(
            prediction,
            target,
            temperature,
            floor=floor,
            reduction=self.reduction,
            reference=None
            if reference is None
            else reference.to(accumulate_dtype(prediction.dtype)),
            cap=cap,
        )[:2]

    # --- a run ----------------------------------------------------------------------------------

    def begin(self, model: nn.Module, rank: int, ranks: int) -> None:
        """Draws begin anew.

        Raises:
            ValueError: the model is not at its averaged weights.
        """
        if self.ema is not None:
            check_averaged(model, self.ema)
        self.places.begin(rank, ranks)

    def end(self, model: nn.Module) -> None:
        """The averaged weights are set to the model's."""
        if self.ema is not None:
            reset_averaged(model, self.ema)

    @contextmanager
    def estimating(self, rank: int, ranks: int) -> Iterator[None]:
        """The same draws for each set."""
        with self.places.estimating(rank, ranks):
            yield

    def reseeded(self) -> "Denoising":
        """The same task with the next seed."""
        other = copy.copy(self)
        other.places = Places(self.places.seed + 1)
        return other

    def state_dict(self) -> dict[str, Any]:
        """How many batches have been drawn for, by loader."""
        return self.places.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned; refuses another seed's."""
        self.places.load_state_dict(state)
