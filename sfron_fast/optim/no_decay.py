"""Parameter groups without decay for biases and norms, and with the names that a mask asks for."""

from typing import Any

from torch import nn

from ..errors import number, require


def no_decay_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters by name, for ``SFRonSGD`` and ``SFRonAdamW`` (or
    torch's): matrices and more with ``weight_decay``, vectors, numbers and biases with none.

    It is what timm's ``create_optimizer_v2`` and ``param_groups_weight_decay`` make, with names.

    Raises:
        ValueError: a decay below 0, or no trainable parameter.
    """
    weight_decay = number("weight_decay", weight_decay, 0.0)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    require(bool(named), "model", "at least one parameter that requires grad", "none")
    plain = {n for n, p in named if p.dim() < 2 or n.endswith("bias")}
    groups = [
        {"params": [(n, p) for n, p in named if n not in plain], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if n in plain], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
