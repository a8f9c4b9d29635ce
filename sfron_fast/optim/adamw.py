"""SFRonAdamW: torch.optim.AdamW, or Adam, with a forget step and a slow step."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import functional
from ..errors import number, require
from ..saliency.mask import SaliencyMask
from .base import SFRonOptimizer
from .batch import Batch
from .state_kind import COUNT, StateKind, moment_kinds, prefix
from .step import Step
from .validation import MaskSemantics, Moments, SlowDevice, WeightBits


def check_betas(betas: Any) -> None:
    """Adam's two, each in [0, 1)."""
    require(
        isinstance(betas, (tuple, list)) and len(betas) == 2,
        "betas",
        "two numbers in [0, 1)",
        repr(betas),
    )
    for i, beta in enumerate(betas):
        require(
            not isinstance(beta, Tensor),
            f"betas[{i}]",
            "a number in [0, 1)",
            "a tensor",
            "pass betas as floats",
        )
        number(f"betas[{i}]", beta, 0.0, 1.0)
        require(float(beta) < 1.0, f"betas[{i}]", "a number in [0, 1)", beta)


class SFRonAdamW(SFRonOptimizer):
    """torch.optim.AdamW (or, with ``decoupled_weight_decay=False``, Adam) with a forget step.

    Args:
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as
            torch.optim.AdamW / Adam; betas are numbers. The others: as SFRonSGD. One step count per
            parameter serves the bias correction of forget and retain steps (``moments="shared"``).
    """

    stock = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        saliency: SaliencyMask | None = None,
        forget_lr: float | Tensor | None = None,
        max_norm: float | None = None,
        clip_retain: bool = False,
        retain_steps: int = 1,
        slow_lr: float | Tensor = 1.0,
        moments: Moments = "shared",
        mask_semantics: MaskSemantics = "gradient",
        state_dtype: torch.dtype | None = None,
        weight_bits: WeightBits = None,
        slow_device: SlowDevice = None,
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        knobs = {
            "forget_lr": forget_lr,
            "max_norm": max_norm,
            "clip_retain": clip_retain,
            "retain_steps": retain_steps,
            "slow_lr": slow_lr,
            "moments": moments,
            "mask_semantics": mask_semantics,
            "state_dtype": state_dtype,
            "weight_bits": weight_bits,
            "slow_device": slow_device,
        }
        super().__init__(params, {**own, **knobs}, saliency)

    def check_group(self, group: dict[str, Any], *, given: bool = False) -> None:
        """As the base class; also the settings of the rule."""
        super().check_group(group, given=given)
        number("eps", group["eps"], 0.0)
        check_betas(group["betas"])
        coded = group["state_dtype"] == torch.int8
        require(not (coded and group["amsgrad"]), "amsgrad", "False beside moments in int8", True)

    def state_kinds(self, group: dict[str, Any]) -> dict[str, StateKind]:
        """The moments and the step count."""
        kinds = moment_kinds(group, "exp_avg", "exp_avg_sq")
        if group["amsgrad"]:
            kinds["max_exp_avg_sq"] = kinds["exp_avg_sq"]
        return {**kinds, "step": COUNT}

    def update(self, batch: Batch, step: Step) -> None:
        """One fused pass over the batch."""
        group = batch.group
        begin = prefix(group, forget=step.forget)
        kinds = self.state_kinds(group)
        states = {key: self._state(batch, begin + key, kind) for key, kind in kinds.items()}
        params, grads = batch.arguments()
        beta1, beta2 = group["betas"]
        functional.adamw_step_(
            params,
            grads,
            states["exp_avg"],
            states["exp_avg_sq"],
            states["step"],
            states.get("max_exp_avg_sq"),
            lr=step.lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=step.weight_decay,
            decoupled=group["decoupled_weight_decay"],
            maximize=step.maximize,
            masks=step.masks,
            freeze_masked=step.freeze_masked,
            norm=step.norm,
            max_norm=step.max_norm,
            grad_scale=step.grad_scale,
            found_inf=step.found_inf,
            slow_save=step.slow_save,
            slow_from=step.slow_from,
            slow_lr=step.slow_lr,
            numbers=step.numbers,
            skipped=step.skipped,
            scales=states.get("scales"),
            corrections=step.corrections,
            slow_save_corrections=step.slow_save_corrections,
            slow_from_corrections=step.slow_from_corrections,
        )
