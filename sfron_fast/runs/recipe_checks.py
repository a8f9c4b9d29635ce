"""What the settings of a recipe may be."""

import math
from typing import Any, Literal, get_args

from ..errors import number, require
from ..optim.adamw import check_betas
from ..optim.validation import CHOICES, MaskSemantics, Moments, check_state_dtype
from ..saliency.fisher import Estimator

Decay = Literal["linear", "cosine", "constant"]
Objective = Literal["ascent", "replace"]
CeilingOf = Literal["sample", "token"]
DECAYS = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "constant": lambda x: 1.0,
}


def check_recipe(recipe: Any) -> None:
    """Raise ValueError for a value out of range; numbers become plain floats."""
    for name in ("cycles", "retain_steps", "draws"):
        value = getattr(recipe, name)
        require(isinstance(value, int) and value >= 1, name, "an integer >= 1", repr(value))
    for name in ("lr", "forget_weight", "temperature", "momentum", "weight_decay"):
        number(name, getattr(recipe, name), 0.0)
    number("loss_floor", recipe.loss_floor, 0.0, open_low=True)
    for name in ("forget_lr", "max_norm", "threshold", "ceiling", "reference_loss"):
        if getattr(recipe, name) is not None:
            number(name, getattr(recipe, name), 0.0, open_low=name != "forget_lr")
    alone = recipe.ceiling is None and recipe.reference_loss is not None
    require(not alone, "ceiling", "a number, with reference_loss", recipe.ceiling)
    alone = recipe.ceiling is None and recipe.ceiling_of != "sample"
    require(not alone, "ceiling", f"a number, with ceiling_of {recipe.ceiling_of!r}", "None")
    plain = recipe.objective == "ascent" or recipe.ceiling is None
    require(plain, "ceiling", "None, with objective 'replace'", recipe.ceiling)
    once = recipe.draws == 1 or recipe.estimator == "sample"
    require(once, "draws", f"1, with estimator {recipe.estimator!r}", recipe.draws)
    number("slow_lr", recipe.slow_lr, 0.0, 1.0, open_low=True)
    check_betas(recipe.betas)
    check_state_dtype(recipe.state_dtype)
    for name in ("zero_over_zero", "clip_retain"):
        value = getattr(recipe, name)
        require(isinstance(value, bool), name, "True or False", repr(value))
    choices = {
        "forget_decay": tuple(DECAYS),
        "objective": get_args(Objective),
        "ceiling_of": get_args(CeilingOf),
        "lr_decay": ("cosine", "constant"),
        "optimizer": ("sgd", "adamw"),
        "estimator": get_args(Estimator),
        "moments": get_args(Moments),
        "mask_semantics": get_args(MaskSemantics),
        "weight_bits": CHOICES["weight_bits"],
        "slow_device": CHOICES["slow_device"],
    }
    for name, allowed in choices.items():
        value = getattr(recipe, name)
        require(value in allowed, name, " or ".join(map(repr, allowed)), repr(value))
    for name in (
        "lr",
        "forget_lr",
        "forget_weight",
        "temperature",
        "loss_floor",
        "ceiling",
        "reference_loss",
        "threshold",
        "momentum",
        "weight_decay",
        "max_norm",
        "slow_lr",
    ):
        value = getattr(recipe, name)
        # checkpoints hold plain numbers
        object.__setattr__(recipe, name, None if value is None else float(value))
    object.__setattr__(recipe, "betas", tuple(map(float, recipe.betas)))
