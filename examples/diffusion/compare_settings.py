"""What was tried on the classes that settings are chosen on, and what is used on the others.

All else is as the recipes have it.
"""

from typing import Any

from .compare_arms import PARTS, Settings


def _rates(*rates: float, **more: Any) -> list[Settings]:
    return [{"lr": lr, **more} for lr in rates]


FALLING = {"lr_decay": "cosine"}
SHORT = _rates(5e-5, 1e-4, 2e-4, 4e-4) + _rates(1e-4, 2e-4, 4e-4, 8e-4, **FALLING)
LONG = _rates(1e-3, 2e-3, 4e-3, 8e-3) + _rates(2e-3, 4e-3, 8e-3, 16e-3, **FALLING)
FORMS = [
    *_rates(1e-3, 2e-3, 4e-3, retain_steps=1),
    *_rates(4e-3, 8e-3, retain_steps=5),
    *_rates(4e-3, 8e-3, slow_lr=0.25),
    *_rates(2e-3, 4e-3, ceiling=6.0),
    *_rates(4e-3, ceiling=2.0),
    *_rates(2e-3, 4e-3, forget_decay="constant"),
]
GRIDS: dict[str, list[Settings]] = {
    **dict.fromkeys(["SFR-on", "SalUn", "DiMUM", "ESD"], SHORT),
    "fine-tuning": _rates(5e-4, 1e-3, 2e-3),
    "gradient ascent": _rates(5e-5, 1e-4, 2e-4, 4e-4),
    "SFR-on, ascent": [*LONG, *FORMS],
    **dict.fromkeys([name for name in PARTS if "ascent" in name and "lr" not in name], LONG),
}
# those with the lowest score; of settings within a point of it, those nearest the recipe's, or the
# whole's of which an arm is a part. Fine-tuning goes on at the rate of the training's beginning.
CHOICE: dict[str, Settings] = {
    **{name: {"lr": 2e-4} for name in ("SFR-on", "SalUn", "DiMUM", "ESD")},
    **{f"ascent, {form}": {"lr": 4e-3} for form in ("no mask", "random mask", "temperature 0")},
    **{
        f"ascent, {form}": {"lr": 2e-3}
        for form in ("no slow step", "steps in turn", "raw adaptive")
    },
    "SFR-on, ascent": {"lr": 4e-3},
    "ascent, no mask, lr 2e-3": {"lr": 2e-3},
    "fine-tuning": {"lr": 1e-3},
    "gradient ascent": {"lr": 5e-5},
    "gradient ascent, until forgotten": {"lr": 2e-4},  # at 5e-5 the class stays
    "noise": {"lr": 0.0},
}


def settings(name: str) -> Settings:
    """Of an arm: its own, or those of the arm it is a form of."""
    if name in CHOICE:
        return CHOICE[name]
    kind = name.split(",")[0]
    return CHOICE["SFR-on, ascent" if kind == "ascent" else kind]


def said(chosen: Settings) -> str:
    """The learning rate, and what else differs from the recipe."""
    more = (f"{key} {value}" for key, value in chosen.items() if key != "lr")
    return ", ".join([f"{chosen['lr']:g}", *more])
