"""Settings of the recipes for diffusion models (``Recipe.diffusion`` and its neighbours)."""

from typing import Any

# one Adam for both phases: with moments of their own, or none, the forget steps of equal lr are
# too short to forget in a few dozen passes
_ADAM: dict[str, Any] = {
    "optimizer": "adamw",
    "moments": "shared",
    "forget_decay": "constant",
    "weight_decay": 0.0,
}

REPLACE = _ADAM | {
    "name": "SFR-on (diffusion)",
    "objective": "replace",
    "cycles": 24,
    "retain_steps": 1,
    "lr": 2e-4,
    "max_norm": 1.0,
    "clip_retain": True,
    "draws": 8,
}
ASCENT = _ADAM | {
    "name": "SFR-on (diffusion, ascent)",
    "cycles": 12,
    "retain_steps": 3,
    "lr": 2e-3,
    "slow_lr": 0.5,
    "max_norm": 1.0,
    "clip_retain": True,
    "forget_decay": "linear",
    "ceiling": 3.0,
    "draws": 8,
}
# the authors' code (K1nght/Unified-Unlearning-w-Remain-Geometry, DDPM and SD)
OFFICIAL_DDPM = _ADAM | {
    "name": "SFR-on (official, DDPM)",
    "cycles": 150,
    "retain_steps": 1,
    "lr": 1e-4,
    "forget_weight": 10.0,
    "forget_decay": "cosine",
    "max_norm": 1.0,
    "clip_retain": True,
    "zero_over_zero": True,
    "estimator": "batch_equal",
    "forget_updates_buffers": True,
}
OFFICIAL_SD = _ADAM | {
    "name": "SFR-on (official, Stable Diffusion)",
    "objective": "replace",
    "cycles": 1000,
    "retain_steps": 1,
    "lr": 1e-5,
    "zero_over_zero": True,
    "estimator": "batch_equal",
    "forget_updates_buffers": True,
}
