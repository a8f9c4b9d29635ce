"""Parameter groups without decay for biases and norms, and with the names that a mask asks for."""

from typing import Any

from torch import nn

from ..errors import number, require


def no_decay_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters by name, for ``SFRonSGD`` and ``SFRonAdamW`` (or
    torch's): matrices and more with ``weight_decay``; vectors, numbers, biases, and what
    ``model.no_weight_decay()`` of timm's models names, with none.

    They are those of timm's ``create_optimizer_v2``, with the names that a mask asks for.

    Raises:
        ValueError: a decay below 0, or no trainable parameter.
    """
    weight_decay = number("weight_decay", weight_decay, 0.0)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    require(bool(named), "model", "at least one parameter that requires grad", "none")
    asked: Any = getattr(model, "no_weight_decay", None)
    excluded = set(asked()) if callable(asked) else set()
    plain = {n for n, p in named if p.dim() < 2 or n.endswith("bias") or n in excluded}
    groups = [
        {"params": [(n, p) for n, p in named if n not in plain], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if n in plain], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
