"""SFRonSGD and SFRonAdamW: torch.optim optimizers with a forget step and a slow step.

A cycle is one ``forget_step()`` (masked, clipped ascent on fast weights) and ``retain_steps`` calls
of ``step()`` (ordinary descent); the last of them also interpolates the slow weights. ``step()``
outside a cycle is the stock optimizer. Source: Huang et al., NeurIPS 2024, algorithm of README
section "Equations"; the knobs are its table.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import functional
from ..errors import number, require
from ..ops.layout import ordered
from ..ops.lists import spread
from ..saliency.mask import SaliencyMask
from .base import SFRonOptimizer
from .batch import Batch
from .step_checks import check_batch

Moments = Literal["shared", "separate", "none"]
MaskSemantics = Literal["gradient", "update"]


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


class SFRonSGD(SFRonOptimizer):
    """torch.optim.SGD with a forget step: the authors' optimizer for ResNet-18.

    Args: params: ``model.named_parameters()`` (needed with ``saliency``), parameters, or groups.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD. lr,
        forget_lr, weight_decay
            and slow_lr may be tensors of one element: the device reads them, no step waits for
            them.
        foreach, fused: as torch.optim.SGD; each step is one fused pass whatever they say. With
            ``fused=True`` GradScaler leaves scale and overflow to the step, as torch's does.
        differentiable: False; the fused step cannot be differentiated.
        capturable: True for a CUDA graph. A number stays in the graph as it was at the capture;
            what changes between replays must be a tensor on the device. Make the state
            (``init_state``) before.
        saliency: which weights a forget step changes; None = all.
        forget_lr: learning rate beta of the forget step; None = ``lr``.
        max_norm: clip of the masked gradient norm in forget steps, in retain steps only with
        ``clip_retain``.
        retain_steps: T_in, calls of ``step()`` that close a cycle.
        slow_lr: alpha in (0, 1]; 1 keeps the fast weights, costs nothing and allocates nothing.
            Change it between cycles; inside one only if it is below 1 before and after.
        moments: momentum of a forget step: "shared" with the retain steps (the authors), "separate"
            (DualOptim), "none" (the paper: plain step, no decay).
        mask_semantics: "gradient" masks the gradient only (the authors: decay and momentum still
            move masked weights); "update" leaves masked weights and their state bit-identical in
            forget steps.
        state_dtype: of the moments. None = the parameter's; torch.float32 for fp32 beside
            low-precision parameters; torch.bfloat16 for half the memory beside fp32 ones. AdamW's
            averages are then rounded so that nothing is lost over the steps
            (``reference.dithered``); SGD's momentum to nearest, so not above 0.99.
    Raises: ValueError: naming the argument, what was expected and what was found. RuntimeError:
        ``differentiable``, or ``foreach`` and ``fused`` together (torch's type of error).
    """

    stock = torch.optim.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        saliency: SaliencyMask | None = None,
        forget_lr: float | Tensor | None = None,
        max_norm: float | None = None,
        clip_retain: bool = False,
        retain_steps: int = 1,
        slow_lr: float | Tensor = 1.0,
        moments: Moments = "shared",
        mask_semantics: MaskSemantics = "gradient",
        state_dtype: torch.dtype | None = None,
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
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
        }
        super().__init__(params, {**own, **knobs}, saliency)

    def _check_group(self, group: dict[str, Any], *, given: bool = False) -> None:
        super()._check_group(group, given=given)
        number("momentum", group["momentum"], 0.0)
        number("dampening", group["dampening"], 0.0)
        if group["nesterov"] and given:  # a schedule may take momentum through 0
            ok = group["momentum"] > 0 and group["dampening"] == 0
            found = f"momentum {group['momentum']}, dampening {group['dampening']}"
            require(ok, "nesterov", "momentum > 0 and dampening 0", found)

    def _kinds(self, group: dict[str, Any]) -> dict[str, torch.dtype | None]:
        return {"momentum_buffer": group["state_dtype"]} if group["momentum"] != 0.0 else {}

    def _update(self, batch: Batch, rule: dict[str, Any], prefix: str) -> None:
        group = batch.group
        rule |= {k: group[k] for k in ("momentum", "dampening", "nesterov")}
        if group["momentum"] == 0.0:
            functional.sgd_step_(*batch.arguments(), **{**rule, "nesterov": False})
            return
        key, dtype = f"{prefix}momentum_buffer", group["state_dtype"]
        if batch.flat is not None and key in batch.flat.flats:
            fresh = [False]
        else:
            fresh = [self.state.get(p, {}).get(key) is None for p in batch.params]
        if any(fresh) and not all(fresh):
            check_batch(self, batch, forget="masks" in rule)  # before the first of two calls
        if all(fresh) or not any(fresh):  # torch starts the buffer at the first gradient itself
            buffers = self._state(batch, key, dtype)
            functional.sgd_step_(*batch.arguments(), buffers, **rule, first=all(fresh))
            return
        params = ordered(batch.params, batch.orders)
        lists = {k: spread(rule[k], params) for k in ("slow_from", "slow_save") if rule.get(k)}
        for first in (True, False):
            chosen = [i for i, is_first in enumerate(fresh) if is_first == first]
            part = batch.part(chosen)
            own = {k: [tensors[i] for i in chosen] for k, tensors in lists.items()}
            own |= {"masks": part.masks} if "masks" in rule else {}
            functional.sgd_step_(
                *part.arguments(), self._state(part, key, dtype), **{**rule, **own}, first=first
            )
            rule["skipped"] = None  # one step, counted once


class SFRonAdamW(SFRonOptimizer):
    """torch.optim.AdamW (or, with ``decoupled_weight_decay=False``, Adam) with a forget step.

    Args: lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as
        torch.optim.AdamW / Adam;
            betas are numbers.
        The others: as SFRonSGD.
    One step count per parameter serves the bias correction of forget and retain steps
    (``moments="shared"``).
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
        }
        super().__init__(params, {**own, **knobs}, saliency)

    def _check_group(self, group: dict[str, Any], *, given: bool = False) -> None:
        super()._check_group(group, given=given)
        number("eps", group["eps"], 0.0)
        check_betas(group["betas"])

    def _kinds(self, group: dict[str, Any]) -> dict[str, torch.dtype | None]:
        moments = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        return {**dict.fromkeys(moments, group["state_dtype"]), "step": torch.float32}

    def _update(self, batch: Batch, rule: dict[str, Any], prefix: str) -> None:
        group, dtype = batch.group, batch.group["state_dtype"]
        functional.adamw_step_(
            *batch.arguments(),
            self._state(batch, f"{prefix}exp_avg", dtype),
            self._state(batch, f"{prefix}exp_avg_sq", dtype),
            self._state(batch, f"{prefix}step", torch.float32),
            self._state(batch, f"{prefix}max_exp_avg_sq", dtype) if group["amsgrad"] else None,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            decoupled=group["decoupled_weight_decay"],
            **rule,
        )
