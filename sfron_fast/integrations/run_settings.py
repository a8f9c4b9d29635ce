"""What ``python -m sfron_fast unlearn`` can be told."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import methods
from ..errors import integer, number, require
from ..runs.budget import BUDGET
from ..runs.recipe import Recipe

BASELINES = {
    "grad_diff": methods.grad_diff,
    "npo": methods.npo,
    "simnpo": methods.simnpo,
    "wga": methods.wga,
    "satimp": methods.satimp,
    "ceu": methods.ceu,
    "undial": methods.undial,
}
METHODS = ("sfron", *BASELINES)
PASSES, CYCLES = 10, 100  # over the forget texts where nobody says, and at least under a budget
DTYPES = ("float32", "bfloat16")
STATES = (*DTYPES, "int8")
# weights up to -> lr of the whole model, of adapters
RATES = {10**7: (1e-3, 3e-3), 10**8: (1e-4, 1e-3), math.inf: (1e-5, 1e-4)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one run is; see ``python -m sfron_fast unlearn --help``."""

    model: str
    method: str = "sfron"
    lora: int | None = None
    budget: float | None = None
    epochs: int | None = None
    lr: float | None = None
    batch_size: int = 16
    max_length: int = 1024
    seed: int = 0
    dtype: str = "float32"
    weight_bits: int | None = None
    state_dtype: str | None = None
    gradient_checkpointing: bool = False

    def checked(self, holdout: bool) -> "Settings":
        """With the budget that is used.

        Raises:
            ValueError: a setting out of range, by name.
        """
        known = ", ".join(METHODS)
        more = "rmu and idk_dpo want more than texts: sfron_fast.methods"
        require(self.method in METHODS, "method", f"one of {known}", self.method, more)
        require(self.dtype in DTYPES, "dtype", " or ".join(DTYPES), self.dtype)
        for name, low in (("batch_size", 1), ("max_length", 3), ("seed", 0)):
            integer(name, getattr(self, name), low)
        for name in ("epochs", "lora"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)
        for name in ("weight_bits", "state_dtype"):
            ours = getattr(self, name) is None or self.method == "sfron"
            require(ours, name, "method sfron with it", self.method)
        states = ", ".join(STATES)
        require(self.state_dtype in (None, *STATES), "state_dtype", states, self.state_dtype)
        whole = self.weight_bits is None or (self.dtype == "bfloat16" and self.lora is None)
        found = f"dtype {self.dtype}, lora {self.lora}"
        require(whole, "weight_bits", "dtype bfloat16 with it, and no lora", found)
        Recipe.language(**self.dtypes())
        if self.lr is not None:
            number("lr", self.lr, 0.0, open_low=True)
        if self.budget is not None:
            number("budget", self.budget, 0.0, open_low=True)
            require(self.method == "sfron", "budget", "method sfron with it", self.method)
            remedy = "give --holdout: texts of the same kind that the model has never seen"
            require(holdout, "budget", "holdout texts, which it is relative to", "none", remedy)
        budget = BUDGET if self.budget is None and holdout and self.method == "sfron" else None
        return Settings(**{**asdict(self), "budget": self.budget or budget})

    def steps(self, batches: int) -> int:
        """Forget steps of a run over so many batches of forget texts: of few texts, under a budget,
        more than a few passes.
        """
        found = (self.epochs or PASSES) * batches
        return found if self.epochs is not None or self.budget is None else max(found, CYCLES)

    def dtypes(self) -> dict[str, Any]:
        """Of weights and moments, as a recipe is told."""
        state = None if self.state_dtype is None else getattr(torch, self.state_dtype)
        return {"weight_bits": self.weight_bits, "state_dtype": state}


def learning_rate(settings: Settings, weights: int) -> float:
    """Given, or by the number of the model's weights."""
    if settings.lr is not None:
        return settings.lr
    whole, adapters = next(rates for most, rates in RATES.items() if weights <= most)
    return whole if settings.lora is None else adapters
