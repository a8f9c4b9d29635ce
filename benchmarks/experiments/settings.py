"""Scales of the experiment, every method's settings, and the candidates they come from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = ("random", "class")


@dataclass(frozen=True)
class Scale:
    """Size of everything. ``train_size`` counts the validation set; None = all there is."""

    name: str
    train_size: int | None
    test_size: int | None
    width: int
    epochs: int
    lr: float
    train_batch: int
    batch: int
    crop: int
    seeds: int


SCALES = {
    "smoke": Scale(
        "smoke", None, None, width=4, epochs=12, lr=0.1, train_batch=16, batch=32, crop=1, seeds=1
    ),
    "small": Scale(
        "small", 5000, 2000, width=8, epochs=16, lr=0.1, train_batch=64, batch=64, crop=1, seeds=3
    ),
    "full": Scale(
        "full", None, None, width=64, epochs=30, lr=0.4, train_batch=512, batch=128, crop=4, seeds=3
    ),
}

_PAPER = {
    "cycles": 40,
    "retain_steps": 5,
    "lr": 0.05,
    "slow_lr": 0.5,
    "forget_weight": 25.0,
    "max_norm": 1.0,
}
_OFFICIAL = {"cycles": 40, "retain_steps": 5, "forget_weight": 25.0}


def _along(name: str, values: tuple[float, ...], **rest: Any) -> list[dict[str, Any]]:
    """Candidates that differ in one setting, weak to strong."""
    return [{**rest, name: value} for value in values]


# As many candidates for every method, along the setting that decides how strongly it forgets.
_SMALL = {
    "FT": _along("lr", (0.02, 0.05, 0.1, 0.2), epochs=3),
    "GA": _along("lr", (1e-3, 2e-3, 4e-3, 8e-3), epochs=9),
    "RL": _along("lr", (0.01, 0.03, 0.1, 0.3), epochs=3),
    "SalUn": _along("lr", (0.02, 0.05, 0.15, 0.4), epochs=3),
    "BT": _along("lr", (0.15, 0.3, 0.6, 1.2), epochs=2),
    "SCRUB": _along("lr", (3e-3, 1e-2, 3e-2, 1e-1), epochs=3),
    "SA": _along("lr", (0.01, 0.03, 0.1, 0.3), epochs=2),
    "SFR-on (paper)": _along("forget_lr", (0.05, 0.15, 0.4, 1.0), **_PAPER),
    "SFR-on (official)": _along("max_norm", (0.5, 1.5, 4.0, 10.0), **_OFFICIAL),
    "SFR-on (separate)": _along("max_norm", (0.5, 1.5, 4.0, 10.0), **_OFFICIAL),
}
# The published settings among them.
_FULL = {
    "FT": _along("lr", (0.01, 0.03, 0.06, 0.1), epochs=10),
    "GA": _along("lr", (1e-4, 3e-4, 1e-3, 3e-3), epochs=9),
    "RL": _along("lr", (0.001, 0.003, 0.01, 0.03), epochs=10),
    "SalUn": _along("lr", (0.0025, 0.007, 0.02, 0.06), epochs=10),
    "BT": _along("lr", (0.02, 0.1, 0.5, 2.0), epochs=10),
    "SCRUB": _along("lr", (8e-5, 4e-4, 2e-3, 1e-2), epochs=6),
    "SA": _along("lr", (0.003, 0.01, 0.03, 0.1), epochs=4),
    "SFR-on (paper)": _along("forget_lr", (0.02, 0.05, 0.12, 0.3), **{**_PAPER, "cycles": 300}),
    "SFR-on (official)": _along("max_norm", (0.7, 2.0, 7.0, 20.0), **{**_OFFICIAL, "cycles": 300}),
    "SFR-on (separate)": _along("max_norm", (0.7, 2.0, 7.0, 20.0), **{**_OFFICIAL, "cycles": 300}),
}
# A forget weight this large makes the clip bind at every forget step, however little loss the model
# has left on what it knows by heart: the length of a step is forget_lr max_norm, whatever the width
# and the seed.
_FEW = {"cycles": 10, "retain_steps": 2, "forget_weight": 1e5}
_SMOKE = {
    "FT": [{"epochs": 2, "lr": 0.02}],
    "GA": [{"epochs": 6, "lr": 0.15}],
    "RL": [{"epochs": 4, "lr": 0.1}],
    "SalUn": [{"epochs": 4, "lr": 0.1}],
    "BT": [{"epochs": 4, "lr": 0.5}],
    "SCRUB": [{"epochs": 5, "lr": 0.01}],
    "SA": [{"epochs": 8, "lr": 0.1, "penalty": 0.1}],
    "SFR-on (paper)": [{**_FEW, "lr": 0.05, "slow_lr": 0.5, "max_norm": 1.0, "forget_lr": 0.5}],
    "SFR-on (official)": [{**_FEW, "lr": 0.02, "max_norm": 3.0}],
    "SFR-on (separate)": [{**_FEW, "lr": 0.02, "max_norm": 5.0}],
}
GRIDS = {"smoke": _SMOKE, "small": _SMALL, "full": _FULL}
CHOSEN = Path(__file__).parent / "chosen"


def chosen(scale: str, setting: str) -> dict[str, dict[str, Any]]:
    """Method -> settings as ``experiments.choose`` left them; before that, one inside the grid."""
    settings = {method: grid[len(grid) // 2] for method, grid in GRIDS[scale].items()}
    path = CHOSEN / f"{scale}.json"
    if path.exists():
        found = json.loads(path.read_text())["settings"].get(setting, {})
        settings |= {
            method: entry["chosen"] for method, entry in found.items() if method in settings
        }
    return settings


# Around the chosen settings of SFR-on (paper), one at a time; T_in at equal numbers of retain
# steps.
SWEEPS: dict[str, tuple[float, ...]] = {
    "temperature": (0.0, 0.25, 0.5, 0.75, 1.0),
    "forget_weight": (0.25, 0.5, 1.0, 2.0, 4.0),  # times the chosen one, and the clip with it
    "threshold": (0.25, 0.5, 1.0, 2.0, 4.0),
    "retain_steps": (1, 2, 5, 10, 20),
}


def swept(settings: dict[str, Any], name: str, value: float) -> dict[str, Any]:
    """The settings with one of them as the sweep wants it."""
    if name == "forget_weight":
        scaled = {
            k: settings[k] * value
            for k in ("forget_weight", "max_norm")
            if settings.get(k) is not None
        }
        return {**settings, **scaled}
    if name == "retain_steps":
        steps = settings["cycles"] * settings["retain_steps"]
        return {**settings, "retain_steps": int(value), "cycles": round(steps / value)}
    return {**settings, name: value}
