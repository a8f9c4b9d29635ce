"""What a noise scheduler says: how much of an image is left at each timestep, what is predicted,
and which image a prediction stands for.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import require
from ..ops.dtypes import accumulate_dtype, wide

Prediction = Literal["epsilon", "v", "sample"]
NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}  # diffusers'
LEAST = 1e-6  # what is divided by, where nothing is left of the image or of the noise


class Schedule(NamedTuple):
    """q(x_t | x_0) = sqrt(kept_t) x_0 + sqrt(1 - kept_t) noise, and the model's target."""

    kept: Tensor  # fp64 [timesteps], the cumulative products of alpha
    prediction: Prediction

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [samples, ...] in the dtype of x0."""
        signal, other = self._parts(t, x0)
        return (signal * wide(x0) + other * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should say of x_t: the noise, the velocity (Salimans and Ho, ICLR 2022),
        or x0.
        """
        if self.prediction == "epsilon":
            return noise.to(x0.dtype)
        if self.prediction == "sample":
            return x0
        signal, other = self._parts(t, x0)
        return (signal * noise - other * wide(x0)).to(x0.dtype)

    def image(self, noisy: Tensor, said: Tensor, t: Tensor) -> Tensor:
        """The x0 that a prediction ``said`` of ``noisy`` stands for: ``target`` solved for x0."""
        signal, other = self._parts(t, noisy)
        if self.prediction == "sample":
            return said
        if self.prediction == "v":
            return signal * noisy - other * said
        return (noisy - other * said) / signal.clamp_min(LEAST)

    def noise(self, noisy: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The noise that makes ``noisy`` of x0."""
        signal, other = self._parts(t, noisy)
        return (noisy - signal * x0) / other.clamp_min(LEAST)

    def _parts(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.kept.to(t.device)[t].view(-1, *[1] * (like.dim() - 1))
        dtype = accumulate_dtype(like.dtype)
        return kept.sqrt().to(dtype), (1.0 - kept).sqrt().to(dtype)


def read_schedule(scheduler: Any, prediction: Prediction | None) -> Schedule:
    """Of a scheduler of diffusers, or of a tensor of cumulative products [timesteps].

    Raises:
        ValueError: there are no such products (flow matching), or the scheduler predicts something
            else.
    """
    choices = get_args(Prediction)
    known = prediction is None or prediction in choices
    require(known, "prediction", " or ".join(map(repr, choices)), repr(prediction))
    kept = scheduler if isinstance(scheduler, Tensor) else None
    if kept is None:
        kept = getattr(scheduler, "alphas_cumprod", None)
    kind = type(scheduler).__name__
    what = "a scheduler with alphas_cumprod, or these themselves [timesteps]"
    remedy = "flow matching has no such products and is not supported; use DDPMScheduler"
    good = isinstance(kept, Tensor) and kept.dim() == 1 and kept.numel() > 1
    require(good, "scheduler", what, kind, remedy)
    assert isinstance(kept, Tensor)
    kept = kept.detach().to("cpu", torch.float64)
    falls = bool((kept >= 0).all() and (kept <= 1).all() and (kept.diff() <= 0).all())
    remedy = "of betas pass (1 - betas).cumprod(0)"
    require(falls, "scheduler", "products that fall within [0, 1]", "others", remedy)
    own = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    require(own is None or own in NAMES, "scheduler", " or ".join(map(repr, NAMES)), repr(own))
    theirs: Any = prediction if own is None else NAMES[own]
    same = prediction is None or theirs == prediction
    require(same, "prediction", f"{theirs!r}, as the scheduler's", repr(prediction))
    return Schedule(kept, theirs or "epsilon")
